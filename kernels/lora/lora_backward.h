// What the adapters of a linear layer take from the gradient of its output: for every part p
//   ds_p  = scale dy_p B_p              (T, r)
//   db_p += db_scale dy_p^T s_p         (N_p, r)
//
// Sums are in f32 (f64 for f64) in a fixed order; ds is rounded once. ds may lie behind dy in the
// same rows; otherwise outputs overlap nothing.
//
// Hopper, bf16, r a multiple of 8 to 32 and dy_p, s and b in multiples of 16 bytes: dy is read
// once, by one kernel for both products of all parts. Everywhere else they are MatMul's, two per
// part, and dy is read twice. The workspace is for either; where the one pass would want more than
// 96 MiB for its partial sums it takes some of the rows at a time.
//
// Cost: 4 T N r operations, N the sum of N_p.
#pragma once

#include <span>

#include "kernels/lora/lora.h"

namespace attune {

struct LoraBackwardPart {
  TensorView b;              // (N_p, r)  f64, f32 or bf16
  TensorView db;             // (N_p, r)  in and out, f32 (f64)
  int64_t column_begin = 0;  // of dy_p in dy
};
struct LoraBackwardArgs {
  std::span<const LoraBackwardPart> parts;  // 1 to kMaxLoraParts
  TensorView dy;                            // (T, N)  dtype of b
  TensorView s;                             // (T, >= parts r)  s_p in columns [p r, (p + 1) r)
  TensorView ds;                            // (T, >= parts r)  out, like s; columns behind are zero
  double scale = 1.0;
  double db_scale = 1.0;
  TensorView workspace;  // (>= LoraBackwardWorkspaceBytes) u8
};

int64_t LoraBackwardWorkspaceBytes(const Exec& exec, const LoraBackwardArgs& args);

void LoraBackward(const Exec& exec, const LoraBackwardArgs& args);

}  // namespace attune
