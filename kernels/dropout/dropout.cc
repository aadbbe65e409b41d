#include "kernels/dropout/dropout.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(Dropout);

void Dropout(const Exec& exec, const DropoutArgs& args) {
  CHECK(IsFloat(args.x.dtype));
  CheckMatrix(args.x, args.x.dtype, args.x.dim(0), args.x.dim(1));
  CheckMatrix(args.y, args.x.dtype, args.x.dim(0), args.x.dim(1));
  CheckVector(args.step_pack, DType::kI32, 2);
  CHECK(0.0 <= args.p && args.p < 1.0);
  CHECK(args.layer < (1u << 16) && args.module < (1u << 8) && args.first_row >= 0);
  ATTUNE_RUN(Dropout, exec, args);
}

}  // namespace attune
