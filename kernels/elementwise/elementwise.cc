#include "kernels/elementwise/elementwise.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(Fill);
ATTUNE_BACKENDS(Copy);
ATTUNE_BACKENDS(Add);
ATTUNE_BACKENDS(Scale);
ATTUNE_BACKENDS(SoftCap);
ATTUNE_BACKENDS(SumToScalar);

namespace {

// Rank 1 or 2 with innermost stride 1, or contiguous.
void CheckLayout(const TensorView& x) {
  CHECK(x.rank >= 1);
  if (x.contiguous()) return;
  CHECK(x.rank == 2);
  CheckMatrix(x, x.dtype, x.dim(0), x.dim(1));
}

bool IsScalar(const TensorView& x) {
  return x.rank == 1 && x.dim(0) == 1 && (x.dtype == DType::kF32 || x.dtype == DType::kF64);
}

}  // namespace

void Fill(const Exec& exec, const FillArgs& args) {
  CheckLayout(args.x);
  ATTUNE_RUN(Fill, exec, args);
}

void Copy(const Exec& exec, const CopyArgs& args) {
  CheckLayout(args.x);
  CheckLayout(args.y);
  CHECK(args.x.SameShape(args.y));
  CHECK(args.x.dtype == args.y.dtype ||
        ((IsFloat(args.x.dtype) || args.x.dtype == DType::kF16) && IsFloat(args.y.dtype)));
  ATTUNE_RUN(Copy, exec, args);
}

void Add(const Exec& exec, const AddArgs& args) {
  CheckLayout(args.x);
  CheckLayout(args.y);
  const bool to_rows = args.x.rank == 1 && args.y.rank == 2;
  CHECK(to_rows ? args.x.dim(0) == args.y.dim(1) : args.x.SameShape(args.y));
  CHECK(IsFloat(args.x.dtype) && IsFloat(args.y.dtype));
  ATTUNE_RUN(Add, exec, args);
}

void Scale(const Exec& exec, const ScaleArgs& args) {
  CheckLayout(args.x);
  CHECK(IsFloat(args.x.dtype));
  CHECK(!args.alpha_device.defined() || IsScalar(args.alpha_device));
  ATTUNE_RUN(Scale, exec, args);
}

void SoftCap(const Exec& exec, const SoftCapArgs& args) {
  CheckLayout(args.x);
  CHECK(IsFloat(args.x.dtype) && args.cap > 0);
  ATTUNE_RUN(SoftCap, exec, args);
}

void SumToScalar(const Exec& exec, const SumToScalarArgs& args) {
  CheckLayout(args.x);
  CHECK(IsFloat(args.x.dtype) || args.x.dtype == DType::kU8);
  CHECK(IsScalar(args.out));
  ATTUNE_RUN(SumToScalar, exec, args);
}

}  // namespace attune
