// How LoraBackward's one pass is shared out to blocks, and the room for its partial sums; a plan
// asks for it on any machine.
//
// dy_p is cut into strips of columns, and those into tiles of kTileRows rows, whose chunks of
// kChunkColumns columns are what is copied at a time. A strip has at most as many of them as a
// block of threads has registers for db.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/lora/lora_backward.h"
#include "kernels/lora/lora_pass.h"

namespace attune {

struct LoraBackwardGrid {
  static constexpr int kTileRows = 64, kChunkColumns = 256;
  static constexpr int kMostChunks = 4;  // of a strip

  int width = 0;                     // of sums: 16 or 32
  int strips = 0, strip_chunks = 0;  // a strip has at most as many
  int tiles = 0;                     // of a strip
  int work = 0;                      // chunks of all tiles
  int blocks = 0;                    // each has its share of them, in whole tiles

  LoraBackwardGrid() = default;
  // Of `rows` rows.
  LoraBackwardGrid(const LoraBackwardArgs& a, int64_t rows, int chunks_of_a_strip)
      : width(a.parts[0].b.dim(1) <= 16 ? 16 : 32),
        strip_chunks(chunks_of_a_strip),
        tiles(DivideUp(rows, kTileRows)) {
    int64_t chunks = 0;
    for (const LoraBackwardPart& part : a.parts) {
      strips += DivideUp(part.b.dim(0), strip_columns());
      chunks += DivideUp(part.b.dim(0), kChunkColumns);
    }
    CHECK(tiles * chunks <= (int64_t{1} << 31) / kPassBlocks - 1);  // 32 bits are enough
    work = static_cast<int>(tiles * chunks);
    // Each has a tile, so that none of the slots between two blocks of a strip is left out.
    blocks = std::clamp(work / strip_chunks, 1, kPassBlocks);
  }
  // With the width of strips that has the fewest partial sums: narrow ones have more of ds, wide
  // ones of db.
  static LoraBackwardGrid Of(const LoraBackwardArgs& a) {
    const int64_t T = a.dy.dim(0);
    LoraBackwardGrid best;
    for (int chunks = kMostChunks; chunks > 0; chunks /= 2) {
      const LoraBackwardGrid grid(a, T, chunks);
      if (best.blocks == 0 || grid.Sums(T) < best.Sums(T)) best = grid;
    }
    return best;
  }

  constexpr int64_t strip_columns() const { return int64_t{strip_chunks} * kChunkColumns; }
  // From one pair of strip and block that exists to the next one, one of them grows by one, or
  // both.
  int slots() const { return strips + blocks - 1; }
  // The partial sums, in floats: of db for each slot, of ds for each strip and row.
  int64_t DbSums() const { return slots() * strip_columns() * width; }
  int64_t Sums(int64_t rows) const { return DbSums() + int64_t{strips} * rows * width; }
};

}  // namespace attune
