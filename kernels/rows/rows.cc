#include "kernels/rows/rows.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(GatherRows);
ATTUNE_BACKENDS(ScatterRows);

namespace {

void CheckArgs(const TensorView& x, const TensorView& index, const TensorView& y) {
  CheckVector(index, DType::kI32, y.dim(0));
  CheckMatrix(x, x.dtype, x.dim(0), x.dim(1));
  CheckMatrix(y, x.dtype, index.dim(0), x.dim(1));
}

}  // namespace

void GatherRows(const Exec& exec, const GatherRowsArgs& args) {
  CheckArgs(args.x, args.index, args.y);
  ATTUNE_RUN(GatherRows, exec, args);
}

void ScatterRows(const Exec& exec, const ScatterRowsArgs& args) {
  CheckArgs(args.x, args.index, args.y);
  ATTUNE_RUN(ScatterRows, exec, args);
}

}  // namespace attune
