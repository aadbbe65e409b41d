#include "kernels/cross_entropy/cross_entropy.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(CrossEntropy);

void CrossEntropy(const Exec& exec, const CrossEntropyArgs& args) {
  CHECK(IsFloat(args.logits.dtype));
  const int64_t rows = args.logits.dim(0);
  const DType accumulator = AccumulatorDType(args.logits.dtype);
  CheckMatrix(args.logits, args.logits.dtype, rows, args.logits.dim(1));
  CheckVector(args.targets, DType::kI32, rows);
  CheckVector(args.loss, accumulator, rows);
  if (args.correct.defined()) CheckVector(args.correct, DType::kU8, rows);
  CHECK(args.label_smoothing >= 0 && args.label_smoothing < 1 && args.z_loss >= 0);
  if (args.want_grad) CheckVector(args.grad_scale, accumulator, 1);
  ATTUNE_RUN(CrossEntropy, exec, args);
}

}  // namespace attune
