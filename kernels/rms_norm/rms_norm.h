// RMSNorm over the last dimension, with the residual addition in front of it:
//   sum[m,c] = x[m,c] + delta[m,c]                       (only with delta; rounded to x's dtype)
//   rstd[m]  = 1 / sqrt(mean_c(sum[m,c]^2) + eps)
//   y[m,c]   = sum[m,c] * rstd[m] * (w[c] + weight_offset)
// Without delta, sum is x. Sums are in f32 (f64 for f64) and in a fixed order: bitwise repeatable
// on any number of threads. rstd is kept for Rebuild and Backward, y is not (Rebuild).
//
// x (T, H, C), one norm per head: call it per head with the (T, C) slice, or with reshaped rows.
// Cost: forward reads x (and delta) twice from cache, writes y (and sum) once.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
#include "kernels/fp8/fp8.h"

namespace attune {

struct RmsNormForwardArgs {
  TensorView x;      // (M, C)  f64, f32 or bf16; rows may be strided
  TensorView delta;  // (M, C)  optional, dtype of x
  TensorView sum;    // (M, C)  out, with delta only, dtype of x; may be x or delta themselves
  TensorView w;      // (C)     dtype of x, or f32
  TensorView y;      // (M, C)  out, dtype of x; may be x or delta where sum is not that view
  TensorView rstd;   // (M)     out, f32 (f64 for f64)
  double eps = 1e-5;
  double weight_offset = 0.0;  // Gemma: 1
  Fp8Rows fp8;                 // out, optional: of y
};
void RmsNormForward(const Exec& exec, const RmsNormForwardArgs& args);

// y again from what was saved: the same bits as RmsNormForward wrote. x is its `sum` (or x).
struct RmsNormRebuildArgs {
  TensorView x;     // (M, C)
  TensorView rstd;  // (M)     f32 (f64 for f64)
  TensorView w;     // (C)     dtype of x, or f32
  TensorView y;     // (M, C)  out, dtype of x; may be x
  double weight_offset = 0.0;
  Fp8Rows fp8;  // out, optional: of y
};
void RmsNormRebuild(const Exec& exec, const RmsNormRebuildArgs& args);

// With g[m,c] = dy[m,c] * (w[c] + weight_offset), xh = x * rstd:
//   dx = rstd * (g - xh * mean_c(g * xh)) + dresidual     (assigned; rounded once)
//   dw[c] += sum_m dy[m,c] * xh[m,c]                       (m in ascending order)
// dx is the gradient of `sum`, so of x and of delta alike.
struct RmsNormBackwardArgs {
  TensorView dy;         // (M, C)
  TensorView x;          // (M, C)  what was normalised: forward's `sum` (or x)
  TensorView rstd;       // (M)     f32 (f64 for f64)
  TensorView w;          // (C)     dtype of x, or f32
  TensorView dresidual;  // (M, C)  optional: the gradient that reaches the sum past the norm
  TensorView dx;         // (M, C)  out, dtype of x; may be dy, dresidual or x
  TensorView dw;         // (C)     optional, accumulated, f32 (f64 for f64). With dw, dx may not be
                         //         dy or x
  TensorView workspace;  // (>= RmsNormBackwardWorkspaceBytes) u8, may be left out where that is 0
  double weight_offset = 0.0;
};
int64_t RmsNormBackwardWorkspaceBytes(const Exec& exec, const RmsNormBackwardArgs& args);
void RmsNormBackward(const Exec& exec, const RmsNormBackwardArgs& args);

}  // namespace attune
