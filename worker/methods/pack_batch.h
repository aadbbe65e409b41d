// From a Pack on the host to a PackBatch on the device.
#pragma once

#include "worker/data/packing.h"
#include "worker/layers/batch.h"
#include "worker/layers/context.h"
#include "worker/memory/device.h"
#include "worker/model/model.h"

namespace attune {

// Documents that a pack of T tokens may hold. Hangs on T alone, so buffers do.
int64_t MaxSegments(int64_t tokens);

// The device buffers of one pack, filled again for each.
class PackBuffers {
 public:
  // Room for packs of `tokens` tokens on the arena's bottom. `ropes`: the model's, which outlives
  // the buffers.
  PackBuffers(const LayerContext& ctx, int64_t tokens, const std::vector<RotaryEmbedding>& ropes);

  // Copies the pack and computes the rope tables. `pack` is not looked at on the plan device, and
  // may be forgotten on return. It waits for the upload before the last.
  PackBatch Upload(const LayerContext& ctx, const Pack& pack) const;

  // A chunk of one sequence that continues behind `cache_begin` keys, for generation. `is_long`:
  // positions are told as in a document that is too long for the usual frequencies.
  PackBatch UploadChunk(const LayerContext& ctx, absl::Span<const int32_t> ids, int64_t cache_begin,
                        bool is_long) const;

 private:
  AttentionSegments SegmentsFor(int64_t segments) const;
  // Tables of the rows [begin, end) of the batch.
  void Rope(const LayerContext& ctx, const PackBatch& batch, int64_t begin, int64_t end,
            bool is_long) const;
  void RopeOfDocuments(const LayerContext& ctx, const PackBatch& batch, const Pack& pack) const;

  const std::vector<RotaryEmbedding>& ropes_;
  PackBatch batch_;
  // i32: all that comes from the host. A kernel fetches it from pinned memory: a copy of its own
  // would have to take turns with those of activations, which may wait for what comes after it.
  TensorView numbers_;
  struct Slot {
    PinnedMemory memory;
    StreamEvent fetched;
  };
  mutable Slot slots_[2];
  mutable int64_t uploads_ = 0;
};

}  // namespace attune
