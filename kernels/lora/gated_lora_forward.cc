#include "kernels/lora/gated_lora_forward.h"

#include <algorithm>

#include "kernels/core/dispatch.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/lora/lora_pass.h"
#include "kernels/matmul/matmul.h"

namespace attune {

// False, and nothing done, where the GPU cannot.
bool GatedLoraForwardCuda(const Exec& exec, const GatedLoraForwardArgs& a);

namespace {

void CheckArgs(const GatedLoraForwardArgs& a) {
  const DType dtype = a.h.dtype;
  const int64_t T = a.h.dim(0), F = a.h.dim(1), r = a.a.dim(0);
  CHECK(IsFloat(dtype));
  CheckMatrix(a.h, dtype, T, F);
  CheckMatrix(a.rows, dtype, T, 2 * F);
  CheckMatrix(a.a, dtype, r, F);
  CHECK(a.a.contiguous());
  CheckMatrix(a.s, dtype, T, a.s.dim(1));
  CHECK(a.s.dim(1) >= r);
}

MatMulArgs ProductOf(const GatedLoraForwardArgs& a) {
  return {.a = a.h,
          .b = a.a,
          .d = a.s.Slice(1, 0, a.a.dim(0)),
          .trans_b = true,
          .workspace = a.workspace};
}

bool IsOnePass(const Exec& exec, const GatedLoraForwardArgs& a) {
  return a.s.dim(1) % 4 == 0 && GatedPassTakes(exec, a.h.dim(1), a.a.dim(0), {&a.rows, &a.h, &a.s});
}

}  // namespace

int64_t GatedLoraForwardWorkspaceBytes(const Exec& exec, const GatedLoraForwardArgs& args) {
  CheckArgs(args);
  const int64_t T = args.h.dim(0), F = args.h.dim(1),
                product = MatMulWorkspaceBytes(exec, ProductOf(args));
  if (!IsOnePass(exec, args)) return product;
  return std::max(product, args.a.dim(0) <= 16 ? GatedForwardShape<1>::Bytes(T, F)
                                               : GatedForwardShape<2>::Bytes(T, F));
}

void GatedLoraForward(const Exec& exec, const GatedLoraForwardArgs& args) {
  CheckWorkspace(args.workspace, GatedLoraForwardWorkspaceBytes(exec, args));
#ifdef ATTUNE_HAS_CUDA
  const bool runs = exec.device == DeviceKind::kCuda && !exec.plan;
  if (runs && IsOnePass(exec, args) && GatedLoraForwardCuda(exec, args)) return;
#endif
  const int64_t F = args.h.dim(1), r = args.a.dim(0);
  GatedActivationForward(exec, {.gate = args.rows.Slice(1, 0, F),
                                .up = args.rows.Slice(1, F, 2 * F),
                                .h = args.h,
                                .activation = args.activation});
  if (args.s.dim(1) > r) Fill(exec, {.x = args.s.Slice(1, r, args.s.dim(1))});
  MatMul(exec, ProductOf(args));
}

}  // namespace attune
