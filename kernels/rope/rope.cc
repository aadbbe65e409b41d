#include "kernels/rope/rope.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(RopeTable);
ATTUNE_BACKENDS(Rope);

void RopeTable(const Exec& exec, const RopeTableArgs& args) {
  const int64_t t = args.positions.dim(0), half = args.inv_freq.dim(0);
  CheckVector(args.positions, DType::kI32, t);
  CheckVector(args.inv_freq, DType::kF32, half);
  CHECK(args.cos.dtype == DType::kF32 || args.cos.dtype == DType::kF64);
  CheckMatrix(args.cos, args.cos.dtype, t, half);
  CheckMatrix(args.sin, args.cos.dtype, t, half);
  CHECK(args.cos.contiguous() && args.sin.contiguous());
  ATTUNE_RUN(RopeTable, exec, args);
}

void Rope(const Exec& exec, const RopeArgs& args) {
  CHECK(args.x.rank == 3 && IsFloat(args.x.dtype));
  CHECK(args.x.dim(2) <= 1 || args.x.stride(2) == 1);
  if (args.y.defined()) {
    CHECK(args.y.dtype == args.x.dtype && args.y.SameShape(args.x));
    CHECK(args.y.dim(2) <= 1 || args.y.stride(2) == 1);
  }
  CHECK(args.rotary_dim >= 0 && args.rotary_dim % 2 == 0 && args.rotary_dim <= args.x.dim(2));
  const DType table = AccumulatorDType(args.x.dtype);
  CheckMatrix(args.cos, table, args.x.dim(0), args.rotary_dim / 2);
  CheckMatrix(args.sin, table, args.x.dim(0), args.rotary_dim / 2);
  ATTUNE_RUN(Rope, exec, args);
}

}  // namespace attune
