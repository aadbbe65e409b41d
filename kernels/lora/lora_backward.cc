#include "kernels/lora/lora_backward.h"

#include <algorithm>

#include "kernels/core/dispatch.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/lora/lora_backward_grid.h"
#include "kernels/matmul/matmul.h"

namespace attune {

// False, and nothing done, where shapes, addresses or the workspace do not suit the one pass.
bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a);

namespace {

TensorView Columns(const TensorView& x, int64_t begin, int64_t count) {
  return x.Slice(1, begin, begin + count);
}

void CheckArgs(const LoraBackwardArgs& a) {
  CHECK(!a.parts.empty() && a.parts.size() <= kMaxLoraParts);
  const DType dtype = a.dy.dtype;
  const int64_t T = a.dy.dim(0), r = a.parts[0].b.dim(1);
  CHECK(IsFloat(dtype));
  CheckMatrix(a.dy, dtype, T, a.dy.dim(1));
  CheckMatrix(a.s, dtype, T, a.s.dim(1));
  CheckMatrix(a.ds, dtype, T, a.ds.dim(1));
  const int64_t columns = static_cast<int64_t>(a.parts.size()) * r;
  CHECK(a.s.dim(1) >= columns && a.ds.dim(1) >= columns);
  for (const LoraBackwardPart& part : a.parts) {
    const int64_t rows = part.b.dim(0);
    CheckMatrix(part.b, dtype, rows, r);
    CheckMatrix(part.db, AccumulatorDType(dtype), rows, r);
    CHECK(part.column_begin >= 0 && part.column_begin + rows <= a.dy.dim(1));
  }
}

// The two products of part i.
MatMulArgs InputProduct(const LoraBackwardArgs& a, size_t i) {
  const LoraBackwardPart& part = a.parts[i];
  const int64_t r = part.b.dim(1);
  return {.a = Columns(a.dy, part.column_begin, part.b.dim(0)),
          .b = part.b,
          .d = Columns(a.ds, static_cast<int64_t>(i) * r, r),
          .alpha = a.scale,
          .workspace = a.workspace};
}
MatMulArgs ParameterProduct(const LoraBackwardArgs& a, size_t i) {
  const LoraBackwardPart& part = a.parts[i];
  const int64_t r = part.b.dim(1);
  return {.a = Columns(a.dy, part.column_begin, part.b.dim(0)),
          .b = Columns(a.s, static_cast<int64_t>(i) * r, r),
          .d = part.db,
          .trans_a = true,
          .alpha = a.db_scale,
          .beta = 1,
          .workspace = a.workspace};
}

// With more partial sums the one pass takes some of the rows at a time.
constexpr int64_t kMostSumBytes = 96 << 20;

}  // namespace

int64_t LoraBackwardWorkspaceBytes(const Exec& exec, const LoraBackwardArgs& args) {
  CheckArgs(args);
  int64_t bytes = 0;
  for (size_t i = 0; i < args.parts.size(); ++i) {
    bytes = std::max({bytes, MatMulWorkspaceBytes(exec, InputProduct(args, i)),
                      MatMulWorkspaceBytes(exec, ParameterProduct(args, i))});
  }
  const int64_t r = args.parts[0].b.dim(1);
  if (exec.device == DeviceKind::kCuda && args.dy.dtype == DType::kBF16 && r <= kMaxPassRank) {
    const int64_t sums = 4 * LoraBackwardGrid::Of(args).Sums(args.dy.dim(0));
    bytes = std::max(bytes, std::min(sums, kMostSumBytes));
  }
  return bytes;
}

void LoraBackward(const Exec& exec, const LoraBackwardArgs& args) {
  CheckWorkspace(args.workspace, LoraBackwardWorkspaceBytes(exec, args));
#ifdef ATTUNE_HAS_CUDA
  const bool runs_on_cuda = exec.device == DeviceKind::kCuda && !exec.plan;
  if (runs_on_cuda && LoraBackwardCuda(exec, args)) return;
#endif
  const int64_t columns = static_cast<int64_t>(args.parts.size()) * args.parts[0].b.dim(1);
  if (args.ds.dim(1) > columns) {
    Fill(exec, {.x = Columns(args.ds, columns, args.ds.dim(1) - columns)});
  }
  for (size_t i = 0; i < args.parts.size(); ++i) {
    MatMul(exec, InputProduct(args, i));
    MatMul(exec, ParameterProduct(args, i));
  }
}

}  // namespace attune
