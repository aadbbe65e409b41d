#include "kernels/embedding/embedding.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(EmbeddingForward);

void EmbeddingForward(const Exec& exec, const EmbeddingForwardArgs& args) {
  CHECK(IsFloat(args.table.dtype));
  CheckVector(args.ids, DType::kI32, args.y.dim(0));
  CheckMatrix(args.table, args.table.dtype, args.table.dim(0), args.table.dim(1));
  CheckMatrix(args.y, args.table.dtype, args.ids.dim(0), args.table.dim(1));
  ATTUNE_RUN(EmbeddingForward, exec, args);
}

}  // namespace attune
