// Cross entropy of one chunk of logits, and its gradient in the place of the logits:
//   z = logits, or softcap * tanh(logits / softcap) if softcap > 0
//   lse = log sum_v exp(z[r,v])
//   loss[r] = lse - (1 - e) z[r, targets[r]] - e mean_v z[r,v] + c lse^2
//   dlogits[r,v] = (softmax(z[r])[v] (1 + 2 c lse) - (1 - e) [v == targets[r]] - e / V) *
//   grad_scale
//                  (* 1 - (z/softcap)^2)
//   e = label_smoothing (as torch's cross_entropy), c = z_loss (PaLM's)
//   correct[r] = argmax_v z[r,v] == targets[r]                (the first of equal maxima)
// targets[r] < 0 is ignored: loss 0, correct 0, gradient row 0. A target >= V is the caller's bug
// (CHECK on the CPU). NaN in a row makes its loss and gradient NaN.
// grad_scale is on the device (1 / trained tokens is known after the batch is).
// Sums in f32 (f64 for f64), fixed order. Cost: three passes over a row, which stays in cache (on
// CUDA in shared memory, up to 393,216 elements of f32 and twice as many of bf16).
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
  double label_smoothing = 0.0;  // [0, 1)
  double z_loss = 0.0;           // at least 0
  bool want_grad = true;         // false: logits are left alone
};
void CrossEntropy(const Exec& exec, const CrossEntropyArgs& args);

}  // namespace attune
