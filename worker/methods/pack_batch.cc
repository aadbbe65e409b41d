#include "worker/methods/pack_batch.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/elementwise/elementwise.h"
#include "kernels/rope/rope.h"

namespace attune {
namespace {

void Upload32(const LayerContext& ctx, const std::vector<int32_t>& values, const TensorView& to) {
  CHECK(static_cast<int64_t>(values.size()) <= to.size());
  CopyToDevice(ctx.exec, values.data(), to.Slice(0, 0, static_cast<int64_t>(values.size())));
}

}  // namespace

int64_t MaxSegments(int64_t tokens) {
  return std::clamp<int64_t>(tokens / 4, 1, 1024);
}

PackBuffers::PackBuffers(const LayerContext& ctx, int64_t tokens,
                         const std::vector<RotaryEmbedding>& ropes)
    : ropes_(ropes) {
  const auto room = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWorkspace, dtype, shape);
  };
  const int64_t S = MaxSegments(tokens);
  // Each begins where a block of the arena would.
  constexpr int64_t kAligned = Arena::kAlignment / static_cast<int64_t>(sizeof(int32_t));
  int64_t end = 0;
  std::vector<std::pair<TensorView*, int64_t>> places;
  const auto number = [&](TensorView* view, int64_t n) {
    *view = TensorView(nullptr, DType::kI32, {n});
    places.emplace_back(view, end);
    end += (n + kAligned - 1) / kAligned * kAligned;
  };
  batch_.tokens = tokens;
  AttentionSegments& segments = batch_.segments;
  number(&batch_.ids, tokens);
  number(&batch_.positions, tokens);
  number(&batch_.label_rows, tokens);
  number(&batch_.labels, tokens);
  number(&segments.num_segments, 1);
  number(&segments.q_begin, S + 1);
  number(&segments.k_begin, S);
  number(&segments.k_length, S);
  number(&segments.q_offset, S);
  numbers_ = room(DType::kI32, {end});
  for (const auto& [view, begin] : places) {
    *view = numbers_.Slice(0, begin, begin + view->dim(0));
  }
  for (Slot& slot : slots_) {
    if (!ctx.exec.plan) CHECK(slot.memory.Allocate(ctx.exec.device, numbers_.bytes()).ok());
  }
  for (size_t i = 0; i < ropes.size(); ++i) {
    const int64_t half = ropes[i].inverse_frequencies.size();
    batch_.rotary[i] = {room(ctx.accumulator(), {tokens, half}),
                        room(ctx.accumulator(), {tokens, half})};
  }
}

void PackBuffers::Rope(const LayerContext& ctx, const PackBatch& batch, int64_t begin, int64_t end,
                       bool is_long) const {
  for (size_t i = 0; i < ropes_.size(); ++i) {
    const RotaryEmbedding& rope = ropes_[i];
    const bool other = is_long && rope.long_inverse_frequencies.defined();
    RopeTable(ctx.exec,
              {.positions = batch.positions.Slice(0, begin, end),
               .inv_freq = other ? rope.long_inverse_frequencies : rope.inverse_frequencies,
               .cos = batch.rotary[i].cos.Slice(0, begin, end),
               .sin = batch.rotary[i].sin.Slice(0, begin, end),
               .attention_scaling = rope.attention_factor});
  }
}

// A document's length decides, not the pack's: a pack gives each what it gives alone.
void PackBuffers::RopeOfDocuments(const LayerContext& ctx, const PackBatch& batch,
                                  const Pack& pack) const {
  Rope(ctx, batch, 0, batch.tokens, /*is_long=*/false);
  for (const RotaryEmbedding& rope : ropes_) {
    if (!rope.long_inverse_frequencies.defined()) continue;
    for (int32_t s = 0; s < pack.num_segments; ++s) {
      const int64_t begin = pack.q_begin[s], end = pack.q_begin[s + 1];
      if (end - begin > rope.long_after) Rope(ctx, batch, begin, end, /*is_long=*/true);
    }
  }
}

// Capacities come in few sizes, so that backends which prepare for one prepare seldom.
AttentionSegments PackBuffers::SegmentsFor(int64_t segments) const {
  AttentionSegments out = batch_.segments;
  const int64_t most = out.k_begin.dim(0);
  int64_t capacity = 32;
  while (capacity < segments) capacity *= 4;
  capacity = std::min(capacity, most);
  out.q_begin = out.q_begin.Slice(0, 0, capacity + 1);
  for (TensorView* view : {&out.k_begin, &out.k_length, &out.q_offset}) {
    *view = view->Slice(0, 0, capacity);
  }
  out.whole = true;
  return out;
}

PackBatch PackBuffers::Upload(const LayerContext& ctx, const Pack& pack) const {
  PackBatch batch = batch_;
  if (ctx.exec.plan) {
    batch.segments.whole = true;
    Rope(ctx, batch, 0, batch.tokens, /*is_long=*/false);
    return batch;
  }
  const int32_t S = pack.num_segments;
  batch.segments = SegmentsFor(S);
  CHECK(static_cast<int64_t>(pack.ids.size()) == batch.tokens);
  CHECK(S <= MaxSegments(batch.tokens));
  Slot& slot = slots_[uploads_++ % 2];
  slot.fetched.Wait();
  const TensorView numbers(slot.memory.data(), DType::kI32, {numbers_.dim(0)});
  const auto at = [&](const TensorView& view) {
    return numbers.As<int32_t>() + (view.As<int32_t>() - numbers_.As<int32_t>());
  };
  std::copy(pack.ids.begin(), pack.ids.end(), at(batch.ids));
  std::copy(pack.positions.begin(), pack.positions.end(), at(batch.positions));
  *at(batch.segments.num_segments) = S;
  std::copy_n(pack.q_begin.begin(), S + 1, at(batch.segments.q_begin));
  std::copy_n(pack.q_begin.begin(), S, at(batch.segments.k_begin));
  for (int32_t s = 0; s < S; ++s) {
    at(batch.segments.k_length)[s] = pack.q_begin[s + 1] - pack.q_begin[s];
  }
  std::fill_n(at(batch.segments.q_offset), S, 0);
  int32_t *const rows = at(batch.label_rows), *const labels = at(batch.labels);
  std::fill_n(rows, batch.tokens, -1);
  std::fill_n(labels, batch.tokens, -1);
  batch.num_labels = 0;
  for (int64_t t = 0; t < batch.tokens; ++t) {
    if (pack.targets[t] < 0) continue;
    rows[batch.num_labels] = static_cast<int32_t>(t);
    labels[batch.num_labels++] = pack.targets[t];
  }
  Copy(ctx.exec, {.x = numbers, .y = numbers_});
  slot.fetched.Record(ctx.exec);
  RopeOfDocuments(ctx, batch, pack);
  return batch;
}

PackBatch PackBuffers::UploadChunk(const LayerContext& ctx, absl::Span<const int32_t> ids,
                                   int64_t cache_begin, bool is_long) const {
  PackBatch batch = batch_;
  const int64_t n = ctx.exec.plan ? batch.tokens : static_cast<int64_t>(ids.size());
  CHECK(n <= batch.tokens);
  batch.tokens = n;
  batch.ids = batch.ids.Slice(0, 0, n);
  batch.positions = batch.positions.Slice(0, 0, n);
  for (size_t i = 0; i < ropes_.size(); ++i) {
    batch.rotary[i] = {batch.rotary[i].cos.Slice(0, 0, n), batch.rotary[i].sin.Slice(0, 0, n)};
  }
  if (!ctx.exec.plan) {
    const int32_t length = static_cast<int32_t>(n), begin = static_cast<int32_t>(cache_begin);
    std::vector<int32_t> positions(n);
    for (int32_t i = 0; i < length; ++i) positions[i] = begin + i;
    Upload32(ctx, std::vector<int32_t>(ids.begin(), ids.end()), batch.ids);
    Upload32(ctx, positions, batch.positions);
    Upload32(ctx, {1}, batch.segments.num_segments);
    Upload32(ctx, {0, length}, batch.segments.q_begin);
    Upload32(ctx, {0}, batch.segments.k_begin);
    Upload32(ctx, {begin + length}, batch.segments.k_length);
    Upload32(ctx, {begin}, batch.segments.q_offset);
  }
  Rope(ctx, batch, 0, n, is_long);
  return batch;
}

}  // namespace attune
