// Rotary position embedding, rotate-half layout (Llama, Qwen, Mistral, Gemma as Hugging Face
// stores them).
//
// RopeTable:  angle[t,i] = float(positions[t]) * inv_freq[i]             (in f32, as Hugging Face)
//             cos[t,i] = cos(angle[t,i]) * attention_scaling,  sin likewise
// Rope, for i < R/2, on every head:
//   x[t,h,i]       <- x[t,h,i] * cos[t,i]       - x[t,h,i+R/2] * sin[t,i]
//   x[t,h,i+R/2]   <- x[t,h,i+R/2] * cos[t,i]   + x[t,h,i] * sin[t,i]
// Elements R..D-1 pass through. `inverse` takes -sin: with attention_scaling that is the transpose
// of the forward, which is what the backward needs (dx = R^T dy).
// Scaled frequencies (Llama 3.1, YaRN, linear) are the caller's inv_freq and attention_scaling.
// Cost: one pass over x; the table is computed once a batch and shared by layers and heads.
#pragma once

#include <span>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct RopeTableArgs {
  TensorView positions;  // (T)       i32, any value >= 0
  TensorView inv_freq;   // (R/2)     f32
  TensorView cos;        // (T, R/2)  out, f32 (f64 for an f64 model), contiguous
  TensorView sin;        // (T, R/2)  out, dtype of cos, contiguous
  double attention_scaling = 1.0;
};
void RopeTable(const Exec& exec, const RopeTableArgs& args);

// Heads that are turned, or only copied.
struct RopeHeads {
  TensorView x;  // (T, H, D)  f64, f32 or bf16; stride(0) and stride(1) are free; in place
                 //            unless there is a y
  TensorView y;  // (T, H, D)  optional out, dtype of x, overlapping no x; strides as free
  bool turned = true;
};
constexpr int kMaxRopeHeads = 3;

struct RopeArgs {
  std::span<const RopeHeads> heads;  // 1 to kMaxRopeHeads (q, k, v), of one T, D and dtype
  TensorView cos;                    // (T, R/2)   f32 (f64 for f64)
  TensorView sin;                    // (T, R/2)
  int64_t rotary_dim = 0;            // R <= D, even
  bool inverse = false;
};
void Rope(const Exec& exec, const RopeArgs& args);

}  // namespace attune
