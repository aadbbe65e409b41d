// A frozen linear layer with LoRA (Hu et al., 2021) on some or all of its stacked matrices:
//   y_p = c (x W_p^T + b_p + scale * dropout_p(x) A_p^T B_p^T),   scale = alpha / r
// for every part p; parts without an adapter have the first terms only. W and b are frozen, so
// there is no dW and no db. Most models have no b, and c = output_scale is 1 (Granite: not).
//
// With DoRA (Liu et al., 2024) a part with an adapter gives, as PEFT has it,
//   y_p = c (x W_p^T + b_p + (g_p - 1) o (x' W_p^T) + g_p o (scale * x' A_p^T B_p^T)),
//   x' = dropout_p(x),  g_p = m_p / ||W_p + scale * B_p A_p||  (the lengths of rows, no gradient)
// which without dropout is c (g_p o (x (W_p + scale * B_p A_p)^T) + b_p). Products are separate
// then. What the gradient of m needs of the forward pass is computed again: one more product with
// W.
//
// Rows are extended by E = extension() columns: behind x stands s = dropout(x) A^T, behind dy
// stands ds = scale * dy B. So base and adapter can be one product ([x|s] [W|scale B]^T and
// [dy|ds] [W;A]; ctx.fused_lora, without dropout), or separate small ones. Equal results up to
// rounding, the same rows either way. Products with W may be of 8-bit floats (FrozenMatrix,
// kernels/fp8): rows are quantised where they are made, if the op that makes them can, else just
// before, and the adapter rides along.
#pragma once

#include <array>
#include <vector>

#include "kernels/fp8/fp8.h"
#include "kernels/lora/lora_backward.h"
#include "worker/layers/frozen_matrix.h"

namespace attune {

// Columns [begin, begin + count) of (T, N).
inline TensorView Columns(const TensorView& x, int64_t begin, int64_t count) {
  return x.Slice(1, begin, begin + count);
}

// The adapter of one part. Views into the AdapterSet's flat buffers.
struct LoraPart {
  int part = 0;        // of the FrozenMatrix
  uint32_t layer = 0;  // names of the dropout stream
  uint32_t module = 0;
  TensorView a;   // (r, K)    in the dtype of products
  TensorView b;   // (N_p, r)
  TensorView da;  // (r, K)    accumulated, f32 (f64)
  TensorView db;  // (N_p, r)
  // DoRA's, else undefined; f32 (f64).
  TensorView magnitude;   // (N_p)  m
  TensorView dmagnitude;  // (N_p)  accumulated
  TensorView norm;        // (N_p)  ||W_p + scale * B_p A_p||, and
  TensorView factor;      // (N_p)  m / norm, as of the last Refresh
};

struct LoraLinear;

// The expansion of a weight, made once for all products with a context: those of the tiles of a
// pack. A list; LayerContext has the last.
struct HeldExpansion {
  const LoraLinear* linear = nullptr;
  Direction direction = Direction::kForward;
  TensorView expansion;
  const HeldExpansion* outer = nullptr;
};

struct LoraLinear {
  const FrozenMatrix* w = nullptr;
  std::vector<LoraPart> adapters;
  TensorView a;   // (parts * r, K): a of all parts, which lie one behind the other
  TensorView da;  // (parts * r, K): likewise
  int64_t r = 0;
  double scale = 0;
  double output_scale = 1;
  TensorView bias;  // (N) in the dtype of products, optional
  // With products of 8 bits, the adapter's room in each direction, as of the model's last refresh.
  TensorView room;  // (2) f32

  // E; 0 without adapters.
  int64_t extension() const;
  // Those of the E that are used: parts * r.
  int64_t columns() const { return static_cast<int64_t>(adapters.size()) * r; }
  // The adapters as the ops on expansions take them; as many as there are.
  std::array<LoraExtendPart, kMaxLoraParts> ExtendParts() const;

  // Scratch for the codes of M rows of x, or of dy, to be filled by the op that makes these rows.
  // Undefined where products are not of 8 bits, and with dropout, where it would add to the peak.
  Fp8Rows NewCodes(const LayerContext& ctx, Direction direction, int64_t rows) const;

  // [x | .] (M, K + E) -> y (M, N), assigned; s is put behind x, unless it is there already.
  // `codes`: those of x, if there are.
  void Forward(const LayerContext& ctx, const TensorView& x_s, const TensorView& y,
               const Fp8Rows& codes = {}, bool has_s = false) const;
  // [dy | .] (M, N + E) -> dx (M, K), assigned, unless undefined; ds is put behind dy. Accumulates
  // the gradient of B. s (M, E) as Forward had it. `codes`: those of dy, if there are.
  void Backward(const LayerContext& ctx, const TensorView& dy_ds, const TensorView& s,
                const TensorView& dx, const Fp8Rows& codes = {}) const;
  // The two halves of Backward, for an op that does the first along the way: what the adapters take
  // of dy, by way of `parts`; and dx, with ds in its place.
  LoraBackwardArgs AdapterBackward(const TensorView& dy, const TensorView& s, const TensorView& ds,
                                   LoraBackwardPart (&parts)[kMaxLoraParts]) const;
  void BackwardInput(const LayerContext& ctx, const TensorView& dy_ds, const TensorView& dx,
                     const Fp8Rows& codes = {}) const;
  // True if all parts have adapters whose gradients are those two and ds^T x: no dropout, no DoRA.
  bool IsPlain(const LayerContext& ctx) const;
  // What takes x (M, K) as Forward had it, behind Backward: accumulates the gradient of A, and of
  // DoRA's magnitudes.
  void BackwardWithInput(const LayerContext& ctx, const TensorView& dy_ds, const TensorView& x,
                         const TensorView& s) const;

  // The same where x = rstd o stream o (w + weight_offset), a norm's output.
  struct NormedInput {
    TensorView stream;  // (M, K)
    TensorView w;       // (K)
    TensorView rstd;    // (M)
    double weight_offset = 0;
  };
  void BackwardWithInput(const LayerContext& ctx, const TensorView& dy_ds, const NormedInput& x,
                         const TensorView& s) const;

  // Expands the weight for all products with *ctx from now on, in scratch of the caller's
  // ArenaScope; *held outlives their use. Nothing where there is a lasting expansion, or the
  // prefetcher, which expands beside the products.
  void Hold(Direction direction, HeldExpansion* held, LayerContext* ctx) const;

  // W and, where base and adapter are one product, the adapter, into memory for an expansion.
  void FillExpansion(const LayerContext& ctx, Direction direction,
                     const TensorView& expansion) const;
  // What is derived from the adapter: its share of lasting expansions in 8 bits, and DoRA's
  // factors. After every change of it, and behind the making of its room.
  void Refresh(const LayerContext& ctx) const;
  // Whether there is a lasting expansion for both directions, whose share of the adapter is to be
  // written then.
  bool Extends(const LayerContext& ctx) const;
  // DoRA's magnitudes as they start: the lengths of W's rows.
  void ResetMagnitudes(const LayerContext& ctx) const;

 private:
  // y without the bias; s is put behind x first, unless it is there.
  void Multiply(const LayerContext& ctx, const TensorView& x_s, const TensorView& y,
                const Fp8Rows& codes, bool has_s) const;
  // dx += ds A, through the mask of dropout.
  void AddAdapterInputGradient(const LayerContext& ctx, const TensorView& ds,
                               const TensorView& dx) const;
  bool IsDora() const { return !adapters.empty() && adapters[0].magnitude.defined(); }
  bool Fused(const LayerContext& ctx) const;
  // s = x A^T; columns behind those that are used are zero.
  void MultiplyA(const LayerContext& ctx, const TensorView& x, const TensorView& s) const;
  // ds = scale * dy B, and accumulates the gradient of B.
  void BackwardB(const LayerContext& ctx, const TensorView& dy, const TensorView& s,
                 const TensorView& ds) const;
  // y = output_scale * x W^T, or backward x W, in 8 bits. The last e columns of x are the
  // adapter's; `codes`, if there are, are those of the others.
  void MultiplyFp8(const LayerContext& ctx, Direction direction, const TensorView& x, int64_t e,
                   const Fp8Rows& codes, const TensorView& y) const;
  TensorView RoomOf(Direction direction) const;
  // Memory for the codes of rows with e columns of the adapter's.
  Fp8Rows CodesScratch(const LayerContext& ctx, Direction direction, int64_t rows, int64_t e) const;
  // W_p of an expansion.
  TensorView RowsOf(const LoraPart& adapter, const TensorView& expansion) const;
  // Adds to y_p what the adapter's dropout lets through.
  void AddDroppedDora(const LayerContext& ctx, const LoraPart& adapter, const TensorView& x,
                      const TensorView& s_p, const TensorView& w_p, const TensorView& y_p) const;
  void BackwardDora(const LayerContext& ctx, const TensorView& dy_ds, const TensorView& s,
                    const TensorView& dx) const;
  // Accumulates the gradients of DoRA's magnitudes.
  void BackwardMagnitudes(const LayerContext& ctx, const TensorView& dy, const TensorView& x,
                          const TensorView& s) const;
  // Lengths of the rows of W_p, and of scale * B_p A_p with them, if wanted; factors too.
  void MeasureRows(const LayerContext& ctx, const LoraPart& adapter, const TensorView& expansion,
                   bool with_adapter) const;
  // The expansion with W and, if `Fused`, the adapter; given back when its products are in the
  // stream.
  TensorView Expand(const LayerContext& ctx, Direction direction) const;
  void GiveBack(const LayerContext& ctx) const;
  const HeldExpansion* Held(const LayerContext& ctx, Direction direction) const;
  void Extend(const LayerContext& ctx, Direction direction, const TensorView& expansion) const;
};

}  // namespace attune
