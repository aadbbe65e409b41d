#include "worker/layers/weight_prefetcher.h"

#include "worker/layers/lora_linear.h"

namespace attune {

void WeightPrefetcher::BeginPass(const LayerContext& ctx, int64_t bytes) {
  if (stream_ == nullptr && !ctx.exec.plan) stream_ = NewStream(ctx.exec.device);
  for (Buffer& buffer : buffers_) {
    buffer.memory = ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kWorkspace, bytes);
    buffer.used.Record(ctx.exec);  // whatever was in this memory, and the adapters' update
  }
  position_ = 0;
  filled_ = 0;
}

TensorView WeightPrefetcher::ExpansionIn(const LayerContext& ctx, const Buffer& buffer,
                                         const LoraLinear& linear) const {
  TensorView out = linear.w->ExpansionShape(ctx);
  CHECK(out.bytes() <= buffer.memory.bytes());
  out.data = buffer.memory.data;
  return out;
}

void WeightPrefetcher::Fill(const LayerContext& ctx, int64_t position) {
  Buffer& buffer = buffers_[position % 2];
  LayerContext side = ctx;
  side.exec.stream = stream_;
  side.exec.trace = nullptr;
  buffer.used.MakeWait(side.exec);
  order_[position]->FillExpansion(side, ExpansionIn(ctx, buffer, *order_[position]));
  buffer.filled.Record(side.exec);
  filled_ = position + 1;
}

TensorView WeightPrefetcher::Acquire(const LayerContext& ctx, const LoraLinear& linear) {
  const bool guessed =
      position_ < static_cast<int64_t>(order_.size()) && order_[position_] == &linear;
  if (!guessed) {
    order_.resize(position_);
    order_.push_back(&linear);
  }
  Buffer& buffer = buffers_[position_ % 2];
  CHECK(buffer.holder == nullptr);
  if (!guessed || filled_ <= position_) Fill(ctx, position_);
  buffer.holder = &linear;
  buffer.filled.MakeWait(ctx.exec);
  ++position_;
  const bool other_is_free = buffers_[position_ % 2].holder == nullptr;
  if (position_ < static_cast<int64_t>(order_.size()) && other_is_free) Fill(ctx, position_);
  return ExpansionIn(ctx, buffer, linear);
}

void WeightPrefetcher::Release(const LayerContext& ctx, const LoraLinear& linear) {
  for (Buffer& buffer : buffers_) {
    if (buffer.holder != &linear) continue;
    buffer.holder = nullptr;
    buffer.used.Record(ctx.exec);
  }
}

}  // namespace attune
