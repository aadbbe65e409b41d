// Everything that an MLP's backward pass does between the products with its weights, where all
// three of its layers have an adapter (kernels/gated_activation, kernels/lora):
//   dgate, dup  = as GatedActivationBackward
//   ds, db      = as LoraBackward, dy = [dgate | dup]
//   down_da    += down_da_scale down_ds^T h,   h = act(gate) up       (r, F)
//
// Hopper, bf16, r a multiple of 8 to 32, F of 16: one pass, in which gate, up and dh are read and
// dgate and dup written once, and h never is. Everywhere else it is those ops and a product, with h
// in the place of dh. The sums' order hangs on the shapes alone.
//
// Cost: one pass over 5 T F elements, and 6 r T F operations.
#pragma once

#include "kernels/gated_activation/gated_activation.h"
#include "kernels/lora/lora_backward.h"

namespace attune {

struct GatedLoraBackwardArgs {
  TensorView dh;  // (T, F)  f64, f32 or bf16; in, afterwards anything
  Activation activation = Activation::kSilu;
  // Of gate's and up's adapters; dy (T, 2F) in: [gate | up], out: [dgate | dup]. Its workspace is
  // not used.
  LoraBackwardArgs lora;
  TensorView down_ds;  // (T, >= r)  of it the first r columns
  TensorView down_da;  // (r, F)     in and out, f32 (f64)
  double down_da_scale = 1.0;
  Fp8Rows fp8;           // out, optional: of [dgate | dup]
  TensorView workspace;  // (>= GatedLoraBackwardWorkspaceBytes) u8
};

int64_t GatedLoraBackwardWorkspaceBytes(const Exec& exec, const GatedLoraBackwardArgs& args);

void GatedLoraBackward(const Exec& exec, const GatedLoraBackwardArgs& args);

}  // namespace attune
