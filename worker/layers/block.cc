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

// The other way: (T, H, D) whose heads lie one behind the other as (T, H * D).
TensorView AsRows(const TensorView& heads) {
  CHECK(heads.stride(1) == heads.dim(2));
  TensorView out = heads;
  out.rank = 2;
  out.shape[1] *= out.shape[2];
  out.strides[1] = 1;
  return out;
}

// The heads in buffers of their own.
QkvHeads HeadsOf(const TensorView& q, const TensorView& k, const TensorView& v,
                 const BlockShape& shape) {
  const int64_t D = shape.head_dim;
  return {.q = Heads(q, 0, shape.heads, D),
          .k = Heads(k, 0, shape.kv_heads, D),
          .v = Heads(v, 0, shape.kv_heads, D)};
}

// Moves heads to where they are used, turned by their positions; v as it is.
void MoveHeads(const LayerContext& ctx, const RotaryTable& table,
               std::initializer_list<RopeHeads> heads, int64_t rotary_dim, bool inverse) {
  const int64_t half = rotary_dim / 2;
  Rope(ctx.exec, {.heads = {heads.begin(), heads.size()},
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
  const auto take_aligned = [&](TensorView* view, int64_t columns) {
    *view = carver.Take(ctx.dtype, {T, AlignedColumns(ctx.dtype, columns)}).Slice(1, 0, columns);
  };
  const auto take_statistics = [&](TensorView* view) {
    *view = carver.Take(ctx.accumulator(), {T});
  };
  switch (group) {
    case SavedGroup::kInput:
      take(&saved->x1, shape.hidden);
      take(&saved->s_down, block.down.extension());
      if (shape.post_norms) {
        take(&saved->mlp_out, shape.hidden);
        take_statistics(&saved->mlp_out_rstd);
      }
      break;
    case SavedGroup::kAttention:
      take_aligned(&saved->o_s, shape.q_size() + block.o.extension());
      saved->lse = carver.Take(ctx.accumulator(), {T, shape.heads});
      break;
    case SavedGroup::kProjections:  // the adapters' share last: elsewhere layers are alike
      if (shape.qk_norm) {
        take(&saved->qkv, shape.qkv_size());
        if (block.heads_saved) {
          take(&saved->q, shape.q_size());
          take(&saved->k, shape.kv_size());
          saved->q_rstd = carver.Take(ctx.accumulator(), {T, shape.heads});
          saved->k_rstd = carver.Take(ctx.accumulator(), {T, shape.kv_heads});
        }
      } else {
        take(&saved->q, shape.q_size());
        take(&saved->k, shape.kv_size());
        take(&saved->v, shape.kv_size());
      }
      take(&saved->x2, shape.hidden);
      take_statistics(&saved->rstd1);
      take_statistics(&saved->rstd2);
      if (shape.post_norms) {
        take(&saved->attention_out, shape.hidden);
        take_statistics(&saved->attention_out_rstd);
      }
      take(&saved->s_qkv, block.qkv.extension());
      break;
    case SavedGroup::kGateUp:
      take_aligned(&saved->gate_up, 2 * shape.intermediate + block.gate_up.extension());
      take(&saved->s_gate_up, block.gate_up.extension());
      break;
  }
  return carver.bytes();
}

// What the MLP reads and writes, of some rows.
SavedBlock MlpRows(const SavedBlock& saved, int64_t begin, int64_t end) {
  SavedBlock rows = saved;
  for (TensorView* view : {&rows.x1, &rows.x2, &rows.rstd2, &rows.gate_up, &rows.s_gate_up,
                           &rows.s_down, &rows.mlp_out, &rows.mlp_out_rstd}) {
    if (view->defined()) *view = view->Slice(0, begin, end);
  }
  return rows;
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

QkvHeads TransformerBlock::PlaceHeads(const LayerContext& ctx, const SavedBlock& saved) const {
  if (!shape.qk_norm) return HeadsOf(saved.q, saved.k, saved.v, shape);
  const int64_t T = saved.qkv.dim(0);
  const TensorView v = Columns(saved.qkv, shape.q_size() + shape.kv_size(), shape.kv_size());
  const auto statistics = [&](int64_t heads) {
    return ctx.arena->NewScratch(ctx.accumulator(), {T, heads});
  };
  QkvHeads out;
  if (heads_saved) {
    out = HeadsOf(saved.q, saved.k, v, shape);
    out.q_rstd = saved.q_rstd;
    out.k_rstd = saved.k_rstd;
  } else {
    out = HeadsOf(ctx.Scratch({T, shape.q_size()}), ctx.Scratch({T, shape.kv_size()}), v, shape);
    out.q_rstd = statistics(shape.heads);
    out.k_rstd = statistics(shape.kv_heads);
  }
  return out;
}

void TransformerBlock::PositionHeads(const LayerContext& ctx, const PackBatch& batch,
                                     const TensorView& rows, const QkvHeads& to) const {
  const RotaryTable& table = batch.rotary[shape.rope];
  const QkvHeads from = Split(rows, shape);
  if (!shape.qk_norm) {
    return MoveHeads(ctx, table, {{from.q, to.q}, {from.k, to.k}, {from.v, to.v, /*turned=*/false}},
                     shape.rotary_dim, /*inverse=*/false);
  }
  const QkNormHeads heads[] = {{.x = from.q, .w = q_norm, .y = to.q, .rstd = to.q_rstd},
                               {.x = from.k, .w = k_norm, .y = to.k, .rstd = to.k_rstd}};
  QkNormForward(ctx.exec, {.heads = heads,
                           .cos = table.cos,
                           .sin = table.sin,
                           .rotary_dim = shape.rotary_dim,
                           .eps = shape.rms_norm_eps,
                           .weight_offset = shape.norm_weight_offset});
}

void TransformerBlock::PositionHeadsBackward(const LayerContext& ctx, const PackBatch& batch,
                                             const QkvHeads& d_to, const TensorView& rows,
                                             const QkvHeads& to, const TensorView& d_rows) const {
  const RotaryTable& table = batch.rotary[shape.rope];
  const QkvHeads d_from = Split(d_rows, shape);
  if (!shape.qk_norm) {
    return MoveHeads(ctx, table,
                     {{d_to.q, d_from.q}, {d_to.k, d_from.k}, {d_to.v, d_from.v, /*turned=*/false}},
                     shape.rotary_dim, /*inverse=*/true);
  }
  Copy(ctx.exec, {.x = AsRows(d_to.v), .y = AsRows(d_from.v)});
  const QkvHeads from = Split(rows, shape);
  const QkNormHeadsBackward heads[] = {
      {.dy = d_to.q, .x = from.q, .rstd = to.q_rstd, .w = q_norm, .dx = d_from.q},
      {.dy = d_to.k, .x = from.k, .rstd = to.k_rstd, .w = k_norm, .dx = d_from.k}};
  QkNormBackward(ctx.exec, {.heads = heads,
                            .cos = table.cos,
                            .sin = table.sin,
                            .rotary_dim = shape.rotary_dim,
                            .weight_offset = shape.norm_weight_offset});
}

void TransformerBlock::Normalise(const LayerContext& ctx, const TensorView& x,
                                 const TensorView& delta, const TensorView& sum,
                                 const TensorView& w, const TensorView& y, const TensorView& rstd,
                                 const Fp8Rows& codes) const {
  RmsNormForwardArgs norm = {.x = x,
                             .delta = delta,
                             .w = w,
                             .y = y,
                             .rstd = rstd,
                             .eps = shape.rms_norm_eps,
                             .weight_offset = shape.norm_weight_offset,
                             .fp8 = codes};
  if (delta.defined()) norm.sum = sum;
  RmsNormForward(ctx.exec, norm);
}

void TransformerBlock::NormaliseAgain(const LayerContext& ctx, const TensorView& x,
                                      const TensorView& w, const TensorView& rstd,
                                      const TensorView& y, const Fp8Rows& codes) const {
  RmsNormRebuild(ctx.exec, {.x = x,
                            .rstd = rstd,
                            .w = w,
                            .y = y,
                            .weight_offset = shape.norm_weight_offset,
                            .fp8 = codes});
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
  ForwardOutput(ctx, *saved, out);
  ForwardMlp(ctx, out, *saved);
  return saved->x2;
}

void TransformerBlock::Rebuild(const LayerContext& ctx, const PackBatch& batch, StreamSaved kept,
                               const SavedBlock& saved) const {
  if (kept == StreamSaved::kAll) return;
  {
    ArenaScope scope(ctx.arena);
    const QkvHeads heads = ForwardHeads(ctx, batch, saved.x1, {}, saved);
    if (!IsSaved(kept, SavedGroup::kAttention)) Attend(ctx, batch, heads, saved, nullptr, 0);
  }
  ArenaScope scope(ctx.arena);
  const TensorView a = ctx.Scratch({batch.tokens, shape.hidden});
  ForwardOutput(ctx, saved, a);
  // For the sum and the statistics; the norm itself is not wanted.
  Normalise(ctx, saved.x1, a, saved.x2, mlp_norm, a, saved.rstd2);
}

void TransformerBlock::ForwardOutput(const LayerContext& ctx, const SavedBlock& saved,
                                     const TensorView& a) const {
  o.Forward(ctx, saved.o_s, shape.post_norms ? saved.attention_out : a);
  if (!shape.post_norms) return;
  Normalise(ctx, saved.attention_out, {}, {}, post_attention_norm, a, saved.attention_out_rstd);
}

// x1, and q, k, v: saved, or with qk_norm, where their rows are, in the caller's scratch if not.
QkvHeads TransformerBlock::ForwardHeads(const LayerContext& ctx, const PackBatch& batch,
                                        const TensorView& x, const TensorView& delta,
                                        const SavedBlock& saved) const {
  const int64_t T = batch.tokens, C = shape.hidden;
  const QkvHeads heads = PlaceHeads(ctx, saved);
  ArenaScope scope(ctx.arena);
  const TensorView rows = shape.qk_norm ? saved.qkv : ctx.Scratch({T, shape.qkv_size()});
  const TensorView n1 = ctx.ScratchRows(T, C + qkv.extension());
  const Fp8Rows codes = qkv.NewCodes(ctx, Direction::kForward, T);
  Normalise(ctx, x, delta, saved.x1, attention_norm, Columns(n1, 0, C), saved.rstd1, codes);
  qkv.Forward(ctx, n1, rows, codes);
  KeepS(ctx, n1, saved.s_qkv);
  PositionHeads(ctx, batch, rows, heads);
  return heads;
}

template <typename F>
void TransformerBlock::ForEachTile(const LayerContext& outer, int64_t T,
                                   std::initializer_list<Use> uses, const F& f) const {
  if (mlp_tile <= 0 || T <= mlp_tile) return f(outer, 0, T);
  ArenaScope scope(outer.arena);
  LayerContext ctx = outer;
  HeldExpansion held[kMaxUses];
  size_t count = 0;
  for (const Use& use : uses) use.linear->Hold(use.direction, &held[count++], &ctx);
  for (int64_t begin = 0; begin < T; begin += mlp_tile) {
    const int64_t end = std::min(begin + mlp_tile, T);
    if (ctx.exec.plan && begin > 0 && end < T) continue;  // takes what the first takes
    ctx.dropout.first_row = outer.dropout.first_row + begin;
    f(ctx, begin, end);
  }
}

// out: in a, the attention's share; out what the MLP adds to x2 = x1 + a.
void TransformerBlock::ForwardMlp(const LayerContext& outer, const TensorView& out,
                                  const SavedBlock& saved) const {
  constexpr Direction kForward = Direction::kForward;
  ForEachTile(outer, out.dim(0), {{&gate_up, kForward}, {&down, kForward}},
              [&](const LayerContext& ctx, int64_t begin, int64_t end) {
                ForwardMlpTile(ctx, out.Slice(0, begin, end), MlpRows(saved, begin, end));
              });
}

void TransformerBlock::ForwardMlpTile(const LayerContext& ctx, const TensorView& out,
                                      const SavedBlock& saved) const {
  const int64_t T = out.dim(0), C = shape.hidden, F = shape.intermediate;
  ArenaScope scope(ctx.arena);
  const TensorView gate_up_rows =
      saved.gate_up.defined() ? Columns(saved.gate_up, 0, 2 * F) : ctx.Scratch({T, 2 * F});
  {
    ArenaScope norm_scope(ctx.arena);
    const TensorView n2 = ctx.ScratchRows(T, C + gate_up.extension());
    const Fp8Rows codes = gate_up.NewCodes(ctx, Direction::kForward, T);
    Normalise(ctx, saved.x1, out, saved.x2, mlp_norm, Columns(n2, 0, C), saved.rstd2, codes);
    gate_up.Forward(ctx, n2, gate_up_rows, codes);
    if (saved.s_gate_up.defined()) KeepS(ctx, n2, saved.s_gate_up);
  }
  const TensorView h = ctx.ScratchRows(T, F + down.extension());
  ForwardGate(ctx, gate_up_rows, h, shape.post_norms ? saved.mlp_out : out);
  KeepS(ctx, h, saved.s_down);
  if (shape.post_norms) {
    Normalise(ctx, saved.mlp_out, {}, {}, post_mlp_norm, out, saved.mlp_out_rstd);
  }
}

// With codes of h, which is quantised by whole rows, s is a product of its own.
void TransformerBlock::ForwardGate(const LayerContext& ctx, const TensorView& rows,
                                   const TensorView& h, const TensorView& y) const {
  const int64_t T = rows.dim(0), F = shape.intermediate;
  const Fp8Rows codes = down.NewCodes(ctx, Direction::kForward, T);
  if (!down.IsPlain(ctx) || codes.defined()) {
    GatedActivationForward(ctx.exec, {.gate = Columns(rows, 0, F),
                                      .up = Columns(rows, F, F),
                                      .h = Columns(h, 0, F),
                                      .activation = shape.activation,
                                      .fp8 = codes});
    return down.Forward(ctx, h, y, codes);
  }
  {
    GatedLoraForwardArgs args{.rows = rows,
                              .h = Columns(h, 0, F),
                              .a = down.a,
                              .s = Columns(h, F, down.extension()),
                              .activation = shape.activation};
    ArenaScope scope(ctx.arena);
    args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                         GatedLoraForwardWorkspaceBytes(ctx.exec, args));
    GatedLoraForward(ctx.exec, args);
  }
  down.Forward(ctx, h, y, {}, /*has_s=*/true);
}

void TransformerBlock::Backward(const LayerContext& ctx, const PackBatch& batch,
                                const SavedBlock& saved, const TensorView& dx,
                                const BackwardOptions& options) const {
  BackwardMlp(ctx, saved, dx);
  BackwardAttention(ctx, batch, saved, dx, options);
}

void TransformerBlock::RebuildGateUp(const LayerContext& ctx, SavedBlock* saved) const {
  if (saved->gate_up.defined()) return;
  const int64_t T = saved->x2.dim(0), C = shape.hidden, F = shape.intermediate;
  saved->gate_up = ctx.ScratchRows(T, 2 * F + gate_up.extension());
  saved->s_gate_up = ctx.Scratch({T, gate_up.extension()});
  ArenaScope scope(ctx.arena);
  const TensorView n2 = ctx.ScratchRows(T, C + gate_up.extension());
  const Fp8Rows codes = gate_up.NewCodes(ctx, Direction::kForward, T);
  NormaliseAgain(ctx, saved->x2, mlp_norm, saved->rstd2, Columns(n2, 0, C), codes);
  gate_up.Forward(ctx, n2, Columns(saved->gate_up, 0, 2 * F), codes);
  KeepS(ctx, n2, saved->s_gate_up);
}

TensorView TransformerBlock::OutputGradient(const LayerContext& ctx, const TensorView& dx,
                                            const TensorView& out, const TensorView& w,
                                            const TensorView& rstd, int64_t columns) const {
  if (!shape.post_norms) return Columns(dx, 0, columns);
  const TensorView dy = ctx.ScratchRows(dx.dim(0), columns);
  NormaliseBackward(ctx, Columns(dx, 0, shape.hidden), out, w, rstd, {},
                    Columns(dy, 0, shape.hidden));
  return dy;
}

// dx: gradient of x2 + delta' -> gradient of x2 = x1 + a.
void TransformerBlock::BackwardMlp(const LayerContext& outer, const SavedBlock& saved,
                                   const TensorView& dx) const {
  const auto tile = [&](const LayerContext& ctx, int64_t begin, int64_t end) {
    BackwardMlpTile(ctx, MlpRows(saved, begin, end), dx.Slice(0, begin, end));
  };
  const Use rebuild{&gate_up, Direction::kForward};
  const Use back[] = {{&gate_up, Direction::kBackward}, {&down, Direction::kBackward}};
  if (saved.gate_up.defined()) return ForEachTile(outer, dx.dim(0), {back[0], back[1]}, tile);
  ForEachTile(outer, dx.dim(0), {rebuild, back[0], back[1]}, tile);
}

void TransformerBlock::BackwardMlpTile(const LayerContext& ctx, SavedBlock saved,
                                       const TensorView& dx) const {
  const int64_t T = dx.dim(0), C = shape.hidden, F = shape.intermediate;
  ArenaScope scope(ctx.arena);
  RebuildGateUp(ctx, &saved);
  const TensorView rows = saved.gate_up;
  const Fp8Rows codes = gate_up.NewCodes(ctx, Direction::kBackward, T);
  {
    ArenaScope mlp_scope(ctx.arena);
    const TensorView dy = OutputGradient(ctx, dx, saved.mlp_out, post_mlp_norm, saved.mlp_out_rstd,
                                         C + down.extension());
    const TensorView dh = ctx.Scratch({T, F});
    down.Backward(ctx, dy, saved.s_down, dh);
    BackwardGate(ctx, saved, dh, dy, codes);
  }
  const TensorView dn2 = ctx.Scratch({T, C});
  if (GateIsOneOp(ctx)) {
    gate_up.BackwardInput(ctx, rows, dn2, codes);
  } else {
    gate_up.Backward(ctx, rows, saved.s_gate_up, dn2, codes);
  }
  gate_up.BackwardWithInput(ctx, rows, Normed(saved.x2, mlp_norm, saved.rstd2), saved.s_gate_up);
  const TensorView dx2 = Columns(dx, 0, C);
  NormaliseBackward(ctx, dn2, saved.x2, mlp_norm, saved.rstd2, dx2, dx2);
}

// The activations are not needed again: their gradients take their place, and h that of dh.
void TransformerBlock::BackwardGate(const LayerContext& ctx, const SavedBlock& saved,
                                    const TensorView& dh, const TensorView& dy,
                                    const Fp8Rows& codes) const {
  const int64_t C = shape.hidden, F = shape.intermediate;
  const TensorView gate = Columns(saved.gate_up, 0, F), up = Columns(saved.gate_up, F, F);
  if (!GateIsOneOp(ctx)) {
    GatedActivationBackward(ctx.exec, {.dh = dh,
                                       .gate = gate,
                                       .up = up,
                                       .dgate = gate,
                                       .dup = up,
                                       .h = dh,
                                       .activation = shape.activation,
                                       .fp8 = codes});
    return down.BackwardWithInput(ctx, dy, dh, saved.s_down);
  }
  LoraBackwardPart parts[kMaxLoraParts];
  GatedLoraBackwardArgs args{
      .dh = dh,
      .activation = shape.activation,
      .lora = gate_up.AdapterBackward(Columns(saved.gate_up, 0, 2 * F), saved.s_gate_up,
                                      Columns(saved.gate_up, 2 * F, gate_up.extension()), parts),
      .down_ds = Columns(dy, C, down.r),
      .down_da = down.da,
      .down_da_scale = down.output_scale,
      .fp8 = codes};
  ArenaScope scope(ctx.arena);
  args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       GatedLoraBackwardWorkspaceBytes(ctx.exec, args));
  GatedLoraBackward(ctx.exec, args);
}

// dx: gradient of x1 + a -> gradient of x1.
void TransformerBlock::BackwardAttention(const LayerContext& ctx, const PackBatch& batch,
                                         const SavedBlock& saved, const TensorView& dx,
                                         const BackwardOptions& options) const {
  const int64_t T = dx.dim(0), C = shape.hidden;
  ArenaScope scope(ctx.arena);
  // What attention works with, and when it is through, the gradients of the rows of qkv.
  TensorView dqkv = AlignedRows(ctx.dtype, T, shape.qkv_size() + qkv.extension());
  const TensorView room =
      ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                          std::max(AlignedBytes(dqkv), AttentionBackwardBytes(ctx, batch, saved)));
  dqkv.data = room.data;
  {
    ArenaScope attention_scope(ctx.arena);
    const TensorView dy = OutputGradient(ctx, dx, saved.attention_out, post_attention_norm,
                                         saved.attention_out_rstd, C + o.extension());
    const TensorView d_o = ctx.Scratch({T, shape.q_size()});
    const TensorView s_o = Columns(saved.o_s, shape.q_size(), o.extension());
    o.Backward(ctx, dy, s_o, d_o);
    o.BackwardWithInput(ctx, dy, SavedO(saved), s_o);
    BackwardHeads(ctx, batch, saved, d_o, room, dqkv);
  }
  const TensorView dn1 = options.want_dx ? ctx.Scratch({T, C}) : TensorView();
  qkv.Backward(ctx, dqkv, saved.s_qkv, dn1);
  qkv.BackwardWithInput(ctx, dqkv, Normed(saved.x1, attention_norm, saved.rstd1), saved.s_qkv);
  if (!options.want_dx) return;
  const TensorView dx1 = Columns(dx, 0, C);
  NormaliseBackward(ctx, dn1, saved.x1, attention_norm, saved.rstd1, dx1, dx1);
}

AttentionBackwardArgs TransformerBlock::AttentionBackwardOf(const PackBatch& batch,
                                                            const SavedBlock& saved,
                                                            const QkvHeads& x,
                                                            const TensorView& d_o,
                                                            const QkvHeads& dx) const {
  return {.q = x.q,
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
}

int64_t TransformerBlock::AttentionBackwardBytes(const LayerContext& ctx, const PackBatch& batch,
                                                 const SavedBlock& saved) const {
  const TensorView rows(nullptr, ctx.dtype, {batch.tokens, shape.q_size()});
  const TensorView kv_rows(nullptr, ctx.dtype, {batch.tokens, shape.kv_size()});
  const QkvHeads heads = HeadsOf(rows, kv_rows, kv_rows, shape);
  return AttentionBackwardWorkspaceBytes(ctx.exec,
                                         AttentionBackwardOf(batch, saved, heads, rows, heads));
}

void TransformerBlock::BackwardHeads(const LayerContext& ctx, const PackBatch& batch,
                                     const SavedBlock& saved, const TensorView& d_o,
                                     const TensorView& workspace, const TensorView& dqkv) const {
  const int64_t T = d_o.dim(0);
  const QkvHeads x = PlaceHeads(ctx, saved);
  if (shape.qk_norm && !heads_saved) PositionHeads(ctx, batch, saved.qkv, x);
  const QkvHeads dx = HeadsOf(ctx.Scratch({T, shape.q_size()}), ctx.Scratch({T, shape.kv_size()}),
                              ctx.Scratch({T, shape.kv_size()}), shape);
  AttentionBackwardArgs args = AttentionBackwardOf(batch, saved, x, d_o, dx);
  args.workspace = workspace;
  AttentionBackward(ctx.exec, args);
  PositionHeadsBackward(ctx, batch, dx, saved.qkv, x, dqkv);
}

}  // namespace attune
