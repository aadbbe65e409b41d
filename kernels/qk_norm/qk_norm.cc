#include "kernels/qk_norm/qk_norm.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(QkNormForward);
ATTUNE_BACKENDS(QkNormBackward);

namespace {

void CheckHeads(const TensorView& x, const TensorView& like) {
  CHECK(x.rank == 3 && x.dtype == like.dtype && x.SameShape(like));
  CHECK(x.dim(2) <= 1 || x.stride(2) == 1);
}

template <typename Args>
void CheckShared(const Args& a) {
  CHECK(IsFloat(a.x.dtype) && a.x.dim(2) >= 1 && a.x.dim(2) <= 512);
  CheckHeads(a.x, a.x);
  CheckVector(a.w, a.x.dtype, a.x.dim(2));
  const DType statistics = AccumulatorDType(a.x.dtype);
  CheckMatrix(a.rstd, statistics, a.x.dim(0), a.x.dim(1));
  CHECK(a.rstd.contiguous());
  CHECK(a.rotary_dim >= 0 && a.rotary_dim % 2 == 0 && a.rotary_dim <= a.x.dim(2));
  if (a.rotary_dim == 0) return;
  CheckMatrix(a.cos, statistics, a.x.dim(0), a.rotary_dim / 2);
  CheckMatrix(a.sin, statistics, a.x.dim(0), a.rotary_dim / 2);
}

}  // namespace

void QkNormForward(const Exec& exec, const QkNormForwardArgs& args) {
  CheckShared(args);
  CheckHeads(args.y, args.x);
  ATTUNE_RUN(QkNormForward, exec, args);
}

void QkNormBackward(const Exec& exec, const QkNormBackwardArgs& args) {
  CheckShared(args);
  CheckHeads(args.dy, args.x);
  CheckHeads(args.dx, args.x);
  ATTUNE_RUN(QkNormBackward, exec, args);
}

}  // namespace attune
