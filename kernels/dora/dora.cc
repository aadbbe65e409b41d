#include "kernels/dora/dora.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(DoraFactors);
ATTUNE_BACKENDS(ScaleColumns);
ATTUNE_BACKENDS(DoraMagnitudeBackward);

void DoraFactors(const Exec& exec, const DoraFactorsArgs& args) {
  const DType dtype = args.v.dtype;
  const int64_t N = args.v.dim(0);
  CHECK(dtype == DType::kF32 || dtype == DType::kF64);
  CheckMatrix(args.v, dtype, N, args.v.dim(1));
  CheckVector(args.norm, dtype, N);
  CHECK(args.magnitude.defined() == args.factor.defined());
  if (args.factor.defined()) {
    CheckVector(args.magnitude, dtype, N);
    CheckVector(args.factor, dtype, N);
  }
  ATTUNE_RUN(DoraFactors, exec, args);
}

void ScaleColumns(const Exec& exec, const ScaleColumnsArgs& args) {
  CHECK(IsFloat(args.x.dtype));
  CheckMatrix(args.x, args.x.dtype, args.x.dim(0), args.x.dim(1));
  CheckMatrix(args.y, args.x.dtype, args.x.dim(0), args.x.dim(1));
  CheckVector(args.factor, AccumulatorDType(args.x.dtype), args.x.dim(1));
  ATTUNE_RUN(ScaleColumns, exec, args);
}

void DoraMagnitudeBackward(const Exec& exec, const DoraMagnitudeBackwardArgs& args) {
  const DType stats = AccumulatorDType(args.dy.dtype);
  const int64_t T = args.dy.dim(0), N = args.dy.dim(1);
  CHECK(IsFloat(args.dy.dtype));
  CheckMatrix(args.dy, args.dy.dtype, T, N);
  CheckMatrix(args.u, args.dy.dtype, T, N);
  CheckVector(args.norm, stats, N);
  CheckVector(args.dmagnitude, stats, N);
  ATTUNE_RUN(DoraMagnitudeBackward, exec, args);
}

}  // namespace attune
