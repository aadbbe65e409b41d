// TransformerBlock: the one decoder block, described by a ModelConfig.
//
//   x1 = x + delta                      (delta: what the block before adds; none for the first)
//   qkv = Wqkv norm1(x1);  q, k = rope(q, k);  o = attention(q, k, v);  a = Wo o
//   x2 = x1 + a
//   g, u = Wgu norm2(x2);  delta' = Wd (act(g) u)
// and where the model has them: rope(norm(q)) and rope(norm(k)), per head; norm(a) and norm(delta')
// in the place of a and delta' (post-norms); biases.
//
// The residual additions are part of the next norm, so they cost no pass of their own; `delta`
// travels from block to block in one buffer. Saved for backward: x1, q, k, v (before their norm,
// where they have one), o, x2, g, u, a and delta' before post-norms, the adapters' s and the
// statistics; or only x1 or x1 and o, from which Rebuild makes the rest. Norm outputs and act(g) u
// are always rebuilt.
//
// Everything between attention's output and delta' is done row by row, so the MLP may run over
// tiles of the rows, forward and backward: then no (T, F) matrix exists but a saved one. Rows come
// out the same; the adapters' gradients are summed tile by tile.
#pragma once

#include <algorithm>

#include "kernels/lora/gated_lora_backward.h"
#include "kernels/lora/gated_lora_forward.h"
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
  double norm_weight_offset = 0;
  Activation activation = Activation::kSilu;
  AttentionOptions attention;
  int rope = 0;            // of the batch's rotary tables
  int64_t rotary_dim = 0;  // R; 0: positions are not told
  bool qk_norm = false;
  bool post_norms = false;

  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

// What Forward leaves for Backward, all (T, ...). In groups, each one piece of memory, so that the
// memory policy can treat them apart. Each can be made again from those before it.
struct SavedBlock {
  // kInput: and what only the product of `down` gives, which is not done again
  TensorView x1;            // (T, C)
  TensorView s_down;        // (T, E)
  TensorView mlp_out;       // (T, C)  delta' before its norm; post_norms
  TensorView mlp_out_rstd;  // (T)     f32 (f64); post_norms
  // kAttention
  TensorView o_s;  // (T, Hq D + E)
  TensorView lse;  // (T, Hq)  f32 (f64)
  // kProjections
  TensorView q;                   // (T, Hq D)  as attention takes it; with qk_norm if heads_saved
  TensorView k;                   // (T, Hk D)  likewise
  TensorView v;                   // (T, Hk D)  without qk_norm
  TensorView q_rstd, k_rstd;      // (T, H)  f32 (f64)  with qk_norm if heads_saved
  TensorView qkv;                 // (T, (Hq + 2 Hk) D)  before norm and rope; with qk_norm
  TensorView x2;                  // (T, C)
  TensorView rstd1, rstd2;        // (T)     f32 (f64)
  TensorView attention_out;       // (T, C)  a before its norm; post_norms
  TensorView attention_out_rstd;  // (T)     post_norms
  TensorView s_qkv;               // (T, E)
  // kGateUp: undefined where they are rebuilt
  TensorView gate_up;    // (T, 2 F + E)
  TensorView s_gate_up;  // (T, E)
};
enum class SavedGroup : uint8_t { kInput, kAttention, kProjections, kGateUp };
// Those before gate and up.
constexpr SavedGroup kStreamGroups[] = {SavedGroup::kInput, SavedGroup::kAttention,
                                        SavedGroup::kProjections};

// What of the stream groups Backward finds saved; the rest is rebuilt.
enum class StreamSaved : uint8_t { kAll, kInputAndAttention, kInput };
inline bool IsSaved(StreamSaved saved, SavedGroup group) {
  return static_cast<int>(group) + static_cast<int>(saved) < 3;
}

// What attention reads, each (T, H, D), and the statistics of the norms of heads.
struct QkvHeads {
  TensorView q, k, v;
  TensorView q_rstd, k_rstd;  // (T, H) f32 (f64), with qk_norm
};

// Keys and values of what was generated so far, of one block.
struct KvCache {
  TensorView k;  // (capacity, Hk, D)
  TensorView v;  // (capacity, Hk, D)
};

struct TransformerBlock {
  BlockShape shape;
  TensorView attention_norm;                      // (C)
  TensorView mlp_norm;                            // (C)
  TensorView post_attention_norm, post_mlp_norm;  // (C)  with post_norms
  TensorView q_norm, k_norm;                      // (D)  with qk_norm
  LoraLinear qkv, o, gate_up, down;
  std::array<LoraLinear*, 4> linears() { return {&qkv, &o, &gate_up, &down}; }
  std::array<const LoraLinear*, 4> linears() const { return {&qkv, &o, &gate_up, &down}; }
  int64_t mlp_tile = 0;      // rows of the MLP's tiles; 0: all at once
  bool heads_saved = false;  // with qk_norm: what attention takes, else Backward makes it again

  // Bytes of one group of T tokens, and the views of `saved` in such a piece of memory (u8; null
  // data on the plan device).
  int64_t SavedBytes(const LayerContext& ctx, int64_t tokens, SavedGroup group) const;
  void PlaceSaved(const LayerContext& ctx, int64_t tokens, SavedGroup group,
                  const TensorView& memory, SavedBlock* saved) const;

  // x (T, C) and delta (T, C), undefined for the first block. Returns x2; what the block adds to
  // it is left in `out` (T, C), which may be `delta`. `saved` has its places, where x may be x2;
  // without delta, x1 becomes x. With `cache`, keys and values of this chunk are put at
  // `cache_begin` first and attention reads the cache.
  TensorView Forward(const LayerContext& ctx, const PackBatch& batch, const TensorView& x,
                     const TensorView& delta, const TensorView& out, SavedBlock* saved,
                     const KvCache* cache = nullptr, int64_t cache_begin = 0) const;

  // Fills the stream groups that are not among `kept`, whose places may hold anything, as Forward
  // had them, to the bit.
  void Rebuild(const LayerContext& ctx, const PackBatch& batch, StreamSaved kept,
               const SavedBlock& saved) const;

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
  TensorView SavedO(const SavedBlock& saved) const { return saved.o_s.Slice(1, 0, shape.q_size()); }
  // Where attention's q, k and v are saved, or with qk_norm if they are not, scratch for q, k and
  // their statistics; v is in the rows then.
  QkvHeads PlaceHeads(const LayerContext& ctx, const SavedBlock& saved) const;
  // Norm, where there is one, and rope: from the rows of the fused product into `to`.
  void PositionHeads(const LayerContext& ctx, const PackBatch& batch, const TensorView& rows,
                     const QkvHeads& to) const;
  // The gradient of that: from d_to, with what PositionHeads had and left, into rows.
  void PositionHeadsBackward(const LayerContext& ctx, const PackBatch& batch, const QkvHeads& d_to,
                             const TensorView& rows, const QkvHeads& to,
                             const TensorView& d_rows) const;
  // a, behind its norm if it has one.
  void ForwardOutput(const LayerContext& ctx, const SavedBlock& saved, const TensorView& a) const;
  QkvHeads ForwardHeads(const LayerContext& ctx, const PackBatch& batch, const TensorView& x,
                        const TensorView& delta, const SavedBlock& saved) const;
  void Attend(const LayerContext& ctx, const PackBatch& batch, const QkvHeads& heads,
              const SavedBlock& saved, const KvCache* cache, int64_t cache_begin) const;
  void ForwardMlp(const LayerContext& ctx, const TensorView& out, const SavedBlock& saved) const;
  void ForwardMlpTile(const LayerContext& ctx, const TensorView& out,
                      const SavedBlock& saved) const;
  // From [gate | up] to h in [h | .], and y = the product of `down`, which puts s behind h.
  void ForwardGate(const LayerContext& ctx, const TensorView& rows, const TensorView& h,
                   const TensorView& y) const;
  // A product of the MLP.
  struct Use {
    const LoraLinear* linear;
    Direction direction;
  };
  static constexpr size_t kMaxUses = 3;
  // Calls f(ctx, begin, end) for the tiles of T rows, with a context for each. The weights of
  // `uses` stay expanded over the tiles.
  template <typename F>
  void ForEachTile(const LayerContext& ctx, int64_t tokens, std::initializer_list<Use> uses,
                   const F& f) const;
  // y = norm(x) for a norm of the stream or, without delta, behind attention or MLP; and its codes,
  // if wanted.
  void Normalise(const LayerContext& ctx, const TensorView& x, const TensorView& delta,
                 const TensorView& sum, const TensorView& w, const TensorView& y,
                 const TensorView& rstd, const Fp8Rows& codes = {}) const;
  // y as Normalise gave it, from its sum.
  void NormaliseAgain(const LayerContext& ctx, const TensorView& x, const TensorView& w,
                      const TensorView& rstd, const TensorView& y, const Fp8Rows& codes = {}) const;
  LoraLinear::NormedInput Normed(const TensorView& x, const TensorView& w,
                                 const TensorView& rstd) const {
    return {.stream = x, .w = w, .rstd = rstd, .weight_offset = shape.norm_weight_offset};
  }
  void NormaliseBackward(const LayerContext& ctx, const TensorView& dy, const TensorView& x,
                         const TensorView& w, const TensorView& rstd, const TensorView& dresidual,
                         const TensorView& dx) const;
  // The gradient of what attention or the MLP gave, before its norm if there is one: [dy|.] with
  // `columns` columns, from dx, the gradient of the stream.
  TensorView OutputGradient(const LayerContext& ctx, const TensorView& dx, const TensorView& out,
                            const TensorView& w, const TensorView& rstd, int64_t columns) const;
  // gate_up and s_gate_up: saved, or in scratch.
  void RebuildGateUp(const LayerContext& ctx, SavedBlock* saved) const;
  void BackwardMlp(const LayerContext& ctx, const SavedBlock& saved, const TensorView& dx) const;
  void BackwardMlpTile(const LayerContext& ctx, SavedBlock saved, const TensorView& dx) const;
  // From dh, the gradient of act(g) u, the gradients of g and u in their place, and what `down`
  // takes of its input. If the gate's backward pass is one op with the adapters on both sides of
  // it, also what gate_up's adapters take.
  void BackwardGate(const LayerContext& ctx, const SavedBlock& saved, const TensorView& dh,
                    const TensorView& dy, const Fp8Rows& codes) const;
  bool GateIsOneOp(const LayerContext& ctx) const {
    return gate_up.adapters.size() == 2 && gate_up.IsPlain(ctx) && down.IsPlain(ctx);
  }
  void BackwardAttention(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                         const TensorView& dx, const BackwardOptions& options) const;
  AttentionBackwardArgs AttentionBackwardOf(const PackBatch& batch, const SavedBlock& saved,
                                            const QkvHeads& x, const TensorView& d_o,
                                            const QkvHeads& dx) const;
  int64_t AttentionBackwardBytes(const LayerContext& ctx, const PackBatch& batch,
                                 const SavedBlock& saved) const;
  // Gradients of q, k and v, before norm and rope, into the rows of qkv. These may lie in
  // `workspace`, attention's.
  void BackwardHeads(const LayerContext& ctx, const PackBatch& batch, const SavedBlock& saved,
                     const TensorView& d_o, const TensorView& workspace,
                     const TensorView& dqkv) const;
};

}  // namespace attune
