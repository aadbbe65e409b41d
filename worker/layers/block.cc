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
  TensorView out = x.Slice(1, begin, begin + heads * head_dim);
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

Qkv Split(const TensorView& qkv, const BlockShape& shape) {
  const int64_t D = shape.head_dim;
  return {Heads(qkv, 0, shape.heads, D), Heads(qkv, shape.q_size(), shape.kv_heads, D),
          Heads(qkv, shape.q_size() + shape.kv_size(), shape.kv_heads, D)};
}

void RopeQk(const LayerContext& ctx, const PackBatch& batch, const Qkv& x, int64_t head_dim,
            bool inverse) {
  for (const TensorView& part : {x.q, x.k}) {
    Rope(ctx.exec, {.x = part,
                    .cos = batch.cos,
                    .sin = batch.sin,
                    .rotary_dim = head_dim,
                    .inverse = inverse});
  }
}

TensorView SavedS(const LayerContext& ctx, const LoraLinear& linear, int64_t tokens) {
  if (linear.adapters.empty()) return TensorView();
  return ctx.Saved(ctx.dtype, {tokens, linear.saved_columns()});
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

}  // namespace

AttentionOptions TransformerBlock::attention_options() const {
  return {.scale = 1.0 / std::sqrt(static_cast<double>(shape.head_dim))};
}

void TransformerBlock::Attend(const LayerContext& ctx, const PackBatch& batch,
                              const SavedBlock& saved, const KvCache* cache,
                              int64_t cache_begin) const {
  const Qkv x = Split(saved.qkv, shape);
  AttentionForwardArgs args = {.q = x.q,
                               .k = x.k,
                               .v = x.v,
                               .o = Heads(saved.o, 0, shape.heads, shape.head_dim),
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
  const int64_t T = batch.tokens, C = shape.hidden;
  const DType stats = ctx.accumulator();
  saved->x1 = delta.defined() ? ctx.Saved(ctx.dtype, {T, C}) : x;
  saved->rstd1 = ctx.Saved(stats, {T});
  saved->qkv = ctx.Saved(ctx.dtype, {T, shape.qkv_size()});
  saved->s_qkv = SavedS(ctx, qkv, T);
  {
    ArenaScope scope(ctx.arena);
    const TensorView n1 = ctx.Scratch({T, C});
    RmsNormForwardArgs norm = {.x = x,
                               .delta = delta,
                               .w = attention_norm,
                               .y = n1,
                               .rstd = saved->rstd1,
                               .eps = shape.rms_norm_eps};
    if (delta.defined()) norm.sum = saved->x1;
    RmsNormForward(ctx.exec, norm);
    qkv.Forward(ctx, n1, saved->qkv, saved->s_qkv);
  }
  RopeQk(ctx, batch, Split(saved->qkv, shape), shape.head_dim, /*inverse=*/false);
  saved->o = ctx.Saved(ctx.dtype, {T, shape.q_size()});
  saved->lse = ctx.Saved(stats, {shape.heads, T});
  Attend(ctx, batch, *saved, cache, cache_begin);
  saved->s_o = SavedS(ctx, o, T);
  o.Forward(ctx, saved->o, out, saved->s_o);

  saved->x2 = ctx.Saved(ctx.dtype, {T, C});
  saved->rstd2 = ctx.Saved(stats, {T});
  saved->gate_up = ctx.Saved(ctx.dtype, {T, 2 * shape.intermediate});
  saved->s_gate_up = SavedS(ctx, gate_up, T);
  saved->s_down = SavedS(ctx, down, T);
  ArenaScope scope(ctx.arena);
  {
    ArenaScope norm_scope(ctx.arena);
    const TensorView n2 = ctx.Scratch({T, C});
    RmsNormForward(ctx.exec, {.x = saved->x1,
                              .delta = out,
                              .sum = saved->x2,
                              .w = mlp_norm,
                              .y = n2,
                              .rstd = saved->rstd2,
                              .eps = shape.rms_norm_eps});
    gate_up.Forward(ctx, n2, saved->gate_up, saved->s_gate_up);
  }
  const int64_t F = shape.intermediate;
  const TensorView h = ctx.Scratch({T, F});
  GatedActivationForward(
      ctx.exec,
      {.gate = saved->gate_up.Slice(1, 0, F), .up = saved->gate_up.Slice(1, F, 2 * F), .h = h});
  down.Forward(ctx, h, out, saved->s_down);
  return saved->x2;
}

void TransformerBlock::Backward(const LayerContext& ctx, const PackBatch& batch,
                                const SavedBlock& saved, const TensorView& dx,
                                const BackwardOptions& options) const {
  BackwardMlp(ctx, saved, dx);
  BackwardAttention(ctx, batch, saved, dx, options);
}

// dx: gradient of x2 + delta' -> gradient of x2 = x1 + a.
void TransformerBlock::BackwardMlp(const LayerContext& ctx, const SavedBlock& saved,
                                   const TensorView& dx) const {
  const int64_t T = dx.dim(0), C = shape.hidden, F = shape.intermediate;
  const TensorView gate = saved.gate_up.Slice(1, 0, F);
  const TensorView up = saved.gate_up.Slice(1, F, 2 * F);
  ArenaScope scope(ctx.arena);
  {
    ArenaScope mlp_scope(ctx.arena);
    const TensorView h = ctx.Scratch({T, F});
    const TensorView dh = ctx.Scratch({T, F});
    GatedActivationForward(ctx.exec, {.gate = gate, .up = up, .h = h});
    down.Backward(ctx, dx, h, saved.s_down, dh);
    // The activations are not needed again: their gradients take their place.
    GatedActivationBackward(ctx.exec, {.dh = dh, .gate = gate, .up = up, .dgate = gate, .dup = up});
  }
  const TensorView n2 = ctx.Scratch({T, C});
  const TensorView dn2 = ctx.Scratch({T, C});
  RmsNormRebuild(ctx.exec, {.x = saved.x2, .rstd = saved.rstd2, .w = mlp_norm, .y = n2});
  gate_up.Backward(ctx, saved.gate_up, n2, saved.s_gate_up, dn2);
  RmsNormBackwardArgs norm = {
      .dy = dn2, .x = saved.x2, .rstd = saved.rstd2, .w = mlp_norm, .dresidual = dx, .dx = dx};
  norm.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       RmsNormBackwardWorkspaceBytes(ctx.exec, norm));
  RmsNormBackward(ctx.exec, norm);
}

// dx: gradient of x1 + a -> gradient of x1.
void TransformerBlock::BackwardAttention(const LayerContext& ctx, const PackBatch& batch,
                                         const SavedBlock& saved, const TensorView& dx,
                                         const BackwardOptions& options) const {
  const int64_t T = dx.dim(0), C = shape.hidden;
  ArenaScope scope(ctx.arena);
  const TensorView dqkv = ctx.Scratch({T, shape.qkv_size()});
  {
    ArenaScope attention_scope(ctx.arena);
    const TensorView d_o = ctx.Scratch({T, shape.q_size()});
    o.Backward(ctx, dx, saved.o, saved.s_o, d_o);
    const Qkv x = Split(saved.qkv, shape), dx_heads = Split(dqkv, shape);
    AttentionBackwardArgs args = {.q = x.q,
                                  .k = x.k,
                                  .v = x.v,
                                  .o = Heads(saved.o, 0, shape.heads, shape.head_dim),
                                  .lse = saved.lse,
                                  .d_o = Heads(d_o, 0, shape.heads, shape.head_dim),
                                  .dq = dx_heads.q,
                                  .dk = dx_heads.k,
                                  .dv = dx_heads.v,
                                  .segments = batch.segments,
                                  .options = attention_options()};
    args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                         AttentionBackwardWorkspaceBytes(ctx.exec, args));
    AttentionBackward(ctx.exec, args);
  }
  RopeQk(ctx, batch, Split(dqkv, shape), shape.head_dim, /*inverse=*/true);
  const TensorView n1 = ctx.Scratch({T, C});
  RmsNormRebuild(ctx.exec, {.x = saved.x1, .rstd = saved.rstd1, .w = attention_norm, .y = n1});
  const TensorView dn1 = options.want_dx ? ctx.Scratch({T, C}) : TensorView();
  qkv.Backward(ctx, dqkv, n1, saved.s_qkv, dn1);
  if (!options.want_dx) return;
  RmsNormBackwardArgs norm = {.dy = dn1,
                              .x = saved.x1,
                              .rstd = saved.rstd1,
                              .w = attention_norm,
                              .dresidual = dx,
                              .dx = dx};
  norm.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       RmsNormBackwardWorkspaceBytes(ctx.exec, norm));
  RmsNormBackward(ctx.exec, norm);
}

}  // namespace attune
