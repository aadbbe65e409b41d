// WeightPrefetcher: expands the next weight on a stream of its own while the present one is
// multiplied. Two buffers take turns.
//
// Which weight comes next is learnt: a pass (a micro-batch) asks for weights in the order of the
// one before. Where it does not, the weight is expanded when it is asked for; so the guess costs
// time at most, never the result.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/layers/context.h"
#include "worker/layers/frozen_matrix.h"
#include "worker/memory/device.h"

namespace attune {

struct LoraLinear;

class WeightPrefetcher {
 public:
  // Takes the buffers, of `bytes` bytes each, from the arena's bottom. Before the first Acquire of
  // a pass; they are the caller's to release.
  void BeginPass(const LayerContext& ctx, int64_t bytes);

  // The expansion of `linear`, valid until Release. One at a time.
  TensorView Acquire(const LayerContext& ctx, const LoraLinear& linear, Direction direction);
  void Release(const LayerContext& ctx);

 private:
  struct Buffer {
    TensorView memory;
    StreamEvent used;    // by products
    StreamEvent filled;  // by the expansion
  };

  void Fill(const LayerContext& ctx, int64_t position);
  struct Use {
    const LoraLinear* linear;
    Direction direction;
    bool operator==(const Use&) const = default;
  };
  TensorView ExpansionIn(const LayerContext& ctx, const Buffer& buffer, const Use& use) const;

  Buffer buffers_[2];
  void* stream_ = nullptr;
  std::vector<Use> order_;
  int64_t position_ = 0;  // of the next Acquire in order_
  int64_t filled_ = 0;    // positions before it have been filled
};

}  // namespace attune
