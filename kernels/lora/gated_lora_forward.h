// The gate of an MLP and what the adapter behind it takes of h:
//   h = act(gate) up  (kernels/gated_activation),   s = h A^T   (T, r); columns behind it are zero
//
// CUDA, bf16, r a multiple of 8 to 32, F of 16: one pass over gate and up. Everywhere else it is
// the op and a product. Cost: one pass over 3 T F elements, and 2 r T F operations.
#pragma once

#include "kernels/gated_activation/gated_activation.h"

namespace attune {

struct GatedLoraForwardArgs {
  TensorView rows;  // (T, 2F)   [gate | up]; f64, f32 or bf16, rows may be strided, here and below
  TensorView h;     // (T, F)    out; may be gate
  TensorView a;     // (r, F)    contiguous
  TensorView s;     // (T, >= r) out
  Activation activation = Activation::kSilu;
  TensorView workspace;  // (>= GatedLoraForwardWorkspaceBytes) u8
};

int64_t GatedLoraForwardWorkspaceBytes(const Exec& exec, const GatedLoraForwardArgs& args);

void GatedLoraForward(const Exec& exec, const GatedLoraForwardArgs& args);

}  // namespace attune
