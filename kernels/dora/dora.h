// What DoRA (Liu et al., 2024) adds to LoRA: the rows of V = W + s B A get lengths m that are
// trained,
//   y = g o (x V^T),   g = m / ||V||,   ||V|| the lengths of V's rows
// where gradients take ||V|| for a constant, as the paper and PEFT do. Sums are in a fixed order.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

// norm[n] = ||v[n]||,  factor[n] = magnitude[n] / norm[n]. A row of zeros has the factor 0.
// Cost: one pass over v.
struct DoraFactorsArgs {
  TensorView v;          // (N, K) f32 (f64); rows may be strided
  TensorView magnitude;  // (N)  same dtype, optional
  TensorView norm;       // (N)  same dtype  out
  TensorView factor;     // (N)  same dtype  out, with magnitude
};
void DoraFactors(const Exec& exec, const DoraFactorsArgs& args);

// y[t,n] = (accumulate ? y[t,n] : 0) + alpha * (factor[n] + offset) * x[t,n]. y may be x, unless it
// accumulates. Cost: one pass over x and y.
struct ScaleColumnsArgs {
  TensorView x;       // (T, N)  f64, f32 or bf16; rows may be strided
  TensorView factor;  // (N)     f32 (f64)
  TensorView y;       // (T, N)  dtype of x  out
  double offset = 0;
  double alpha = 1;
  bool accumulate = false;
};
void ScaleColumns(const Exec& exec, const ScaleColumnsArgs& args);

// dmagnitude[n] += alpha / norm[n] * sum over t of dy[t,n] u[t,n], for u = x V^T. A norm of 0 adds
// nothing. Cost: one pass over dy and u.
struct DoraMagnitudeBackwardArgs {
  TensorView dy;          // (T, N)  f64, f32 or bf16; rows may be strided
  TensorView u;           // (T, N)  same dtype; rows may be strided
  TensorView norm;        // (N)     f32 (f64)
  TensorView dmagnitude;  // (N)     f32 (f64)  in and out
  double alpha = 1;
};
void DoraMagnitudeBackward(const Exec& exec, const DoraMagnitudeBackwardArgs& args);

}  // namespace attune
