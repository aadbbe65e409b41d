#include "worker/layers/lora_linear.h"

#include "kernels/dropout/dropout.h"

namespace attune {
namespace {

TensorView Columns(const TensorView& x, int64_t begin, int64_t count) {
  return x.Slice(1, begin, begin + count);
}

DropoutArgs DropoutOf(const LayerContext& ctx, const LoraPart& adapter) {
  return {.step_pack = ctx.dropout.step_pack,
          .p = ctx.dropout.p,
          .seed = ctx.dropout.seed,
          .layer = adapter.layer,
          .module = adapter.module};
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

void LoraLinear::Forward(const LayerContext& ctx, const TensorView& x, const TensorView& y,
                         const TensorView& s) const {
  {
    ArenaScope scope(ctx.arena);
    MatMul(ctx, {.a = x, .b = w->Expand(ctx), .d = y, .trans_b = true});
  }
  for (size_t i = 0; i < adapters.size(); ++i) {
    const LoraPart& adapter = adapters[i];
    const TensorView s_p = Columns(s, static_cast<int64_t>(i) * r, r);
    const TensorView y_p = Columns(y, w->row_begin(adapter.part), w->part_rows(adapter.part));
    ArenaScope scope(ctx.arena);
    MatMul(ctx, {.a = Dropped(ctx, adapter, x), .b = adapter.a, .d = s_p, .trans_b = true});
    MatMul(ctx, {.a = s_p, .b = adapter.b, .d = y_p, .trans_b = true, .alpha = scale, .beta = 1});
  }
}

void LoraLinear::Backward(const LayerContext& ctx, const TensorView& dy, const TensorView& x,
                          const TensorView& s, const TensorView& dx) const {
  const int64_t M = x.dim(0), K = x.dim(1);
  if (dx.defined()) {
    ArenaScope scope(ctx.arena);
    MatMul(ctx, {.a = dy, .b = w->Expand(ctx), .d = dx});
  }
  for (size_t i = 0; i < adapters.size(); ++i) {
    const LoraPart& adapter = adapters[i];
    const TensorView s_p = Columns(s, static_cast<int64_t>(i) * r, r);
    const TensorView dy_p = Columns(dy, w->row_begin(adapter.part), w->part_rows(adapter.part));
    ArenaScope scope(ctx.arena);
    const TensorView ds = ctx.Scratch({M, r});  // carries the scale
    MatMul(ctx, {.a = dy_p, .b = adapter.b, .d = ds, .alpha = scale});
    MatMul(ctx, {.a = dy_p, .b = s_p, .d = adapter.db, .trans_a = true, .alpha = scale, .beta = 1});
    MatMul(ctx,
           {.a = ds, .b = Dropped(ctx, adapter, x), .d = adapter.da, .trans_a = true, .beta = 1});
    if (!dx.defined()) continue;
    if (ctx.dropout.p == 0) {
      MatMul(ctx, {.a = ds, .b = adapter.a, .d = dx, .beta = 1});
      continue;
    }
    DropoutArgs args = DropoutOf(ctx, adapter);
    args.x = ctx.Scratch({M, K});
    MatMul(ctx, {.a = ds, .b = adapter.a, .d = args.x});
    args.y = dx;
    args.accumulate = true;
    Dropout(ctx.exec, args);
  }
}

}  // namespace attune
