// How the passes over the gradients of rows are shared out to blocks; a plan asks for it on any
// machine.
//
// Columns are cut into strips, one of each for `runs` blocks, which share out the strip's tiles of
// kPassRows rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int kPassWarps = 16, kPassThreads = 32 * kPassWarps;
constexpr int kPassRows = 16;  // of a tile: one for each warp to copy
static_assert(kPassRows == kPassWarps);

inline int DivideUp(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// Whether a pass over rows of F columns takes rank r and these views of the rows' dtype. By shapes
// alone, so that a plan knows, which does not know of the GPU.
inline bool GatedPassTakes(const Exec& exec, int64_t F, int64_t r,
                           std::initializer_list<const TensorView*> rows) {
  if (exec.device != DeviceKind::kCuda || F == 0 || F % 16 != 0) return false;
  if (r == 0 || r % 8 != 0 || r > 32) return false;
  for (const TensorView* x : rows) {
    if (x->dtype != DType::kBF16 || x->dim(0) == 0) return false;
    if (x->dim(0) > 1 && x->stride(0) % 8 != 0) return false;
  }
  return true;
}

struct PassGrid {
  int strips = 0;  // of all parts
  int runs = 0;    // of tiles
};
// As few runs as keep most of the multiprocessors of an H100 busy; others take as many. More than
// `most` only where strips alone leave room for them.
inline PassGrid PassGridOf(int strips, int most, int64_t tiles) {
  constexpr int kProcessors = 132;
  const int least = std::max(kProcessors / strips, 1);
  PassGrid best;
  double best_share = 0;
  for (int runs = least; runs <= std::max(least, most); ++runs) {
    const int blocks = strips * runs, turns = DivideUp(blocks, kProcessors);
    const double share = static_cast<double>(blocks) / (turns * kProcessors);
    if (share > best_share + 0.1) best = {strips, runs}, best_share = share;
  }
  best.runs = static_cast<int>(std::min<int64_t>(best.runs, std::max<int64_t>(tiles, 1)));
  return best;
}

// GatedLoraForward's, with kGroups times 16 ranks; a warp has 32 columns of a strip.
template <int kGroups>
struct GatedForwardShape {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kWarpColumns = 32;
  static constexpr int kColumns = kPassWarps * kWarpColumns;  // of a strip

  static PassGrid GridOf(int64_t T, int64_t F) {
    return PassGridOf(DivideUp(F, kColumns), 8, DivideUp(T, kPassRows));
  }
  // The partial sums of s, for each strip and row.
  static int64_t Bytes(int64_t T, int64_t F) {
    return 4 * int64_t{DivideUp(F, kColumns)} * T * kRank;
  }
};

// GatedLoraBackward's, with kGroups times 16 ranks. A warp has 16 columns of a strip, or with one
// group twice 16.
template <int kGroups>
struct GatedPassShape {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kWarpBlocks = 2 / kGroups;
  static constexpr int kWarpColumns = 16 * kWarpBlocks;
  static constexpr int kColumns = kPassWarps * kWarpColumns;  // of a strip
  static constexpr int kMatrices = 3;  // whose gradients are summed: B_gate, B_up, A_down

  static PassGrid GridOf(int64_t T, int64_t F) {
    return PassGridOf(DivideUp(F, kColumns), 8, DivideUp(T, kPassRows));
  }
  // The partial sums: of the matrices for each block, of ds for each strip and row.
  static int64_t MatrixSums(const PassGrid& grid) {
    return int64_t{grid.strips} * grid.runs * kMatrices * kColumns * kRank;
  }
  static int64_t Bytes(int64_t T, int64_t F) {
    const PassGrid grid = GridOf(T, F);
    return 4 * (MatrixSums(grid) + grid.strips * T * 2 * kRank);
  }
};

}  // namespace attune
