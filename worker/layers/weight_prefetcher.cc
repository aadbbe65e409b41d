#include "worker/layers/weight_prefetcher.h"

#include "worker/layers/lora_linear.h"

namespace attune {

void WeightPrefetcher::BeginPass(const LayerContext& ctx, int64_t bytes, int64_t gather_bytes) {
  if (stream_ == nullptr && !ctx.exec.plan) stream_ = NewStream(ctx.exec.device);
  for (Buffer& buffer : buffers_) {
    buffer.memory = ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kWorkspace, bytes);
    buffer.used.Record(ctx.exec);  // whatever was in this memory, and the adapters' update
  }
  gather_memory_ = {};
  if (gather_bytes > 0) {
    gather_memory_ = ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kWorkspace, gather_bytes);
  }
  position_ = 0;
  filled_ = 0;
}

TensorView WeightPrefetcher::ExpansionIn(const LayerContext& ctx, const Buffer& buffer,
                                         const Use& use) const {
  TensorView out = use.linear->w->ExpansionShape(ctx, use.direction);
  CHECK(AlignedBytes(out) <= buffer.memory.bytes());
  out.data = buffer.memory.data;
  return out;
}

void WeightPrefetcher::Fill(const LayerContext& ctx, int64_t position) {
  Buffer& buffer = buffers_[position % 2];
  LayerContext side = ctx;
  side.exec.stream = stream_;
  side.exec.trace = nullptr;
  side.gather_memory = gather_memory_;
  buffer.used.MakeWait(side.exec);
  const Use& use = order_[position];
  use.linear->FillExpansion(side, use.direction, ExpansionIn(ctx, buffer, use));
  buffer.filled.Record(side.exec);
  filled_ = position + 1;
}

TensorView WeightPrefetcher::Acquire(const LayerContext& ctx, const LoraLinear& linear,
                                     Direction direction) {
  const Use use{&linear, direction};
  const bool guessed = position_ < static_cast<int64_t>(order_.size()) && order_[position_] == use;
  if (!guessed) {
    order_.resize(position_);
    order_.push_back(use);
  }
  if (!guessed || filled_ <= position_) Fill(ctx, position_);
  const Buffer& buffer = buffers_[position_ % 2];
  buffer.filled.MakeWait(ctx.exec);
  ++position_;
  if (position_ < static_cast<int64_t>(order_.size())) Fill(ctx, position_);
  return ExpansionIn(ctx, buffer, use);
}

void WeightPrefetcher::Release(const LayerContext& ctx) {
  buffers_[(position_ + 1) % 2].used.Record(ctx.exec);
}

}  // namespace attune
