// Embedding: y[t] = table[ids[t]] * scale.   (Gemma: scale = sqrt(C).)
// The table is frozen: there is no backward. An id outside [0, V) is the caller's bug: CHECK on the
// CPU, a zero row on CUDA; nothing outside the table is read. Cost: one pass over y.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct EmbeddingForwardArgs {
  TensorView ids;    // (T)     i32
  TensorView table;  // (V, C)  f64, f32 or bf16; rows may be strided
  TensorView y;      // (T, C)  out, dtype of table; rows may be strided
  double scale = 1.0;
};
void EmbeddingForward(const Exec& exec, const EmbeddingForwardArgs& args);

}  // namespace attune
