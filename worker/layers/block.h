// TransformerBlock: the one decoder block, described by a ModelConfig.
//
//   x1 = x + delta                      (delta: what the block before adds; none for the first)
//   qkv = Wqkv norm1(x1);  q, k = rope(q, k);  o = attention(q, k, v);  a = Wo o
//   x2 = x1 + a
//   g, u = Wgu norm2(x2);  delta' = Wd (silu(g) u)
//
// The residual additions are part of the next norm, so they cost no pass of their own; `delta`
// travels from block to block in one buffer. Saved for backward: x1, qkv, o, x2, g, u, the
// adapters' s and the statistics. Norm outputs and silu(g) u are rebuilt.
#pragma once

#include "worker/layers/batch.h"
#include "worker/layers/lora_linear.h"

namespace attune {

struct BlockShape {
  int64_t hidden = 0;        // C
  int64_t heads = 0;         // Hq
  int64_t kv_heads = 0;      // Hk
  int64_t head_dim = 0;      // D
  int64_t intermediate = 0;  // F
  double rms_norm_eps = 0;

  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

// What Forward leaves for Backward. All (T, ...).
struct SavedBlock {
  TensorView x1;                             // (T, C)
  TensorView rstd1;                          // (T)      f32 (f64)
  TensorView qkv;                            // (T, (Hq + 2 Hk) D), after rope
  TensorView o;                              // (T, Hq D)
  TensorView lse;                            // (Hq, T)  f32 (f64)
  TensorView x2;                             // (T, C)
  TensorView rstd2;                          // (T)
  TensorView gate_up;                        // (T, 2 F)
  TensorView s_qkv, s_o, s_gate_up, s_down;  // (T, adapters * r)
};

// Keys and values of what was generated so far, of one block.
struct KvCache {
  TensorView k;  // (capacity, Hk, D)
  TensorView v;  // (capacity, Hk, D)
};

struct TransformerBlock {
  BlockShape shape;
  TensorView attention_norm;  // (C)
  TensorView mlp_norm;        // (C)
  LoraLinear qkv, o, gate_up, down;

  // x (T, C) and delta (T, C), undefined for the first block. Returns x2; what the block adds to
  // it is left in `out` (T, C), which may be `delta`. With `cache`, keys and values of this chunk
  // are put at `cache_begin` first and attention reads the cache.
  TensorView Forward(const LayerContext& ctx, const PackBatch& batch, const TensorView& x,
                     const TensorView& delta, const TensorView& out, SavedBlock* saved,
                     const KvCache* cache = nullptr, int64_t cache_begin = 0) const;

  // dx (T, C): in the gradient of x2 + out, out the gradient of x + delta. `want_dx` is false for
  // the first block, below which nothing is trained.
  struct BackwardOptions {
    bool want_dx = true;
  };
  void Backward(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                const TensorView& dx, const BackwardOptions& options) const;

 private:
  AttentionOptions attention_options() const;
  void Attend(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
              const KvCache* cache, int64_t cache_begin) const;
  void BackwardMlp(const LayerContext& ctx, const SavedBlock& saved, const TensorView& dx) const;
  void BackwardAttention(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                         const TensorView& dx, const BackwardOptions& options) const;
};

}  // namespace attune
