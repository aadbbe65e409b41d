#include "kernels/gated_activation/gated_activation.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(GatedActivationForward);
ATTUNE_BACKENDS(GatedActivationBackward);

TensorView GradientRows(const GatedActivationBackwardArgs& args) {
  TensorView rows = args.dgate;
  rows.shape[1] *= 2;
  return rows;
}

void GatedActivationForward(const Exec& exec, const GatedActivationForwardArgs& args) {
  CHECK(IsFloat(args.gate.dtype));
  for (const TensorView* x : {&args.gate, &args.up, &args.h}) {
    CheckMatrix(*x, args.gate.dtype, args.gate.dim(0), args.gate.dim(1));
  }
  if (args.fp8.defined()) CheckFp8Rows(args.fp8, args.h);
  ATTUNE_RUN(GatedActivationForward, exec, args);
}

void GatedActivationBackward(const Exec& exec, const GatedActivationBackwardArgs& args) {
  CHECK(IsFloat(args.gate.dtype));
  for (const TensorView* x : {&args.dh, &args.gate, &args.up, &args.dgate, &args.dup}) {
    CheckMatrix(*x, args.gate.dtype, args.gate.dim(0), args.gate.dim(1));
  }
  CHECK(!SameView(args.dgate, args.dup));
  if (args.h.defined()) {
    CheckMatrix(args.h, args.gate.dtype, args.gate.dim(0), args.gate.dim(1));
    CHECK(!SameView(args.h, args.dgate) && !SameView(args.h, args.dup));
  }
  if (args.fp8.defined()) {
    const TensorView rows = GradientRows(args);
    CheckFp8Rows(args.fp8, rows);
    CHECK(args.dup.data == rows.Slice(1, args.dup.dim(1), rows.dim(1)).data);
    CHECK(args.dup.dim(0) <= 1 || args.dup.stride(0) == rows.stride(0));
  }
  ATTUNE_RUN(GatedActivationBackward, exec, args);
}

}  // namespace attune
