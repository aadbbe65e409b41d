// Cross entropy of one chunk of logits, and its gradient in the place of the logits:
//   z = logits, or softcap * tanh(logits / softcap) if softcap > 0
//   loss[r] = log sum_v exp(z[r,v]) - z[r, targets[r]]
//   dlogits[r,v] = (softmax(z[r])[v] - [v == targets[r]]) * grad_scale   (* 1 - (z/softcap)^2)
//   correct[r] = argmax_v z[r,v] == targets[r]                (the first of equal maxima)
// targets[r] < 0 is ignored: loss 0, correct 0, gradient row 0. A target >= V is the caller's bug
// (CHECK on the CPU). NaN in a row makes its loss and gradient NaN.
// grad_scale is on the device (1 / trained tokens is known after the batch is).
// Sums in f32 (f64 for f64), fixed order. Cost: three passes over a row, which stays in cache.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct CrossEntropyArgs {
  TensorView logits;      // (R, V)  f64, f32 or bf16; rows may be strided. In; with want_grad
                          //         dlogits out
  TensorView targets;     // (R)     i32
  TensorView loss;        // (R)     out, f32 (f64 for f64)
  TensorView correct;     // (R)     out, u8, optional
  TensorView grad_scale;  // (1)     f32 (f64 for f64); needed with want_grad only
  double softcap = 0.0;   // 0: none
  bool want_grad = true;  // false: logits are left alone
};
void CrossEntropy(const Exec& exec, const CrossEntropyArgs& args);

}  // namespace attune
