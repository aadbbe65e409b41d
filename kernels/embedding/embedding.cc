#include "kernels/embedding/embedding.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(EmbeddingForward);
ATTUNE_BACKENDS(EmbeddingBackward);
ATTUNE_BACKENDS(EmbeddingNoise);

void EmbeddingForward(const Exec& exec, const EmbeddingForwardArgs& args) {
  CHECK(IsFloat(args.table.dtype));
  CheckVector(args.ids, DType::kI32, args.y.dim(0));
  CheckMatrix(args.table, args.table.dtype, args.table.dim(0), args.table.dim(1));
  CheckMatrix(args.y, args.table.dtype, args.ids.dim(0), args.table.dim(1));
  ATTUNE_RUN(EmbeddingForward, exec, args);
}

void EmbeddingBackward(const Exec& exec, const EmbeddingBackwardArgs& args) {
  CHECK(IsFloat(args.dy.dtype));
  const int64_t C = args.dy.dim(1);
  CheckVector(args.ids, DType::kI32, args.dy.dim(0));
  CheckMatrix(args.dy, args.dy.dtype, args.dy.dim(0), C);
  CheckMatrix(args.dtable, AccumulatorDType(args.dy.dtype), args.dtable.dim(0), C);
  ATTUNE_RUN(EmbeddingBackward, exec, args);
}

void EmbeddingNoise(const Exec& exec, const EmbeddingNoiseArgs& args) {
  CHECK(IsFloat(args.x.dtype));
  CheckMatrix(args.x, args.x.dtype, args.x.dim(0), args.x.dim(1));
  CheckVector(args.num_segments, DType::kI32, 1);
  CheckVector(args.q_begin, DType::kI32, args.q_begin.dim(0));
  CheckVector(args.step_pack, DType::kI32, 2);
  CHECK(args.alpha >= 0);
  ATTUNE_RUN(EmbeddingNoise, exec, args);
}

}  // namespace attune
