// The end of a language model: final norm, projection to the vocabulary, cross entropy:
//   z = cap(logit_scale * norm(x) W^T),  cap(z) = softcap tanh(z / softcap) where there is one
// Fused and
// chunked: rows without a label are never multiplied, and no (T, V) matrix exists.
#pragma once

#include "worker/layers/batch.h"
#include "worker/layers/context.h"

namespace attune {

struct LmHead {
  // Long enough products on a CPU, little of the whole.
  static constexpr int64_t kLogitsBytes = int64_t{64} << 20;

  TensorView norm;     // (C)
  TensorView weight;   // (V, C), the embedding table where embeddings are tied
  TensorView dweight;  // (V, C) its gradient, accumulated, f32 (f64); undefined: it is frozen
  double rms_norm_eps = 0;
  double norm_weight_offset = 0;
  double logit_scale = 1;
  double logit_softcap = 0;             // 0: none
  int64_t logits_bytes = kLogitsBytes;  // of the logits that exist at once

  // Rows whose logits exist at once, for T tokens.
  int64_t ChunkRows(int64_t tokens) const;

  struct LossArgs {
    TensorView x, delta;         // (T, C); their sum, which overwrites delta, is what the last
                                 //         block gives
    TensorView loss;             // (1)  out, += sum over labels of the cross entropy, f32 (f64)
    TensorView correct;          // (1)  out, += labels that are the arg max, f32 (f64); optional
    TensorView grad_scale;       // (1)  f32 (f64): 1 / labels of the optimiser step
    TensorView dx;               // (T, C) out, gradient of x + delta, may be delta; undefined: loss
                                 //        only
    double label_smoothing = 0;  // see kernels/cross_entropy
    double z_loss = 0;
  };
  void Loss(const LayerContext& ctx, const PackBatch& batch, const LossArgs& args) const;

  // Logits (R, V) of rows [begin, begin + R) of x + delta, for generation.
  void Logits(const LayerContext& ctx, const TensorView& x, const TensorView& delta, int64_t begin,
              const TensorView& logits) const;
};

}  // namespace attune
