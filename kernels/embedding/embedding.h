// Embedding and noise on it: y[t] = table[ids[t]] * scale.   (Gemma: scale = sqrt(C).)
// An id outside [0, V) is the caller's bug: CHECK on the CPU, a zero row on CUDA; nothing outside
// the table is read or written. Cost: one pass over y.
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

// Its gradient, for a table that is trained: dtable[id] += scale * sum of dy[t] over t with
// ids[t] = id, in the order of t, but for padding_id, as torch's Embedding with its padding_idx.
// Cost: one pass over dy and the rows of dtable that it names; on CUDA also a
// few hundred looks at each id.
struct EmbeddingBackwardArgs {
  TensorView ids;     // (T)     i32
  TensorView dy;      // (T, C)  f64, f32 or bf16; rows may be strided
  TensorView dtable;  // (V, C)  f32 (f64)  in and out; rows may be strided
  double scale = 1.0;
  int64_t padding_id = -1;  // -1: none
};
void EmbeddingBackward(const Exec& exec, const EmbeddingBackwardArgs& args);

// NEFTune (Jain et al., 2023): uniform noise on embeddings,
//   x[t,c] += alpha / sqrt(L C) u,   u uniform in [-1, 1],  L the length of t's segment;
// tokens behind the last segment stay. Noise is no function of x: its gradient is that of x.
// u is a pure function of (seed; step, pack, element t C + c), so a resumed run draws the same:
// word e % 4 of Philox4x32-10 (kernels/core/philox.h), key = seed, counter = {low 32 bits of e / 4,
// step, pack, 0xffffff00 | next 8 bits of e / 4}: a layer and a module that no dropout has.
struct EmbeddingNoiseArgs {
  TensorView x;             // (T, C)  f64, f32 or bf16; rows may be strided  in and out
  TensorView num_segments;  // (1)     i32
  TensorView q_begin;       // (S + 1) i32: the segments' ends, as of attention
  TensorView step_pack;     // (2)     i32: step, pack
  double alpha = 0;
  uint64_t seed = 0;
};
void EmbeddingNoise(const Exec& exec, const EmbeddingNoiseArgs& args);

}  // namespace attune
