#include "kernels/rms_norm/rms_norm.h"

#include <algorithm>

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(RmsNormForward);
ATTUNE_BACKENDS(RmsNormRebuild);
ATTUNE_BACKENDS(RmsNormBackward);
// Runs of rows that the CUDA backend first sums the gradient of w over, in fixed order.
int64_t RmsNormWeightRuns(int64_t rows) {
  return std::clamp<int64_t>(rows / 32, 1, 256);
}

namespace {

void CheckNorm(const TensorView& x, const TensorView& rstd, const TensorView& w) {
  CHECK(IsFloat(x.dtype));
  CheckMatrix(x, x.dtype, x.dim(0), x.dim(1));
  CheckVector(rstd, AccumulatorDType(x.dtype), x.dim(0));
  CHECK(w.dtype == x.dtype || (x.dtype == DType::kBF16 && w.dtype == DType::kF32));
  CheckVector(w, w.dtype, x.dim(1));
}

void CheckArgs(const RmsNormBackwardArgs& a) {
  CheckNorm(a.x, a.rstd, a.w);
  const int64_t m = a.x.dim(0), c = a.x.dim(1);
  CheckMatrix(a.dy, a.x.dtype, m, c);
  CheckMatrix(a.dx, a.x.dtype, m, c);
  if (a.dresidual.defined()) CheckMatrix(a.dresidual, a.x.dtype, m, c);
  if (a.dw.defined()) {
    CheckVector(a.dw, AccumulatorDType(a.x.dtype), c);
    CHECK(!SameView(a.dx, a.dy) && !SameView(a.dx, a.x));
  }
}

}  // namespace

void RmsNormForward(const Exec& exec, const RmsNormForwardArgs& args) {
  CheckNorm(args.x, args.rstd, args.w);
  const int64_t m = args.x.dim(0), c = args.x.dim(1);
  CheckMatrix(args.y, args.x.dtype, m, c);
  CHECK(args.delta.defined() == args.sum.defined());
  if (args.delta.defined()) {
    CheckMatrix(args.delta, args.x.dtype, m, c);
    CheckMatrix(args.sum, args.x.dtype, m, c);
    CHECK(!SameView(args.sum, args.y));
  }
  if (args.fp8.defined()) CheckFp8Rows(args.fp8, args.y);
  ATTUNE_RUN(RmsNormForward, exec, args);
}

void RmsNormRebuild(const Exec& exec, const RmsNormRebuildArgs& args) {
  CheckNorm(args.x, args.rstd, args.w);
  CheckMatrix(args.y, args.x.dtype, args.x.dim(0), args.x.dim(1));
  if (args.fp8.defined()) CheckFp8Rows(args.fp8, args.y);
  ATTUNE_RUN(RmsNormRebuild, exec, args);
}

int64_t RmsNormBackwardWorkspaceBytes(const Exec& exec, const RmsNormBackwardArgs& args) {
  CheckArgs(args);
  if (exec.device == DeviceKind::kCpu || !args.dw.defined()) return 0;
  return RmsNormWeightRuns(args.x.dim(0)) * args.x.dim(1) * static_cast<int64_t>(sizeof(float));
}

void RmsNormBackward(const Exec& exec, const RmsNormBackwardArgs& args) {
  CheckWorkspace(args.workspace, RmsNormBackwardWorkspaceBytes(exec, args));
  ATTUNE_RUN(RmsNormBackward, exec, args);
}

}  // namespace attune
