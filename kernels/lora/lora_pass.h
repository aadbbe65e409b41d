// How the passes over the gradients of rows are shared out to blocks; a plan asks for it on any
// machine.
//
// Columns are cut into strips, and those into tiles of kPassRows rows, or of as many as a pass
// says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int kPassWarps = 16, kPassThreads = 32 * kPassWarps;
// A block for each multiprocessor of an H100; others take as many, so that sums are the same.
constexpr int kPassBlocks = 132;
// Of what the passes take; beyond, there is more to add up than to read.
constexpr int kMaxPassRank = 32;
constexpr int kPassRows = 16;  // of a tile: one for each warp to copy
static_assert(kPassRows == kPassWarps);

inline bool PassTakesRank(int64_t r) {
  return r > 0 && r % 8 == 0 && r <= kMaxPassRank;
}

inline int DivideUp(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// Whether a pass over rows of F columns takes rank r and these views of the rows' dtype. By shapes
// alone, so that a plan knows, which does not know of the GPU.
inline bool GatedPassTakes(const Exec& exec, int64_t F, int64_t r,
                           std::initializer_list<const TensorView*> rows) {
  if (exec.device != DeviceKind::kCuda || F == 0 || F % 16 != 0) return false;
  if (!PassTakesRank(r)) return false;
  for (const TensorView* x : rows) {
    if (x->dtype != DType::kBF16 || x->dim(0) == 0) return false;
    if (x->dim(0) > 1 && x->stride(0) % 8 != 0) return false;
  }
  return true;
}

// The tiles of all strips in a row, of which each block takes an equal share: some of a strip, or
// of several. What it adds up of a strip goes into a slot of its own.
struct PassGrid {
  int strips = 0;  // of all parts
  int tiles = 0;   // of a strip
  int blocks = 0;

  // From one pair of strip and block that exists to the next one, one of them grows by one, or
  // both.
  int slots() const { return strips + blocks - 1; }
};
inline PassGrid PassGridOf(int strips, int64_t rows, int tile_rows = kPassRows) {
  const int tiles = DivideUp(rows, tile_rows);
  CHECK(int64_t{strips} * tiles <= (int64_t{1} << 31) / kPassBlocks - 1);  // 32 bits are enough
  return {strips, tiles, static_cast<int>(std::min<int64_t>(kPassBlocks, int64_t{strips} * tiles))};
}

// GatedLoraForward's, with kGroups times 16 ranks; a warp has 32 columns of a strip.
template <int kGroups>
struct GatedForwardShape {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kWarpColumns = 32;
  static constexpr int kColumns = kPassWarps * kWarpColumns;  // of a strip

  static PassGrid GridOf(int64_t T, int64_t F) { return PassGridOf(DivideUp(F, kColumns), T); }
  // The partial sums of s, for each strip and row.
  static int64_t Bytes(int64_t T, int64_t F) {
    return 4 * int64_t{DivideUp(F, kColumns)} * T * kRank;
  }
};

// GatedLoraBackward's, with kGroups times 16 ranks. A warpgroup has every other panel of a strip;
// how many is what its registers hold the gradients of.
template <int kGroups>
struct GatedPassShape {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kTileRows = 64, kPanelWidth = 64;
  static constexpr int kWarpgroups = 2;
  static constexpr int kPanels = kGroups == 1 ? 4 : 3;                  // of a warpgroup
  static constexpr int kColumns = kWarpgroups * kPanels * kPanelWidth;  // of a strip
  static constexpr int kMatrices = 3;  // whose gradients are summed: B_gate, B_up, A_down

  static PassGrid GridOf(int64_t T, int64_t F) {
    return PassGridOf(DivideUp(F, kColumns), T, kTileRows);
  }
  // The partial sums: of the matrices for each slot, of ds for each strip and row.
  static int64_t MatrixSums(const PassGrid& grid) {
    return int64_t{grid.slots()} * kMatrices * kColumns * kRank;
  }
  static int64_t Bytes(int64_t T, int64_t F) {
    const PassGrid grid = GridOf(T, F);
    return 4 * (MatrixSums(grid) + grid.strips * T * 2 * kRank);
  }
};

}  // namespace attune
