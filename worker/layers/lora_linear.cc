#include "worker/layers/lora_linear.h"

#include <algorithm>

#include "kernels/dora/dora.h"
#include "kernels/dropout/dropout.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/lora/lora.h"
#include "kernels/lora/normed_gradient.h"
#include "kernels/rms_norm/rms_norm.h"
#include "worker/layers/weight_prefetcher.h"

namespace attune {
namespace {

DropoutArgs DropoutOf(const LayerContext& ctx, const LoraPart& adapter) {
  return {.step_pack = ctx.dropout.step_pack,
          .p = ctx.dropout.p,
          .seed = ctx.dropout.seed,
          .layer = adapter.layer,
          .module = adapter.module,
          .first_row = ctx.dropout.first_row};
}

// dropout(x), in scratch; x itself where dropout is off.
TensorView Dropped(const LayerContext& ctx, const LoraPart& adapter, const TensorView& x) {
  if (ctx.dropout.p == 0) return x;
  DropoutArgs args = DropoutOf(ctx, adapter);
  args.x = x;
  args.y = ctx.Scratch({x.dim(0), x.dim(1)});
  Dropout(ctx.exec, args);
  return args.y;
}

}  // namespace

int64_t LoraLinear::extension() const {
  return LoraExtension(static_cast<int64_t>(adapters.size()), r);
}

bool LoraLinear::Fused(const LayerContext& ctx) const {
  if (adapters.empty() || IsDora()) return false;
  return w->fp8() || (ctx.fused_lora && ctx.dropout.p == 0);
}

TensorView LoraLinear::RowsOf(const LoraPart& adapter, const TensorView& expansion) const {
  const int64_t begin = w->row_begin(adapter.part);
  return Columns(expansion.Slice(0, begin, begin + w->part_rows(adapter.part)), 0, w->in());
}

std::array<LoraExtendPart, kMaxLoraParts> LoraLinear::ExtendParts() const {
  std::array<LoraExtendPart, kMaxLoraParts> parts;
  CHECK(adapters.size() <= kMaxLoraParts);
  for (size_t i = 0; i < adapters.size(); ++i) {
    parts[i] = {adapters[i].a, adapters[i].b, w->row_begin(adapters[i].part)};
  }
  return parts;
}

TensorView LoraLinear::RoomOf(Direction direction) const {
  const int64_t i = static_cast<int64_t>(direction);
  return room.Slice(0, i, i + 1);
}

void LoraLinear::Extend(const LayerContext& ctx, Direction direction,
                        const TensorView& expansion) const {
  const std::array<LoraExtendPart, kMaxLoraParts> parts = ExtendParts();
  const bool backward = direction == Direction::kBackward;
  if (w->fp8()) {
    return Fp8Extend(
        ctx.exec, {.parts = {parts.data(), adapters.size()},
                   .scale = w->scale(),
                   .room = RoomOf(direction),
                   .q = Columns(expansion, backward ? w->rows() : w->in(), Fp8Extension(columns())),
                   .transposed = backward,
                   .factor = scale});
  }
  LoraExtend(ctx.exec, {.parts = {parts.data(), adapters.size()},
                        .w = expansion,
                        .scale = scale,
                        .beside = !backward,
                        .below = backward});
}

void LoraLinear::FillExpansion(const LayerContext& ctx, Direction direction,
                               const TensorView& expansion) const {
  w->ExpandInto(ctx, direction, expansion);
  if (Fused(ctx)) Extend(ctx, direction, expansion);
}

// The one for the other direction serves as well where they are the same: W alone.
const HeldExpansion* LoraLinear::Held(const LayerContext& ctx, Direction direction) const {
  const HeldExpansion* held = ctx.held;
  const bool differs = w->fp8() || Fused(ctx);
  while (held != nullptr && (held->linear != this || (differs && held->direction != direction))) {
    held = held->outer;
  }
  return held;
}

void LoraLinear::Hold(Direction direction, HeldExpansion* held, LayerContext* ctx) const {
  if (w->expanded() || ctx->prefetcher != nullptr || Held(*ctx, direction) != nullptr) return;
  const HeldExpansion* other =
      Held(*ctx, direction == Direction::kForward ? Direction::kBackward : Direction::kForward);
  if (other != nullptr && !w->fp8()) {  // W is there
    Extend(*ctx, direction, other->expansion);
    *held = {this, direction, other->expansion, ctx->held};
  } else {
    *held = {this, direction, Expand(*ctx, direction), ctx->held};
  }
  ctx->held = held;
}

TensorView LoraLinear::Expand(const LayerContext& ctx, Direction direction) const {
  if (w->expanded()) return w->Expand(ctx, direction);
  if (const HeldExpansion* held = Held(ctx, direction)) return held->expansion;
  if (ctx.prefetcher != nullptr) return ctx.prefetcher->Acquire(ctx, *this, direction);
  const TensorView expansion = w->Expand(ctx, direction);
  if (Fused(ctx)) Extend(ctx, direction, expansion);
  return expansion;
}

void LoraLinear::GiveBack(const LayerContext& ctx) const {
  if (!w->expanded() && ctx.prefetcher != nullptr) ctx.prefetcher->Release(ctx);
}

bool LoraLinear::Extends(const LayerContext& ctx) const {
  return w->expanded() && !w->fp8() && !adapters.empty() && !IsDora() && ctx.fused_lora;
}

void LoraLinear::Refresh(const LayerContext& ctx) const {
  if (IsDora()) {
    ArenaScope scope(ctx.arena);
    const TensorView expansion = w->Expand(ctx, Direction::kForward);
    for (const LoraPart& adapter : adapters) MeasureRows(ctx, adapter, expansion, true);
    return;
  }
  if (!w->expanded() || adapters.empty() || !w->fp8()) return;
  for (Direction direction : {Direction::kForward, Direction::kBackward}) {
    Extend(ctx, direction, w->Expand(ctx, direction));
  }
}

void LoraLinear::ResetMagnitudes(const LayerContext& ctx) const {
  if (!IsDora()) return;
  ArenaScope scope(ctx.arena);
  const TensorView expansion = w->Expand(ctx, Direction::kForward);
  for (const LoraPart& adapter : adapters) {
    MeasureRows(ctx, adapter, expansion, false);
    Copy(ctx.exec, {.x = adapter.norm, .y = adapter.magnitude});
  }
}

// In pieces, so that rows in f32 stay few.
void LoraLinear::MeasureRows(const LayerContext& ctx, const LoraPart& adapter,
                             const TensorView& expansion, bool with_adapter) const {
  constexpr int64_t kPieceElements = int64_t{1} << 20;
  const TensorView w_p = RowsOf(adapter, expansion);
  const int64_t N = w_p.dim(0), K = w_p.dim(1);
  const int64_t step = std::min(N, std::max<int64_t>(1, kPieceElements / K));
  ArenaScope scope(ctx.arena);
  const TensorView piece = ctx.arena->NewScratch(ctx.accumulator(), {step, K});
  for (int64_t begin = 0; begin < N; begin += step) {
    const int64_t end = std::min(begin + step, N);
    const TensorView v = piece.Slice(0, 0, end - begin);
    Copy(ctx.exec, {.x = w_p.Slice(0, begin, end), .y = v});
    DoraFactorsArgs args = {.v = v, .norm = adapter.norm.Slice(0, begin, end)};
    if (with_adapter) {
      MatMul(
          ctx,
          {.a = adapter.b.Slice(0, begin, end), .b = adapter.a, .d = v, .alpha = scale, .beta = 1});
      args.magnitude = adapter.magnitude.Slice(0, begin, end);
      args.factor = adapter.factor.Slice(0, begin, end);
    }
    DoraFactors(ctx.exec, args);
  }
}

void LoraLinear::Forward(const LayerContext& ctx, const TensorView& x_s, const TensorView& y,
                         const Fp8Rows& codes, bool has_s) const {
  Multiply(ctx, x_s, y, codes, has_s);
  if (bias.defined()) Add(ctx.exec, {.x = bias, .y = y, .alpha = output_scale});
}

void LoraLinear::Multiply(const LayerContext& ctx, const TensorView& x_s, const TensorView& y,
                          const Fp8Rows& codes, bool has_s) const {
  const int64_t K = w->in(), N = w->rows(), E = extension();
  const TensorView x = Columns(x_s, 0, K), s = Columns(x_s, K, E);
  ArenaScope scope(ctx.arena);
  if (w->fp8()) {
    if (!has_s) MultiplyA(ctx, x, s);
    const TensorView used = Columns(x_s, 0, K + columns());
    return MultiplyFp8(ctx, Direction::kForward, used, columns(), codes, y);
  }
  if (Fused(ctx)) {
    if (!has_s) MultiplyA(ctx, x, s);
    const TensorView w_b = Expand(ctx, Direction::kForward).Slice(0, 0, N);
    MatMul(ctx, {.a = x_s, .b = w_b, .d = y, .trans_b = true, .alpha = output_scale});
    return GiveBack(ctx);
  }
  const TensorView expansion = Expand(ctx, Direction::kForward);
  MatMul(ctx, {.a = x,
               .b = Columns(expansion.Slice(0, 0, N), 0, K),
               .d = y,
               .trans_b = true,
               .alpha = output_scale});
  const bool drops_dora = IsDora() && ctx.dropout.p > 0;  // multiplies with W once more
  if (!drops_dora) GiveBack(ctx);
  if (!has_s) MultiplyA(ctx, x, s);
  for (size_t i = 0; i < adapters.size(); ++i) {
    const LoraPart& adapter = adapters[i];
    const TensorView s_p = Columns(s, static_cast<int64_t>(i) * r, r);
    const TensorView y_p = Columns(y, w->row_begin(adapter.part), w->part_rows(adapter.part));
    if (drops_dora) {
      ArenaScope part_scope(ctx.arena);
      AddDroppedDora(ctx, adapter, Dropped(ctx, adapter, x), s_p, RowsOf(adapter, expansion), y_p);
      continue;
    }
    MatMul(ctx, {.a = s_p,
                 .b = adapter.b,
                 .d = y_p,
                 .trans_b = true,
                 .alpha = output_scale * scale,
                 .beta = 1});
    if (IsDora()) ScaleColumns(ctx.exec, {.x = y_p, .factor = adapter.factor, .y = y_p});
  }
  if (drops_dora) GiveBack(ctx);
}

void LoraLinear::AddDroppedDora(const LayerContext& ctx, const LoraPart& adapter,
                                const TensorView& x, const TensorView& s_p, const TensorView& w_p,
                                const TensorView& y_p) const {
  const TensorView u = ctx.Scratch({y_p.dim(0), y_p.dim(1)});
  ScaleColumnsArgs add = {.x = u,
                          .factor = adapter.factor,
                          .y = y_p,
                          .offset = -1,
                          .alpha = output_scale,
                          .accumulate = true};
  MatMul(ctx, {.a = x, .b = w_p, .d = u, .trans_b = true});
  ScaleColumns(ctx.exec, add);
  add.offset = 0;
  MatMul(ctx, {.a = s_p, .b = adapter.b, .d = u, .trans_b = true, .alpha = scale});
  ScaleColumns(ctx.exec, add);
}

void LoraLinear::Backward(const LayerContext& ctx, const TensorView& dy_ds, const TensorView& s,
                          const TensorView& dx, const Fp8Rows& codes) const {
  const int64_t N = w->rows();
  if (IsDora()) {
    ArenaScope scope(ctx.arena);
    return BackwardDora(ctx, dy_ds, s, dx);
  }
  BackwardB(ctx, Columns(dy_ds, 0, N), s, Columns(dy_ds, N, extension()));
  if (dx.defined()) BackwardInput(ctx, dy_ds, dx, codes);
}

void LoraLinear::BackwardInput(const LayerContext& ctx, const TensorView& dy_ds,
                               const TensorView& dx, const Fp8Rows& codes) const {
  const int64_t K = w->in(), N = w->rows();
  const TensorView dy = Columns(dy_ds, 0, N), ds = Columns(dy_ds, N, extension());
  ArenaScope scope(ctx.arena);
  if (w->fp8()) {
    // With dropout the adapter's share of dx goes through the mask.
    const int64_t e = ctx.dropout.p == 0 ? columns() : 0;
    MultiplyFp8(ctx, Direction::kBackward, Columns(dy_ds, 0, N + e), e, codes, dx);
    if (e == 0) AddAdapterInputGradient(ctx, ds, dx);
    return;
  }
  if (Fused(ctx)) {
    const TensorView w_a = Columns(Expand(ctx, Direction::kBackward), 0, K);
    MatMul(ctx, {.a = dy_ds, .b = w_a, .d = dx, .alpha = output_scale});
    return GiveBack(ctx);
  }
  {
    ArenaScope expansion_scope(ctx.arena);
    const TensorView w_rows = Columns(Expand(ctx, Direction::kBackward).Slice(0, 0, N), 0, K);
    MatMul(ctx, {.a = dy, .b = w_rows, .d = dx, .alpha = output_scale});
    GiveBack(ctx);
  }
  AddAdapterInputGradient(ctx, ds, dx);
}

void LoraLinear::MultiplyA(const LayerContext& ctx, const TensorView& x,
                           const TensorView& s) const {
  if (adapters.empty()) return;
  if (s.dim(1) > columns()) {
    Fill(ctx.exec, {.x = Columns(s, columns(), s.dim(1) - columns())});
  }
  if (ctx.dropout.p == 0) {
    return MatMul(ctx, {.a = x, .b = a, .d = Columns(s, 0, columns()), .trans_b = true});
  }
  for (size_t i = 0; i < adapters.size(); ++i) {
    ArenaScope scope(ctx.arena);
    MatMul(ctx, {.a = Dropped(ctx, adapters[i], x),
                 .b = adapters[i].a,
                 .d = Columns(s, static_cast<int64_t>(i) * r, r),
                 .trans_b = true});
  }
}

bool LoraLinear::IsPlain(const LayerContext& ctx) const {
  return static_cast<int>(adapters.size()) == w->parts() && ctx.dropout.p == 0 && !IsDora();
}

LoraBackwardArgs LoraLinear::AdapterBackward(const TensorView& dy, const TensorView& s,
                                             const TensorView& ds,
                                             LoraBackwardPart (&parts)[kMaxLoraParts]) const {
  CHECK(adapters.size() <= kMaxLoraParts);
  for (size_t i = 0; i < adapters.size(); ++i) {
    parts[i] = {adapters[i].b, adapters[i].db, w->row_begin(adapters[i].part)};
  }
  return {.parts = {parts, adapters.size()},
          .dy = dy,
          .s = s,
          .ds = ds,
          .scale = scale,
          .db_scale = output_scale * scale};
}

void LoraLinear::BackwardB(const LayerContext& ctx, const TensorView& dy, const TensorView& s,
                           const TensorView& ds) const {
  if (adapters.empty()) return;
  LoraBackwardPart parts[kMaxLoraParts];
  LoraBackwardArgs args = AdapterBackward(dy, s, ds, parts);
  ArenaScope scope(ctx.arena);
  args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       LoraBackwardWorkspaceBytes(ctx.exec, args));
  LoraBackward(ctx.exec, args);
}

Fp8Rows LoraLinear::CodesScratch(const LayerContext& ctx, Direction direction, int64_t rows,
                                 int64_t e) const {
  const int64_t columns =
      (direction == Direction::kForward ? w->in() : w->rows()) + Fp8Extension(e);
  return {.q = Columns(ctx.arena->NewScratch(DType::kF8E4M3, {rows, Fp8RowStride(columns)}), 0,
                       columns),
          .scale = ctx.arena->NewScratch(DType::kF32, {rows})};
}

Fp8Rows LoraLinear::NewCodes(const LayerContext& ctx, Direction direction, int64_t rows) const {
  if (!w->fp8() || ctx.dropout.p > 0) return {};
  return CodesScratch(ctx, direction, rows, columns());
}

void LoraLinear::MultiplyFp8(const LayerContext& ctx, Direction direction, const TensorView& x,
                             int64_t e, const Fp8Rows& codes, const TensorView& y) const {
  ArenaScope scope(ctx.arena);
  const Fp8Rows to = codes.defined() ? codes : CodesScratch(ctx, direction, x.dim(0), e);
  const TensorView beside = e > 0 ? RoomOf(direction) : TensorView();
  if (!codes.defined()) {
    Fp8Quantize(ctx.exec, {.x = x, .e = e, .room = beside, .q = to.q, .scale = to.scale});
  } else if (e > 0) {
    Fp8QuantizeAdapter(ctx.exec, {.x = x, .e = e, .room = beside, .q = to.q, .scale = to.scale});
  }
  MatMul(ctx, {.a = to.q,
               .b = Columns(Expand(ctx, direction), 0, to.q.dim(1)),
               .d = y,
               .trans_b = true,
               .alpha = output_scale,
               .a_scale = to.scale,
               .b_scale = w->scale().Slice(0, 0, y.dim(1))});
  GiveBack(ctx);
}

// With dropout g o dy reaches x through the dropped rows alone: dx = c dy W + dropout(c (((g - 1) o
// dy) W + ds A)); without it dx = c ((g o dy) W + ds A). ds = scale (g o dy) B.
void LoraLinear::BackwardDora(const LayerContext& ctx, const TensorView& dy_ds, const TensorView& s,
                              const TensorView& dx) const {
  const int64_t K = w->in(), N = w->rows(), T = dy_ds.dim(0);
  const TensorView dy = Columns(dy_ds, 0, N), ds = Columns(dy_ds, N, extension());
  const bool drops = ctx.dropout.p > 0;
  const TensorView scaled = ctx.Scratch({T, N});  // g o dy; dy where there is no adapter
  Copy(ctx.exec, {.x = dy, .y = scaled});
  for (const LoraPart& adapter : adapters) {
    const int64_t begin = w->row_begin(adapter.part), rows = w->part_rows(adapter.part);
    const TensorView scaled_p = Columns(scaled, begin, rows);
    ScaleColumns(ctx.exec, {.x = scaled_p, .factor = adapter.factor, .y = scaled_p});
  }
  BackwardB(ctx, scaled, s, ds);
  if (!dx.defined()) return;
  const TensorView expansion = Expand(ctx, Direction::kBackward);
  MatMul(ctx, {.a = drops ? dy : scaled,
               .b = Columns(expansion.Slice(0, 0, N), 0, K),
               .d = dx,
               .alpha = output_scale});
  for (size_t i = 0; i < adapters.size() && drops; ++i) {
    const LoraPart& adapter = adapters[i];
    const int64_t begin = w->row_begin(adapter.part), rows = w->part_rows(adapter.part);
    const TensorView rest = Columns(scaled, begin, rows);  // (g - 1) o dy
    ScaleColumns(
        ctx.exec,
        {.x = Columns(dy, begin, rows), .factor = adapter.factor, .y = rest, .offset = -1});
    ArenaScope scope(ctx.arena);
    DropoutArgs args = DropoutOf(ctx, adapter);
    args.x = ctx.Scratch({T, K});
    MatMul(ctx, {.a = rest, .b = RowsOf(adapter, expansion), .d = args.x, .alpha = output_scale});
    args.y = dx;
    args.accumulate = true;
    Dropout(ctx.exec, args);
  }
  GiveBack(ctx);
  AddAdapterInputGradient(ctx, ds, dx);
}

void LoraLinear::BackwardMagnitudes(const LayerContext& ctx, const TensorView& dy,
                                    const TensorView& x, const TensorView& s) const {
  ArenaScope scope(ctx.arena);
  const TensorView expansion = Expand(ctx, Direction::kForward);
  for (size_t i = 0; i < adapters.size(); ++i) {
    const LoraPart& adapter = adapters[i];
    ArenaScope part_scope(ctx.arena);
    const TensorView dy_p = Columns(dy, w->row_begin(adapter.part), w->part_rows(adapter.part));
    const TensorView u = ctx.Scratch({dy_p.dim(0), dy_p.dim(1)});
    MatMul(
        ctx,
        {.a = Dropped(ctx, adapter, x), .b = RowsOf(adapter, expansion), .d = u, .trans_b = true});
    MatMul(ctx, {.a = Columns(s, static_cast<int64_t>(i) * r, r),
                 .b = adapter.b,
                 .d = u,
                 .trans_b = true,
                 .alpha = scale,
                 .beta = 1});
    DoraMagnitudeBackward(ctx.exec, {.dy = dy_p,
                                     .u = u,
                                     .norm = adapter.norm,
                                     .dmagnitude = adapter.dmagnitude,
                                     .alpha = output_scale});
  }
  GiveBack(ctx);
}

void LoraLinear::AddAdapterInputGradient(const LayerContext& ctx, const TensorView& ds,
                                         const TensorView& dx) const {
  for (size_t i = 0; i < adapters.size(); ++i) {
    const LoraPart& adapter = adapters[i];
    const TensorView ds_p = Columns(ds, static_cast<int64_t>(i) * r, r);
    ArenaScope scope(ctx.arena);
    if (ctx.dropout.p == 0) {
      MatMul(ctx, {.a = ds_p, .b = adapter.a, .d = dx, .alpha = output_scale, .beta = 1});
      continue;
    }
    DropoutArgs args = DropoutOf(ctx, adapter);
    args.x = ctx.Scratch({dx.dim(0), dx.dim(1)});
    MatMul(ctx, {.a = ds_p, .b = adapter.a, .d = args.x, .alpha = output_scale});
    args.y = dx;
    args.accumulate = true;
    Dropout(ctx.exec, args);
  }
}

void LoraLinear::BackwardWithInput(const LayerContext& ctx, const TensorView& dy_ds,
                                   const TensorView& x, const TensorView& s) const {
  const int64_t N = w->rows(), parts = static_cast<int64_t>(adapters.size());
  const TensorView dy = Columns(dy_ds, 0, N), ds = Columns(dy_ds, N, extension());
  if (IsDora()) BackwardMagnitudes(ctx, dy, x, s);
  if (ctx.dropout.p == 0 && parts > 0) {
    return MatMul(ctx, {.a = Columns(ds, 0, parts * r),
                        .b = x,
                        .d = da,
                        .trans_a = true,
                        .alpha = output_scale,
                        .beta = 1});
  }
  for (int64_t i = 0; i < parts; ++i) {
    ArenaScope scope(ctx.arena);
    MatMul(ctx, {.a = Columns(ds, i * r, r),
                 .b = Dropped(ctx, adapters[i], x),
                 .d = adapters[i].da,
                 .trans_a = true,
                 .alpha = output_scale,
                 .beta = 1});
  }
}

void LoraLinear::BackwardWithInput(const LayerContext& ctx, const TensorView& dy_ds,
                                   const NormedInput& x, const TensorView& s) const {
  if (adapters.empty()) return;
  ArenaScope scope(ctx.arena);
  if (ctx.dropout.p > 0 || IsDora()) {
    const TensorView n = ctx.Scratch({x.stream.dim(0), w->in()});
    RmsNormRebuild(
        ctx.exec,
        {.x = x.stream, .rstd = x.rstd, .w = x.w, .y = n, .weight_offset = x.weight_offset});
    return BackwardWithInput(ctx, dy_ds, n, s);
  }
  NormedGradientArgs args{.ds = Columns(dy_ds, w->rows(), columns()),
                          .x = x.stream,
                          .rstd = x.rstd,
                          .w = x.w,
                          .da = da,
                          .weight_offset = x.weight_offset,
                          .scale = output_scale};
  args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       NormedGradientWorkspaceBytes(ctx.exec, args));
  NormedGradient(ctx.exec, args);
}

}  // namespace attune
