// A frozen linear layer with LoRA (Hu et al., 2021) on some or all of its stacked matrices:
//   y_p = x W_p^T + scale * dropout_p(x) A_p^T B_p^T,   scale = alpha / r
// for every part p; parts without an adapter have the first term only. W is frozen, so there is
// no dW. s = dropout(x) A^T is saved: it is r wide.
//
// This is the lowering as separate small products; it holds with dropout too.
#pragma once

#include <vector>

#include "worker/layers/frozen_matrix.h"

namespace attune {

// The adapter of one part. Views into the AdapterSet's flat buffers.
struct LoraPart {
  int part = 0;        // of the FrozenMatrix
  uint32_t layer = 0;  // names of the dropout stream
  uint32_t module = 0;
  TensorView a;   // (r, K)    in the dtype of products
  TensorView b;   // (N_p, r)
  TensorView da;  // (r, K)    accumulated, f32 (f64)
  TensorView db;  // (N_p, r)
};

struct LoraLinear {
  const FrozenMatrix* w = nullptr;
  std::vector<LoraPart> adapters;
  int64_t r = 0;
  double scale = 0;

  int64_t saved_columns() const { return r * static_cast<int64_t>(adapters.size()); }

  // x (M, K) -> y (M, N), assigned; s (M, saved_columns) out, undefined if there is no adapter.
  void Forward(const LayerContext& ctx, const TensorView& x, const TensorView& y,
               const TensorView& s) const;

  // dy (M, N), x and s as Forward had them -> dx (M, K), assigned, unless undefined; parameter
  // gradients accumulate.
  void Backward(const LayerContext& ctx, const TensorView& dy, const TensorView& x,
                const TensorView& s, const TensorView& dx) const;
};

}  // namespace attune
