#include "kernels/embedding/embedding.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(EmbeddingForward);
ATTUNE_BACKENDS(EmbeddingNoise);

void EmbeddingForward(const Exec& exec, const EmbeddingForwardArgs& args) {
  CHECK(IsFloat(args.table.dtype));
  CheckVector(args.ids, DType::kI32, args.y.dim(0));
  CheckMatrix(args.table, args.table.dtype, args.table.dim(0), args.table.dim(1));
  CheckMatrix(args.y, args.table.dtype, args.ids.dim(0), args.table.dim(1));
  ATTUNE_RUN(EmbeddingForward, exec, args);
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
