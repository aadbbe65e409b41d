// From a Pack on the host to a PackBatch on the device.
#pragma once

#include "worker/data/packing.h"
#include "worker/layers/batch.h"
#include "worker/layers/context.h"

namespace attune {

// Documents that a pack of T tokens may hold. Hangs on T alone, so buffers do.
int64_t MaxSegments(int64_t tokens);

// The device buffers of one pack, filled again for each.
class PackBuffers {
 public:
  // Room for packs of `tokens` tokens on the arena's bottom.
  PackBuffers(const LayerContext& ctx, int64_t tokens, int64_t head_dim);

  // Copies the pack and computes the rope table. `pack` is not looked at on the plan device.
  PackBatch Upload(const LayerContext& ctx, const Pack& pack,
                   const TensorView& inverse_frequencies) const;

  // A chunk of one sequence that continues behind `cache_begin` keys, for generation.
  PackBatch UploadChunk(const LayerContext& ctx, absl::Span<const int32_t> ids, int64_t cache_begin,
                        const TensorView& inverse_frequencies) const;

 private:
  AttentionSegments SegmentsFor(int64_t segments) const;
  void Rope(const LayerContext& ctx, const PackBatch& batch,
            const TensorView& inverse_frequencies) const;

  PackBatch batch_;
};

}  // namespace attune
