// The gate of an MLP: h = act(gate) * up.   SwiGLU: act = silu; GeGLU: act = gelu.
//   silu(x)      = x / (1 + exp(-x))
//   gelu_tanh(x) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
//   gelu_erf(x)  = x/2 * (1 + erf(x / sqrt(2)))
// Backward: dgate = dh * up * act'(gate), dup = dh * act(gate).
// gate and up are usually the halves of one (M, 2F) buffer. All in f32 (f64 for f64), one rounding
// per output. Cost: one pass.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
#include "kernels/fp8/fp8.h"

namespace attune {

enum class Activation : uint8_t { kSilu, kGeluTanh, kGeluErf };

struct GatedActivationForwardArgs {
  TensorView gate;  // (M, F)  f64, f32 or bf16; rows may be strided, here and below
  TensorView up;    // (M, F)
  TensorView h;     // (M, F)  out; may be gate or up
  Activation activation = Activation::kSilu;
  Fp8Rows fp8;  // out, optional: of h
};
void GatedActivationForward(const Exec& exec, const GatedActivationForwardArgs& args);

struct GatedActivationBackwardArgs {
  TensorView dh;     // (M, F)
  TensorView gate;   // (M, F)
  TensorView up;     // (M, F)
  TensorView dgate;  // (M, F)  out, assigned; may be gate, up or dh
  TensorView dup;    // (M, F)  out, assigned; may be gate, up or dh, but not dgate
  TensorView h;      // (M, F)  out, optional: act(gate) * up again (the same bits as Forward); may
                     //         be gate, up or dh where neither dgate nor dup is that view
  Activation activation = Activation::kSilu;
  Fp8Rows fp8;  // out, optional: of the rows [dgate | dup]; these then lie one behind the other
};
void GatedActivationBackward(const Exec& exec, const GatedActivationBackwardArgs& args);

}  // namespace attune
