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
  CHECK(!a.heads.empty() && a.heads.size() <= kMaxQkNormHeads);
  const TensorView& first = a.heads[0].x;
  const DType statistics = AccumulatorDType(first.dtype);
  CHECK(IsFloat(first.dtype) && first.dim(2) >= 1 && first.dim(2) <= 512);
  for (const auto& heads : a.heads) {
    CheckHeads(heads.x, heads.x);
    CHECK(heads.x.dtype == first.dtype && heads.x.dim(0) == first.dim(0) &&
          heads.x.dim(2) == first.dim(2));
    CheckVector(heads.w, first.dtype, first.dim(2));
    CheckMatrix(heads.rstd, statistics, first.dim(0), heads.x.dim(1));
    CHECK(heads.rstd.contiguous());
  }
  CHECK(a.rotary_dim >= 0 && a.rotary_dim % 2 == 0 && a.rotary_dim <= first.dim(2));
  if (a.rotary_dim == 0) return;
  CheckMatrix(a.cos, statistics, first.dim(0), a.rotary_dim / 2);
  CheckMatrix(a.sin, statistics, first.dim(0), a.rotary_dim / 2);
}

}  // namespace

void QkNormForward(const Exec& exec, const QkNormForwardArgs& args) {
  CheckShared(args);
  for (const QkNormHeads& heads : args.heads) CheckHeads(heads.y, heads.x);
  ATTUNE_RUN(QkNormForward, exec, args);
}

void QkNormBackward(const Exec& exec, const QkNormBackwardArgs& args) {
  CheckShared(args);
  for (const QkNormHeadsBackward& heads : args.heads) {
    CheckHeads(heads.dy, heads.x);
    CheckHeads(heads.dx, heads.x);
  }
  ATTUNE_RUN(QkNormBackward, exec, args);
}

}  // namespace attune
