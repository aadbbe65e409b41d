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
  CHECK(!args.heads.empty() && args.heads.size() <= kMaxRopeHeads);
  const TensorView& first = args.heads[0].x;
  for (const RopeHeads& heads : args.heads) {
    CHECK(heads.x.rank == 3 && heads.x.dtype == first.dtype && IsFloat(first.dtype));
    CHECK(heads.x.dim(0) == first.dim(0) && heads.x.dim(2) == first.dim(2));
    CHECK(heads.x.dim(2) <= 1 || heads.x.stride(2) == 1);
    if (!heads.y.defined()) continue;
    CHECK(heads.y.dtype == heads.x.dtype && heads.y.SameShape(heads.x));
    CHECK(heads.y.dim(2) <= 1 || heads.y.stride(2) == 1);
  }
  CHECK(args.rotary_dim >= 0 && args.rotary_dim % 2 == 0 && args.rotary_dim <= first.dim(2));
  const DType table = AccumulatorDType(first.dtype);
  CheckMatrix(args.cos, table, first.dim(0), args.rotary_dim / 2);
  CheckMatrix(args.sin, table, first.dim(0), args.rotary_dim / 2);
  ATTUNE_RUN(Rope, exec, args);
}

}  // namespace attune
