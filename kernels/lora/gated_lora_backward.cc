#include "kernels/lora/gated_lora_backward.h"

#include <algorithm>

#include "kernels/core/dispatch.h"
#include "kernels/lora/lora_pass.h"
#include "kernels/matmul/matmul.h"

namespace attune {

// False, and nothing done, where the GPU cannot.
bool GatedLoraBackwardCuda(const Exec& exec, const GatedLoraBackwardArgs& a);

namespace {

void CheckArgs(const GatedLoraBackwardArgs& a) {
  CHECK(a.lora.parts.size() == 2);
  const DType dtype = a.dh.dtype;
  const int64_t T = a.dh.dim(0), F = a.dh.dim(1), r = a.lora.parts[0].b.dim(1);
  CHECK(IsFloat(dtype));
  CheckMatrix(a.dh, dtype, T, F);
  CheckMatrix(a.lora.dy, dtype, T, 2 * F);
  CheckMatrix(a.down_ds, dtype, T, a.down_ds.dim(1));
  CHECK(a.down_ds.dim(1) >= r);
  CheckMatrix(a.down_da, AccumulatorDType(dtype), r, F);
  for (int p = 0; p < 2; ++p) {
    CHECK(a.lora.parts[p].column_begin == p * F && a.lora.parts[p].b.dim(0) == F);
  }
}

LoraBackwardArgs LoraOf(const GatedLoraBackwardArgs& a) {
  LoraBackwardArgs out = a.lora;
  out.workspace = a.workspace;
  return out;
}
MatMulArgs DownOf(const GatedLoraBackwardArgs& a) {
  return {.a = a.down_ds.Slice(1, 0, a.down_da.dim(0)),
          .b = a.dh,  // h
          .d = a.down_da,
          .trans_a = true,
          .alpha = a.down_da_scale,
          .beta = 1,
          .workspace = a.workspace};
}

bool IsOnePass(const Exec& exec, const GatedLoraBackwardArgs& a) {
  return a.lora.ds.dim(1) % 4 == 0 &&
         GatedPassTakes(exec, a.dh.dim(1), a.down_da.dim(0),
                        {&a.dh, &a.lora.dy, &a.lora.s, &a.lora.ds, &a.down_ds});
}
int64_t OnePassBytes(const GatedLoraBackwardArgs& a) {
  const int64_t T = a.dh.dim(0), F = a.dh.dim(1);
  return a.down_da.dim(0) <= 16 ? GatedPassShape<1>::Bytes(T, F) : GatedPassShape<2>::Bytes(T, F);
}

}  // namespace

int64_t GatedLoraBackwardWorkspaceBytes(const Exec& exec, const GatedLoraBackwardArgs& args) {
  CheckArgs(args);
  return std::max({LoraBackwardWorkspaceBytes(exec, LoraOf(args)),
                   MatMulWorkspaceBytes(exec, DownOf(args)),
                   IsOnePass(exec, args) ? OnePassBytes(args) : int64_t{0}});
}

void GatedLoraBackward(const Exec& exec, const GatedLoraBackwardArgs& args) {
  CheckWorkspace(args.workspace, GatedLoraBackwardWorkspaceBytes(exec, args));
#ifdef ATTUNE_HAS_CUDA
  const bool runs = exec.device == DeviceKind::kCuda && !exec.plan;
  if (runs && IsOnePass(exec, args) && GatedLoraBackwardCuda(exec, args)) return;
#endif
  const int64_t F = args.dh.dim(1);
  const TensorView gate = args.lora.dy.Slice(1, 0, F), up = args.lora.dy.Slice(1, F, 2 * F);
  GatedActivationBackward(exec, {.dh = args.dh,
                                 .gate = gate,
                                 .up = up,
                                 .dgate = gate,
                                 .dup = up,
                                 .h = args.dh,
                                 .activation = args.activation,
                                 .fp8 = args.fp8});
  LoraBackward(exec, LoraOf(args));
  MatMul(exec, DownOf(args));
}

}  // namespace attune
