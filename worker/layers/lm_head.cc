#include "worker/layers/lm_head.h"

#include <algorithm>
#include <vector>

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rows/rows.h"

namespace attune {
namespace {

// How many rows a product of the head may have, ascending, for chunks of T rows: few, so that what
// each needs is planned, and what a library prepares for one is used again. A chunk is filled up
// with rows that have no label.
std::vector<int64_t> ProductRows(int64_t T, int64_t chunk) {
  std::vector<int64_t> out;
  const int64_t step = std::max<int64_t>((chunk / 16 + 63) / 64 * 64, 64);
  for (int64_t rows = step; rows < chunk; rows += step) out.push_back(rows);
  out.push_back(chunk);
  if (T % chunk != 0) out.push_back(T % chunk);  // the last chunk, if every row has a label
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace

int64_t LmHead::ChunkRows(int64_t tokens) const {
  const int64_t room = logits_bytes / (weight.dim(0) * DTypeBytes(weight.dtype));
  if (room >= tokens) return tokens;
  const int64_t most = std::max<int64_t>(room / 64 * 64, 64);
  // As many chunks as it takes, and of whole tiles of a product (Qwen3's vocabulary: 1,664 rows ten
  // times for 1,728, which cost as much as 1,792).
  constexpr int64_t kTile = 128;
  const int64_t chunks = (tokens + most - 1) / most;
  const int64_t rows = ((tokens + chunks - 1) / chunks + kTile - 1) / kTile * kTile;
  return std::min(rows, most);
}

void LmHead::Loss(const LayerContext& ctx, const PackBatch& batch, const LossArgs& args) const {
  const int64_t T = batch.tokens, C = norm.dim(0), V = weight.dim(0);
  const bool want_grad = args.dx.defined();
  const DType stats = ctx.accumulator();
  ArenaScope scope(ctx.arena);
  // All sizes hang on T alone, so the plan holds for every pack.
  const TensorView sum = args.delta;
  const TensorView rstd = ctx.arena->NewScratch(stats, {T});
  const TensorView y = ctx.Scratch({T, C});
  const TensorView rows = ctx.Scratch({T, C});  // normalised rows with a label, then gradients
  RmsNormForward(ctx.exec, {.x = args.x,
                            .delta = args.delta,
                            .sum = sum,
                            .w = norm,
                            .y = y,
                            .rstd = rstd,
                            .eps = rms_norm_eps,
                            .weight_offset = norm_weight_offset});
  GatherRows(ctx.exec, {.x = y, .index = batch.label_rows, .y = rows});
  const int64_t chunk = ChunkRows(T);
  const TensorView logits = ctx.Scratch({chunk, V});
  const TensorView loss = ctx.arena->NewScratch(stats, {chunk});
  const TensorView correct = ctx.arena->NewScratch(DType::kU8, {chunk});
  const std::vector<int64_t> sizes = ProductRows(T, chunk);
  const auto take = [&](int64_t begin, int64_t R) {
    const TensorView x = rows.Slice(0, begin, begin + R);
    const TensorView z = logits.Slice(0, 0, R);
    MatMul(ctx, {.a = x, .b = weight, .d = z, .trans_b = true, .alpha = logit_scale});
    CrossEntropy(ctx.exec, {.logits = z,
                            .targets = batch.labels.Slice(0, begin, begin + R),
                            .loss = loss.Slice(0, 0, R),
                            .correct = correct.Slice(0, 0, R),
                            .grad_scale = args.grad_scale,
                            .softcap = logit_softcap,
                            .label_smoothing = args.label_smoothing,
                            .z_loss = args.z_loss,
                            .want_grad = want_grad});
    SumToScalar(ctx.exec, {.x = loss.Slice(0, 0, R), .out = args.loss, .accumulate = true});
    if (args.correct.defined()) {
      SumToScalar(ctx.exec, {.x = correct.Slice(0, 0, R), .out = args.correct, .accumulate = true});
    }
    if (want_grad && dweight.defined()) {
      MatMul(ctx, {.a = z, .b = x, .d = dweight, .trans_a = true, .alpha = logit_scale, .beta = 1});
    }
    // This chunk's rows are done with: their gradients take their place.
    if (want_grad) MatMul(ctx, {.a = z, .b = weight, .d = x, .alpha = logit_scale});
  };
  if (ctx.exec.plan) {
    for (const int64_t R : sizes) take(0, R);
  } else {
    for (int64_t begin = 0; begin < batch.num_labels; begin += chunk) {
      const int64_t labels = std::min(chunk, batch.num_labels - begin);
      take(begin, *std::lower_bound(sizes.begin(), sizes.end(), labels));
    }
  }
  if (!want_grad) return;
  ScatterRows(ctx.exec, {.y = rows, .index = batch.label_rows, .x = y});
  RmsNormBackwardArgs backward = {.dy = y,
                                  .x = sum,
                                  .rstd = rstd,
                                  .w = norm,
                                  .dx = args.dx,
                                  .weight_offset = norm_weight_offset};
  backward.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                           RmsNormBackwardWorkspaceBytes(ctx.exec, backward));
  RmsNormBackward(ctx.exec, backward);
}

void LmHead::Logits(const LayerContext& ctx, const TensorView& x, const TensorView& delta,
                    int64_t begin, const TensorView& logits) const {
  const int64_t R = logits.dim(0), C = norm.dim(0);
  ArenaScope scope(ctx.arena);
  const TensorView sum = ctx.Scratch({R, C});
  const TensorView y = ctx.Scratch({R, C});
  const TensorView rstd = ctx.arena->NewScratch(ctx.accumulator(), {R});
  RmsNormForward(ctx.exec, {.x = x.Slice(0, begin, begin + R),
                            .delta = delta.Slice(0, begin, begin + R),
                            .sum = sum,
                            .w = norm,
                            .y = y,
                            .rstd = rstd,
                            .eps = rms_norm_eps,
                            .weight_offset = norm_weight_offset});
  MatMul(ctx, {.a = y, .b = weight, .d = logits, .trans_b = true, .alpha = logit_scale});
  if (logit_softcap > 0) SoftCap(ctx.exec, {.x = logits, .cap = logit_softcap});
}

}  // namespace attune
