#include "kernels/gated_activation/gated_activation.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(GatedActivationForward);
ATTUNE_BACKENDS(GatedActivationBackward);

void GatedActivationForward(const Exec& exec, const GatedActivationForwardArgs& args) {
  CHECK(IsFloat(args.gate.dtype));
  for (const TensorView* x : {&args.gate, &args.up, &args.h}) {
    CheckMatrix(*x, args.gate.dtype, args.gate.dim(0), args.gate.dim(1));
  }
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
  ATTUNE_RUN(GatedActivationBackward, exec, args);
}

}  // namespace attune
