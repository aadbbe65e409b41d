// Dropout without a stored mask:
//   y[m,n] = keep(m,n) ? x[m,n] / (1 - p) : 0         (y += with accumulate)
// keep is a pure function of (seed; step, pack, layer, module, element (first_row + m) * N + n), so
// the backward is the same op on dy, a recomputed layer draws the same mask, and a resumed run
// the same as an uninterrupted one. Bits: Philox4x32-10 (kernels/core/philox.h), key = seed,
// counter = {low 32 bits of element / 4, step, pack, layer << 16 | module << 8 | next 8 bits of
// element / 4}; word element % 4 keeps its element where it is >= p * 2^32.
// step and pack are device data: a captured graph replays with new ones.
// Cost: one pass; a Philox block (10 rounds) per four elements.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct DropoutArgs {
  TensorView x;          // (M, N)  f64, f32 or bf16; rows may be strided
  TensorView y;          // (M, N)  out, dtype of x; may be x
  TensorView step_pack;  // (2)     i32: step, pack
  double p = 0.0;        // probability of a zero, [0, 1)
  uint64_t seed = 0;
  uint32_t layer = 0;     // < 2^16
  uint32_t module = 0;    // < 2^8
  int64_t first_row = 0;  // of x in the whole pack, where x is a chunk of it
  bool accumulate = false;
};
void Dropout(const Exec& exec, const DropoutArgs& args);

}  // namespace attune
