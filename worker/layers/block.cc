#include "worker/layers/block.h"

#include "kernels/elementwise/elementwise.h"
#include "kernels/qk_norm/qk_norm.h"
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

// The heads in rows of the fused product (T, >= (Hq + 2 Hk) D).
QkvHeads Split(const TensorView& qkv, const BlockShape& shape) {
  const int64_t D = shape.head_dim;
  return {.q = Heads(qkv, 0, shape.heads, D),
          .k = Heads(qkv, shape.q_size(), shape.kv_heads, D),
          .v = Heads(qkv, shape.q_size() + shape.kv_size(), shape.kv_heads, D)};
}

// The heads in buffers of their own.
QkvHeads HeadsOf(const TensorView& q, const TensorView& k, const TensorView& v,
                 const BlockShape& shape) {
  const int64_t D = shape.head_dim;
  return {.q = Heads(q, 0, shape.heads, D),
          .k = Heads(k, 0, shape.kv_heads, D),
          .v = Heads(v, 0, shape.kv_heads, D)};
}

// y = rope(x); rotary_dim 0: y = x.
void MoveHeads(const LayerContext& ctx, const RotaryTable& table, const TensorView& x,
               const TensorView& y, int64_t rotary_dim, bool inverse) {
  const int64_t half = rotary_dim / 2;
  Rope(ctx.exec, {.x = x,
                  .y = y,
                  .cos = Columns(table.cos, 0, half),
                  .sin = Columns(table.sin, 0, half),
                  .rotary_dim = rotary_dim,
                  .inverse = inverse});
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
      if (shape.qk_norm) {
        take(&saved->qkv, shape.qkv_size());
      } else {
        take(&saved->q, shape.q_size());
        take(&saved->k, shape.kv_size());
        take(&saved->v, shape.kv_size());
      }
      take(&saved->o_s, shape.q_size() + block.o.extension());
      take(&saved->x2, shape.hidden);
      if (shape.post_norms) {
        take(&saved->attention_out, shape.hidden);
        take(&saved->mlp_out, shape.hidden);
      }
      break;
    case SavedGroup::kGateUp:
      take(&saved->gate_up, 2 * shape.intermediate + block.gate_up.extension());
      break;
    case SavedGroup::kSmall:
      saved->rstd1 = carver.Take(ctx.accumulator(), {T});
      saved->rstd2 = carver.Take(ctx.accumulator(), {T});
      if (shape.post_norms) {
        saved->attention_out_rstd = carver.Take(ctx.accumulator(), {T});
        saved->mlp_out_rstd = carver.Take(ctx.accumulator(), {T});
      }
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

QkvHeads TransformerBlock::SavedHeads(const SavedBlock& saved) const {
  return HeadsOf(saved.q, saved.k, saved.v, shape);
}

QkvHeads TransformerBlock::ScratchHeads(const LayerContext& ctx, int64_t T) const {
  QkvHeads out = HeadsOf(ctx.Scratch({T, shape.q_size()}), ctx.Scratch({T, shape.kv_size()}),
                         ctx.Scratch({T, shape.kv_size()}), shape);
  if (shape.qk_norm) {
    out.q_rstd = ctx.arena->NewScratch(ctx.accumulator(), {T, shape.heads});
    out.k_rstd = ctx.arena->NewScratch(ctx.accumulator(), {T, shape.kv_heads});
  }
  return out;
}

void TransformerBlock::PositionHeads(const LayerContext& ctx, const PackBatch& batch,
                                     const TensorView& rows, const QkvHeads& to) const {
  const RotaryTable& table = batch.rotary[shape.rope];
  const QkvHeads from = Split(rows, shape);
  MoveHeads(ctx, table, from.v, to.v, 0, /*inverse=*/false);
  if (!shape.qk_norm) {
    MoveHeads(ctx, table, from.q, to.q, shape.rotary_dim, /*inverse=*/false);
    MoveHeads(ctx, table, from.k, to.k, shape.rotary_dim, /*inverse=*/false);
    return;
  }
  QkNormForwardArgs norm = {.x = from.q,
                            .w = q_norm,
                            .cos = table.cos,
                            .sin = table.sin,
                            .y = to.q,
                            .rstd = to.q_rstd,
                            .rotary_dim = shape.rotary_dim,
                            .eps = shape.rms_norm_eps,
                            .weight_offset = shape.norm_weight_offset};
  QkNormForward(ctx.exec, norm);
  norm.x = from.k;
  norm.w = k_norm;
  norm.y = to.k;
  norm.rstd = to.k_rstd;
  QkNormForward(ctx.exec, norm);
}

void TransformerBlock::PositionHeadsBackward(const LayerContext& ctx, const PackBatch& batch,
                                             const QkvHeads& d_to, const TensorView& rows,
                                             const QkvHeads& to, const TensorView& d_rows) const {
  const RotaryTable& table = batch.rotary[shape.rope];
  const QkvHeads d_from = Split(d_rows, shape);
  MoveHeads(ctx, table, d_to.v, d_from.v, 0, /*inverse=*/true);
  if (!shape.qk_norm) {
    MoveHeads(ctx, table, d_to.q, d_from.q, shape.rotary_dim, /*inverse=*/true);
    MoveHeads(ctx, table, d_to.k, d_from.k, shape.rotary_dim, /*inverse=*/true);
    return;
  }
  const QkvHeads from = Split(rows, shape);
  QkNormBackwardArgs norm = {.dy = d_to.q,
                             .x = from.q,
                             .rstd = to.q_rstd,
                             .w = q_norm,
                             .cos = table.cos,
                             .sin = table.sin,
                             .dx = d_from.q,
                             .rotary_dim = shape.rotary_dim,
                             .weight_offset = shape.norm_weight_offset};
  QkNormBackward(ctx.exec, norm);
  norm.dy = d_to.k;
  norm.x = from.k;
  norm.rstd = to.k_rstd;
  norm.w = k_norm;
  norm.dx = d_from.k;
  QkNormBackward(ctx.exec, norm);
}

void TransformerBlock::Normalise(const LayerContext& ctx, const TensorView& x,
                                 const TensorView& delta, const TensorView& sum,
                                 const TensorView& w, const TensorView& y,
                                 const TensorView& rstd) const {
  RmsNormForwardArgs norm = {.x = x,
                             .delta = delta,
                             .w = w,
                             .y = y,
                             .rstd = rstd,
                             .eps = shape.rms_norm_eps,
                             .weight_offset = shape.norm_weight_offset};
  if (delta.defined()) norm.sum = sum;
  RmsNormForward(ctx.exec, norm);
}

void TransformerBlock::NormaliseAgain(const LayerContext& ctx, const TensorView& x,
                                      const TensorView& w, const TensorView& rstd,
                                      const TensorView& y) const {
  RmsNormRebuild(ctx.exec,
                 {.x = x, .rstd = rstd, .w = w, .y = y, .weight_offset = shape.norm_weight_offset});
}

void TransformerBlock::NormaliseBackward(const LayerContext& ctx, const TensorView& dy,
                                         const TensorView& x, const TensorView& w,
                                         const TensorView& rstd, const TensorView& dresidual,
                                         const TensorView& dx) const {
  RmsNormBackwardArgs norm = {.dy = dy,
                              .x = x,
                              .rstd = rstd,
                              .w = w,
                              .dresidual = dresidual,
                              .dx = dx,
                              .weight_offset = shape.norm_weight_offset};
  norm.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       RmsNormBackwardWorkspaceBytes(ctx.exec, norm));
  RmsNormBackward(ctx.exec, norm);
}

void TransformerBlock::Attend(const LayerContext& ctx, const PackBatch& batch,
                              const QkvHeads& heads, const SavedBlock& saved, const KvCache* cache,
                              int64_t cache_begin) const {
  AttentionForwardArgs args = {.q = heads.q,
                               .k = heads.k,
                               .v = heads.v,
                               .o = Heads(saved.o_s, 0, shape.heads, shape.head_dim),
                               .lse = saved.lse,
                               .segments = batch.segments,
                               .options = shape.attention};
  if (cache != nullptr) {
    const int64_t end = cache_begin + batch.tokens;
    CopyHeads(ctx, heads.k, cache->k.Slice(0, cache_begin, end));
    CopyHeads(ctx, heads.v, cache->v.Slice(0, cache_begin, end));
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
  {
    ArenaScope scope(ctx.arena);
    const QkvHeads heads = ForwardHeads(ctx, batch, x, delta, *saved);
    Attend(ctx, batch, heads, *saved, cache, cache_begin);
  }
  o.Forward(ctx, saved->o_s, shape.post_norms ? saved->attention_out : out);
  if (shape.post_norms) {
    Normalise(ctx, saved->attention_out, {}, {}, post_attention_norm, out,
              saved->attention_out_rstd);
  }
  ForwardMlp(ctx, out, *saved);
  return saved->x2;
}

// x1, and q, k, v: saved, or with qk_norm, where their rows are, in the caller's scratch.
QkvHeads TransformerBlock::ForwardHeads(const LayerContext& ctx, const PackBatch& batch,
                                        const TensorView& x, const TensorView& delta,
                                        const SavedBlock& saved) const {
  const int64_t T = batch.tokens, C = shape.hidden;
  const QkvHeads heads = shape.qk_norm ? ScratchHeads(ctx, T) : SavedHeads(saved);
  ArenaScope scope(ctx.arena);
  const TensorView rows = shape.qk_norm ? saved.qkv : ctx.Scratch({T, shape.qkv_size()});
  const TensorView n1 = ctx.Scratch({T, C + qkv.extension()});
  Normalise(ctx, x, delta, saved.x1, attention_norm, Columns(n1, 0, C), saved.rstd1);
  qkv.Forward(ctx, n1, rows);
  KeepS(ctx, n1, saved.s_qkv);
  PositionHeads(ctx, batch, rows, heads);
  return heads;
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
    Normalise(ctx, saved.x1, out, saved.x2, mlp_norm, Columns(n2, 0, C), saved.rstd2);
    gate_up.Forward(ctx, n2, gate_up_rows);
    KeepS(ctx, n2, saved.s_gate_up);
  }
  const TensorView h = ctx.Scratch({T, F + down.extension()});
  GatedActivationForward(ctx.exec, {.gate = Columns(gate_up_rows, 0, F),
                                    .up = Columns(gate_up_rows, F, F),
                                    .h = Columns(h, 0, F),
                                    .activation = shape.activation});
  down.Forward(ctx, h, shape.post_norms ? saved.mlp_out : out);
  KeepS(ctx, h, saved.s_down);
  if (shape.post_norms) {
    Normalise(ctx, saved.mlp_out, {}, {}, post_mlp_norm, out, saved.mlp_out_rstd);
  }
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
  NormaliseAgain(ctx, saved.x2, mlp_norm, saved.rstd2, Columns(n2, 0, C));
  gate_up.Forward(ctx, n2, Columns(rows, 0, 2 * F));
  return rows;
}

TensorView TransformerBlock::OutputGradient(const LayerContext& ctx, const TensorView& dx,
                                            const TensorView& out, const TensorView& w,
                                            const TensorView& rstd, int64_t columns) const {
  if (!shape.post_norms) return Columns(dx, 0, columns);
  const TensorView dy = ctx.Scratch({dx.dim(0), columns});
  NormaliseBackward(ctx, Columns(dx, 0, shape.hidden), out, w, rstd, {},
                    Columns(dy, 0, shape.hidden));
  return dy;
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
    const TensorView dy = OutputGradient(ctx, dx, saved.mlp_out, post_mlp_norm, saved.mlp_out_rstd,
                                         C + down.extension());
    const TensorView dh = ctx.Scratch({T, F});
    down.BackwardInput(ctx, dy, dh);
    // The activations are not needed again: their gradients take their place, and h that of dh.
    GatedActivationBackward(ctx.exec, {.dh = dh,
                                       .gate = gate,
                                       .up = up,
                                       .dgate = gate,
                                       .dup = up,
                                       .h = dh,
                                       .activation = shape.activation});
    down.BackwardParameters(ctx, dy, dh, saved.s_down);
  }
  const TensorView dn2 = ctx.Scratch({T, C}), n2 = ctx.Scratch({T, C});
  gate_up.BackwardInput(ctx, rows, dn2);
  NormaliseAgain(ctx, saved.x2, mlp_norm, saved.rstd2, n2);
  gate_up.BackwardParameters(ctx, rows, n2, saved.s_gate_up);
  const TensorView dx2 = Columns(dx, 0, C);
  NormaliseBackward(ctx, dn2, saved.x2, mlp_norm, saved.rstd2, dx2, dx2);
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
    const TensorView dy = OutputGradient(ctx, dx, saved.attention_out, post_attention_norm,
                                         saved.attention_out_rstd, C + o.extension());
    const TensorView d_o = ctx.Scratch({T, shape.q_size()});
    o.BackwardInput(ctx, dy, d_o);
    o.BackwardParameters(ctx, dy, SavedO(saved), Columns(saved.o_s, shape.q_size(), o.extension()));
    BackwardHeads(ctx, batch, saved, d_o, dqkv);
  }
  const TensorView n1 = ctx.Scratch({T, C});
  const TensorView dn1 = options.want_dx ? ctx.Scratch({T, C}) : TensorView();
  qkv.BackwardInput(ctx, dqkv, dn1);
  NormaliseAgain(ctx, saved.x1, attention_norm, saved.rstd1, n1);
  qkv.BackwardParameters(ctx, dqkv, n1, saved.s_qkv);
  if (!options.want_dx) return;
  const TensorView dx1 = Columns(dx, 0, C);
  NormaliseBackward(ctx, dn1, saved.x1, attention_norm, saved.rstd1, dx1, dx1);
}

void TransformerBlock::BackwardHeads(const LayerContext& ctx, const PackBatch& batch,
                                     const SavedBlock& saved, const TensorView& d_o,
                                     const TensorView& dqkv) const {
  const int64_t T = d_o.dim(0);
  QkvHeads x;
  if (shape.qk_norm) {
    x = ScratchHeads(ctx, T);
    PositionHeads(ctx, batch, saved.qkv, x);
  } else {
    x = SavedHeads(saved);
  }
  const QkvHeads dx = HeadsOf(ctx.Scratch({T, shape.q_size()}), ctx.Scratch({T, shape.kv_size()}),
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
                                .options = shape.attention};
  {
    ArenaScope scope(ctx.arena);
    args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                         AttentionBackwardWorkspaceBytes(ctx.exec, args));
    AttentionBackward(ctx.exec, args);
  }
  PositionHeadsBackward(ctx, batch, dx, saved.qkv, x, dqkv);
}

}  // namespace attune
