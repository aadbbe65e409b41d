// RMSNorm of every head, then the rotary embedding, in one pass (Qwen 3, Gemma 3):
//   rstd[t,h] = 1 / sqrt(mean_i(x[t,h,i]^2) + eps)
//   n[t,h,i]  = x[t,h,i] * rstd[t,h] * (w[i] + weight_offset)
//   y[t,h]    = n[t,h], its first R elements rotated as kernels/rope does; R = 0: none
// Backward, with dn the rotation of dy back, g = dn * (w + weight_offset) and xh = x * rstd:
//   dx = rstd * (g - xh * mean_i(g * xh))                     (assigned)
// w is frozen: there is no dw. All in f32 (f64 for f64), one rounding per output, sums in a fixed
// order. Cost: two reads of x (dy), the second from cache, one write.
#pragma once

#include <span>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int kMaxQkNormHeads = 2;  // q and k

struct QkNormHeads {
  TensorView x;     // (T, H, D)  f64, f32 or bf16; stride(0) and stride(1) are free; D <= 512
  TensorView w;     // (D)        dtype of x
  TensorView y;     // (T, H, D)  out, dtype of x, not overlapping x; strides as free
  TensorView rstd;  // (T, H)     out, f32 (f64 for f64), contiguous
};
struct QkNormForwardArgs {
  std::span<const QkNormHeads> heads;  // 1 to kMaxQkNormHeads, of one T, D and dtype
  TensorView cos;                      // (T, R/2)  f32 (f64 for f64); not looked at where R is 0
  TensorView sin;                      // (T, R/2)
  int64_t rotary_dim = 0;              // R <= D, even
  double eps = 1e-6;
  double weight_offset = 0.0;  // Gemma: 1
};
void QkNormForward(const Exec& exec, const QkNormForwardArgs& args);

struct QkNormHeadsBackward {
  TensorView dy;    // (T, H, D)  strides as free as those of x
  TensorView x;     // (T, H, D)
  TensorView rstd;  // (T, H)     as forward wrote it
  TensorView w;     // (D)
  TensorView dx;    // (T, H, D)  out, dtype of x, not overlapping dy or x
};
struct QkNormBackwardArgs {
  std::span<const QkNormHeadsBackward> heads;
  TensorView cos;  // (T, R/2)
  TensorView sin;  // (T, R/2)
  int64_t rotary_dim = 0;
  double weight_offset = 0.0;
};
void QkNormBackward(const Exec& exec, const QkNormBackwardArgs& args);

}  // namespace attune
