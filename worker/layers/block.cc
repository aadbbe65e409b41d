#include "worker/layers/block.h"

#include <cmath>

#include "kernels/elementwise/elementwise.h"
#include "kernels/gated_activation/gated_activation.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"

namespace attune {
namespace {

// Columns [begin, begin + heads * head_dim) of (T, N) as (T, heads, head_dim).
TensorView Heads(const TensorView& x, int64_t begin, int64_t heads, int64_t head_dim) {
  TensorView out = Columns(x, begin, heads * head_dim);
  out.rank = 3;
  out.shape[1] = heads;
  out.shape[2] = head_dim;
  out.strides[1] = head_dim;
  out.strides[2] = 1;
  return out;
}

struct Qkv {
  TensorView q, k, v;  // (T, H, D)
};

// The heads in rows of the fused product (T, >= (Hq + 2 Hk) D).
Qkv Split(const TensorView& qkv, const BlockShape& shape) {
  const int64_t D = shape.head_dim;
  return {Heads(qkv, 0, shape.heads, D), Heads(qkv, shape.q_size(), shape.kv_heads, D),
          Heads(qkv, shape.q_size() + shape.kv_size(), shape.kv_heads, D)};
}

// The heads in buffers of their own.
Qkv HeadsOf(const TensorView& q, const TensorView& k, const TensorView& v,
            const BlockShape& shape) {
  const int64_t D = shape.head_dim;
  return {Heads(q, 0, shape.heads, D), Heads(k, 0, shape.kv_heads, D),
          Heads(v, 0, shape.kv_heads, D)};
}

// to = rope(from), v as it is.
void MoveHeads(const LayerContext& ctx, const PackBatch& batch, const Qkv& from, const Qkv& to,
               bool inverse) {
  const auto move = [&](const TensorView& x, const TensorView& y, int64_t rotary_dim) {
    const int64_t half = rotary_dim / 2;
    Rope(ctx.exec, {.x = x,
                    .y = y,
                    .cos = Columns(batch.cos, 0, half),
                    .sin = Columns(batch.sin, 0, half),
                    .rotary_dim = rotary_dim,
                    .inverse = inverse});
  };
  move(from.q, to.q, from.q.dim(2));
  move(from.k, to.k, from.k.dim(2));
  move(from.v, to.v, 0);
}

// (T, N) rows of a cache as (T, H * D), to copy into.
void CopyHeads(const LayerContext& ctx, const TensorView& x, const TensorView& y) {
  for (int64_t h = 0; h < x.dim(1); ++h) {
    TensorView from = x.Slice(1, h, h + 1), to = y.Slice(1, h, h + 1);
    for (TensorView* view : {&from, &to}) {
      view->rank = 2;
      view->shape[1] = view->shape[2];
      view->strides[1] = 1;
    }
    Copy(ctx.exec, {.x = from, .y = to});
  }
}

// Keeps what a linear layer put behind its rows. Nothing where there is no adapter.
void KeepS(const LayerContext& ctx, const TensorView& x_s, const TensorView& s) {
  if (s.dim(1) == 0) return;
  Copy(ctx.exec, {.x = Columns(x_s, x_s.dim(1) - s.dim(1), s.dim(1)), .y = s});
}

// dx, the gradient that reaches x past its norm, plus what comes through the norm's output.
void AddNormGradient(const LayerContext& ctx, const TensorView& dy, const TensorView& x,
                     const TensorView& rstd, const TensorView& w, const TensorView& dx) {
  RmsNormBackwardArgs norm = {.dy = dy, .x = x, .rstd = rstd, .w = w, .dresidual = dx, .dx = dx};
  norm.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       RmsNormBackwardWorkspaceBytes(ctx.exec, norm));
  RmsNormBackward(ctx.exec, norm);
}

// Views one behind the other in a piece of memory; without memory it only counts.
class Carver {
 public:
  explicit Carver(const TensorView& memory) : memory_(memory) {}
  TensorView Take(DType dtype, std::initializer_list<int64_t> shape) {
    TensorView out(nullptr, dtype, shape);
    const int64_t begin = bytes_;
    bytes_ += (out.bytes() + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
    if (memory_.data != nullptr) {
      CHECK(bytes_ <= memory_.bytes());
      out.data = static_cast<char*>(memory_.data) + begin;
    }
    return out;
  }
  int64_t bytes() const { return bytes_; }

 private:
  TensorView memory_;
  int64_t bytes_ = 0;
};

int64_t Carve(const TransformerBlock& block, const LayerContext& ctx, int64_t T, SavedGroup group,
              const TensorView& memory, SavedBlock* saved) {
  const BlockShape& shape = block.shape;
  Carver carver(memory);
  const auto take = [&](TensorView* view, int64_t columns) {
    *view = carver.Take(ctx.dtype, {T, columns});
  };
  switch (group) {
    case SavedGroup::kStream:
      take(&saved->x1, shape.hidden);
      take(&saved->q, shape.q_size());
      take(&saved->k, shape.kv_size());
      take(&saved->v, shape.kv_size());
      take(&saved->o_s, shape.q_size() + block.o.extension());
      take(&saved->x2, shape.hidden);
      break;
    case SavedGroup::kGateUp:
      take(&saved->gate_up, 2 * shape.intermediate + block.gate_up.extension());
      break;
    case SavedGroup::kSmall:
      saved->rstd1 = carver.Take(ctx.accumulator(), {T});
      saved->rstd2 = carver.Take(ctx.accumulator(), {T});
      saved->lse = carver.Take(ctx.accumulator(), {T, shape.heads});
      take(&saved->s_qkv, block.qkv.extension());
      take(&saved->s_gate_up, block.gate_up.extension());
      take(&saved->s_down, block.down.extension());
      break;
  }
  return carver.bytes();
}

}  // namespace

int64_t TransformerBlock::SavedBytes(const LayerContext& ctx, int64_t tokens,
                                     SavedGroup group) const {
  SavedBlock ignored;
  return Carve(*this, ctx, tokens, group, TensorView(), &ignored);
}

void TransformerBlock::PlaceSaved(const LayerContext& ctx, int64_t tokens, SavedGroup group,
                                  const TensorView& memory, SavedBlock* saved) const {
  Carve(*this, ctx, tokens, group, memory, saved);
}

AttentionOptions TransformerBlock::attention_options() const {
  return {.scale = 1.0 / std::sqrt(static_cast<double>(shape.head_dim))};
}

void TransformerBlock::Attend(const LayerContext& ctx, const PackBatch& batch,
                              const SavedBlock& saved, const KvCache* cache,
                              int64_t cache_begin) const {
  const Qkv x = HeadsOf(saved.q, saved.k, saved.v, shape);
  AttentionForwardArgs args = {.q = x.q,
                               .k = x.k,
                               .v = x.v,
                               .o = Heads(saved.o_s, 0, shape.heads, shape.head_dim),
                               .lse = saved.lse,
                               .segments = batch.segments,
                               .options = attention_options()};
  if (cache != nullptr) {
    const int64_t end = cache_begin + batch.tokens;
    CopyHeads(ctx, x.k, cache->k.Slice(0, cache_begin, end));
    CopyHeads(ctx, x.v, cache->v.Slice(0, cache_begin, end));
    args.k = cache->k;
    args.v = cache->v;
  }
  ArenaScope scope(ctx.arena);
  args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       AttentionForwardWorkspaceBytes(ctx.exec, args));
  AttentionForward(ctx.exec, args);
}

TensorView TransformerBlock::Forward(const LayerContext& ctx, const PackBatch& batch,
                                     const TensorView& x, const TensorView& delta,
                                     const TensorView& out, SavedBlock* saved, const KvCache* cache,
                                     int64_t cache_begin) const {
  if (!delta.defined()) saved->x1 = x;
  ForwardAttention(ctx, batch, x, delta, *saved);
  Attend(ctx, batch, *saved, cache, cache_begin);
  o.Forward(ctx, saved->o_s, out);
  ForwardMlp(ctx, out, *saved);
  return saved->x2;
}

// x1, q, k, v.
void TransformerBlock::ForwardAttention(const LayerContext& ctx, const PackBatch& batch,
                                        const TensorView& x, const TensorView& delta,
                                        const SavedBlock& saved) const {
  const int64_t T = batch.tokens, C = shape.hidden;
  ArenaScope scope(ctx.arena);
  const TensorView raw = ctx.Scratch({T, shape.qkv_size()});
  const TensorView n1 = ctx.Scratch({T, C + qkv.extension()});
  RmsNormForwardArgs norm = {.x = x,
                             .delta = delta,
                             .w = attention_norm,
                             .y = Columns(n1, 0, C),
                             .rstd = saved.rstd1,
                             .eps = shape.rms_norm_eps};
  if (delta.defined()) norm.sum = saved.x1;
  RmsNormForward(ctx.exec, norm);
  qkv.Forward(ctx, n1, raw);
  KeepS(ctx, n1, saved.s_qkv);
  MoveHeads(ctx, batch, Split(raw, shape), HeadsOf(saved.q, saved.k, saved.v, shape),
            /*inverse=*/false);
}

// out: in a, the attention's share; out what the MLP adds to x2 = x1 + a.
void TransformerBlock::ForwardMlp(const LayerContext& ctx, const TensorView& out,
                                  const SavedBlock& saved) const {
  const int64_t T = out.dim(0), C = shape.hidden, F = shape.intermediate;
  ArenaScope scope(ctx.arena);
  const TensorView gate_up_rows =
      saved.gate_up.defined() ? Columns(saved.gate_up, 0, 2 * F) : ctx.Scratch({T, 2 * F});
  {
    ArenaScope norm_scope(ctx.arena);
    const TensorView n2 = ctx.Scratch({T, C + gate_up.extension()});
    RmsNormForward(ctx.exec, {.x = saved.x1,
                              .delta = out,
                              .sum = saved.x2,
                              .w = mlp_norm,
                              .y = Columns(n2, 0, C),
                              .rstd = saved.rstd2,
                              .eps = shape.rms_norm_eps});
    gate_up.Forward(ctx, n2, gate_up_rows);
    KeepS(ctx, n2, saved.s_gate_up);
  }
  const TensorView h = ctx.Scratch({T, F + down.extension()});
  GatedActivationForward(ctx.exec, {.gate = Columns(gate_up_rows, 0, F),
                                    .up = Columns(gate_up_rows, F, F),
                                    .h = Columns(h, 0, F)});
  down.Forward(ctx, h, out);
  KeepS(ctx, h, saved.s_down);
}

void TransformerBlock::Backward(const LayerContext& ctx, const PackBatch& batch,
                                const SavedBlock& saved, const TensorView& dx,
                                const BackwardOptions& options) const {
  BackwardMlp(ctx, saved, dx);
  BackwardAttention(ctx, batch, saved, dx, options);
}

// In scratch, as Forward had it.
TensorView TransformerBlock::RebuildGateUp(const LayerContext& ctx, const SavedBlock& saved) const {
  const int64_t T = saved.x2.dim(0), C = shape.hidden, F = shape.intermediate;
  const TensorView rows = ctx.Scratch({T, 2 * F + gate_up.extension()});
  ArenaScope scope(ctx.arena);
  const TensorView n2 = ctx.Scratch({T, C + gate_up.extension()});
  RmsNormRebuild(ctx.exec,
                 {.x = saved.x2, .rstd = saved.rstd2, .w = mlp_norm, .y = Columns(n2, 0, C)});
  gate_up.Forward(ctx, n2, Columns(rows, 0, 2 * F));
  return rows;
}

// dx: gradient of x2 + delta' -> gradient of x2 = x1 + a.
void TransformerBlock::BackwardMlp(const LayerContext& ctx, const SavedBlock& saved,
                                   const TensorView& dx) const {
  const int64_t T = dx.dim(0), C = shape.hidden, F = shape.intermediate;
  ArenaScope scope(ctx.arena);
  const TensorView rows = saved.gate_up.defined() ? saved.gate_up : RebuildGateUp(ctx, saved);
  const TensorView gate = Columns(rows, 0, F), up = Columns(rows, F, F);
  {
    ArenaScope mlp_scope(ctx.arena);
    const TensorView dy = Columns(dx, 0, C + down.extension());
    const TensorView dh = ctx.Scratch({T, F});
    down.BackwardInput(ctx, dy, dh);
    // The activations are not needed again: their gradients take their place, and h that of dh.
    GatedActivationBackward(ctx.exec,
                            {.dh = dh, .gate = gate, .up = up, .dgate = gate, .dup = up, .h = dh});
    down.BackwardParameters(ctx, dy, dh, saved.s_down);
  }
  const TensorView dn2 = ctx.Scratch({T, C}), n2 = ctx.Scratch({T, C});
  gate_up.BackwardInput(ctx, rows, dn2);
  RmsNormRebuild(ctx.exec, {.x = saved.x2, .rstd = saved.rstd2, .w = mlp_norm, .y = n2});
  gate_up.BackwardParameters(ctx, rows, n2, saved.s_gate_up);
  AddNormGradient(ctx, dn2, saved.x2, saved.rstd2, mlp_norm, Columns(dx, 0, C));
}

// dx: gradient of x1 + a -> gradient of x1.
void TransformerBlock::BackwardAttention(const LayerContext& ctx, const PackBatch& batch,
                                         const SavedBlock& saved, const TensorView& dx,
                                         const BackwardOptions& options) const {
  const int64_t T = dx.dim(0), C = shape.hidden;
  ArenaScope scope(ctx.arena);
  const TensorView dqkv = ctx.Scratch({T, shape.qkv_size() + qkv.extension()});
  {
    ArenaScope attention_scope(ctx.arena);
    const TensorView dy = Columns(dx, 0, C + o.extension());
    const TensorView d_o = ctx.Scratch({T, shape.q_size()});
    o.BackwardInput(ctx, dy, d_o);
    o.BackwardParameters(ctx, dy, SavedO(saved), Columns(saved.o_s, shape.q_size(), o.extension()));
    BackwardHeads(ctx, batch, saved, d_o, dqkv);
  }
  const TensorView n1 = ctx.Scratch({T, C});
  const TensorView dn1 = options.want_dx ? ctx.Scratch({T, C}) : TensorView();
  qkv.BackwardInput(ctx, dqkv, dn1);
  RmsNormRebuild(ctx.exec, {.x = saved.x1, .rstd = saved.rstd1, .w = attention_norm, .y = n1});
  qkv.BackwardParameters(ctx, dqkv, n1, saved.s_qkv);
  if (!options.want_dx) return;
  AddNormGradient(ctx, dn1, saved.x1, saved.rstd1, attention_norm, Columns(dx, 0, C));
}

void TransformerBlock::BackwardHeads(const LayerContext& ctx, const PackBatch& batch,
                                     const SavedBlock& saved, const TensorView& d_o,
                                     const TensorView& dqkv) const {
  const int64_t T = d_o.dim(0);
  const Qkv x = HeadsOf(saved.q, saved.k, saved.v, shape);
  const Qkv dx = HeadsOf(ctx.Scratch({T, shape.q_size()}), ctx.Scratch({T, shape.kv_size()}),
                         ctx.Scratch({T, shape.kv_size()}), shape);
  AttentionBackwardArgs args = {.q = x.q,
                                .k = x.k,
                                .v = x.v,
                                .o = Heads(saved.o_s, 0, shape.heads, shape.head_dim),
                                .lse = saved.lse,
                                .d_o = Heads(d_o, 0, shape.heads, shape.head_dim),
                                .dq = dx.q,
                                .dk = dx.k,
                                .dv = dx.v,
                                .segments = batch.segments,
                                .options = attention_options()};
  {
    ArenaScope scope(ctx.arena);
    args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                         AttentionBackwardWorkspaceBytes(ctx.exec, args));
    AttentionBackward(ctx.exec, args);
  }
  MoveHeads(ctx, batch, dx, Split(dqkv, shape), /*inverse=*/true);
}

}  // namespace attune
