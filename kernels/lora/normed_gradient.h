// What LoRA's A takes where the layer's input is a norm's output n = rstd o x o (w + offset):
//   da += scale ds^T n
// without making n again: rstd belongs to a row, (w + offset) to a column, so
//   da[j, c] += scale (w[c] + offset) sum over t of (rstd[t] ds[t, j]) x[t, c]
// with rstd[t] ds[t, j] rounded to the dtype of ds. Cost: 2 T J C operations, one pass over x.
//
// CUDA, bf16, J a multiple of 8 to 64, many columns in multiples of 16 bytes: one kernel.
// Everywhere else MatMul between two small passes.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct NormedGradientArgs {
  TensorView ds;    // (T, J)  f64, f32 or bf16; rows may be strided, here and below
  TensorView x;     // (T, C)  dtype of ds
  TensorView rstd;  // (T)     f32 (f64)
  TensorView w;     // (C)     dtype of ds
  TensorView da;    // (J, C)  in and out, f32 (f64)
  double weight_offset = 0.0;
  double scale = 1.0;
  TensorView workspace;  // (>= NormedGradientWorkspaceBytes) u8
};

int64_t NormedGradientWorkspaceBytes(const Exec& exec, const NormedGradientArgs& args);

void NormedGradient(const Exec& exec, const NormedGradientArgs& args);

}  // namespace attune
