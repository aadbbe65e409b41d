// PackBatch: one pack of documents on the device, T tokens wide whatever it holds. Everything
// that varies is device data, so one sequence of ops (and one captured graph) serves every pack.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/core/tensor.h"

namespace attune {

// Angles of one rotary embedding; a model has one or two (Gemma 3).
constexpr int kMaxRopes = 2;
struct RotaryTable {
  TensorView cos, sin;  // (T, R/2) f32 (f64)
};

struct PackBatch {
  int64_t tokens = 0;    // T
  TensorView ids;        // (T)      i32
  TensorView positions;  // (T)      i32, from 0 in each document
  RotaryTable rotary[kMaxRopes];
  AttentionSegments segments;
  TensorView label_rows;   // (T)      i32, rows with a label first, then -1
  TensorView labels;       // (T)      i32, next token of label_rows[i], then -1
  int64_t num_labels = 0;  // host copy: bounds the work of the head, not its memory
};

}  // namespace attune
