// TransformerBlock: the one decoder block, described by a ModelConfig.
//
//   x1 = x + delta                      (delta: what the block before adds; none for the first)
//   qkv = Wqkv norm1(x1);  q, k = rope(q, k);  o = attention(q, k, v);  a = Wo o
//   x2 = x1 + a
//   g, u = Wgu norm2(x2);  delta' = Wd (silu(g) u)
//
// The residual additions are part of the next norm, so they cost no pass of their own; `delta`
// travels from block to block in one buffer. Saved for backward: x1, q, k, v, o, x2, g, u, the
// adapters' s and the statistics. Norm outputs and silu(g) u are rebuilt.
#pragma once

#include <algorithm>

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

// What Forward leaves for Backward, all (T, ...). In three groups, each one piece of memory, so
// that the memory policy can treat them apart:
//   stream   x1, q, k, v, [o|s], x2: may travel to the host
//   gate_up  [gate|up|.]: may travel, or be rebuilt from x2
//   small    the statistics and the other s: stay
struct SavedBlock {
  TensorView x1;                        // (T, C)
  TensorView q;                         // (T, Hq D)  after rope
  TensorView k, v;                      // (T, Hk D)
  TensorView o_s;                       // (T, Hq D + E)
  TensorView x2;                        // (T, C)
  TensorView gate_up;                   // (T, 2 F + E), undefined where it is rebuilt
  TensorView rstd1, rstd2;              // (T)      f32 (f64)
  TensorView lse;                       // (T, Hq)  f32 (f64)
  TensorView s_qkv, s_gate_up, s_down;  // (T, E)
};
enum class SavedGroup : uint8_t { kStream, kGateUp, kSmall };

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

  // Bytes of one group of T tokens, and the views of `saved` in such a piece of memory (u8; null
  // data on the plan device).
  int64_t SavedBytes(const LayerContext& ctx, int64_t tokens, SavedGroup group) const;
  void PlaceSaved(const LayerContext& ctx, int64_t tokens, SavedGroup group,
                  const TensorView& memory, SavedBlock* saved) const;

  // x (T, C) and delta (T, C), undefined for the first block. Returns x2; what the block adds to
  // it is left in `out` (T, C), which may be `delta`. `saved` has its places; without delta, x1
  // becomes x. With `cache`, keys and values of this chunk are put at `cache_begin` first and
  // attention reads the cache.
  TensorView Forward(const LayerContext& ctx, const PackBatch& batch, const TensorView& x,
                     const TensorView& delta, const TensorView& out, SavedBlock* saved,
                     const KvCache* cache = nullptr, int64_t cache_begin = 0) const;

  // Columns behind the C of dx that Backward needs as room.
  int64_t dx_extension() const { return std::max(o.extension(), down.extension()); }
  // [dx|.] (T, C + dx_extension()): in the gradient of x2 + out, out the gradient of x + delta.
  // `want_dx` is false for the first block, below which nothing is trained. Overwrites gate_up.
  struct BackwardOptions {
    bool want_dx = true;
  };
  void Backward(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                const TensorView& dx, const BackwardOptions& options) const;

 private:
  AttentionOptions attention_options() const;
  TensorView SavedO(const SavedBlock& saved) const { return saved.o_s.Slice(1, 0, shape.q_size()); }
  void ForwardAttention(const LayerContext& ctx, const PackBatch& batch, const TensorView& x,
                        const TensorView& delta, const SavedBlock& saved) const;
  void Attend(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
              const KvCache* cache, int64_t cache_begin) const;
  void ForwardMlp(const LayerContext& ctx, const TensorView& out, const SavedBlock& saved) const;
  TensorView RebuildGateUp(const LayerContext& ctx, const SavedBlock& saved) const;
  void BackwardMlp(const LayerContext& ctx, const SavedBlock& saved, const TensorView& dx) const;
  void BackwardAttention(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                         const TensorView& dx, const BackwardOptions& options) const;
  // Gradients of q, k and v, before rope, into the rows of qkv.
  void BackwardHeads(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                     const TensorView& d_o, const TensorView& dqkv) const;
};

}  // namespace attune
