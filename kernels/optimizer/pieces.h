// The pieces that the CUDA backend cuts long tensors into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/core/check.h"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int64_t kCudaPiece = 8192;  // elements that one block of threads takes

// A matrix of Adafactor in tiles, one for each warp: of 128 columns and of about 2048 elements,
// more where there would be many tiles, since each block of threads adds up what all of them gave.
// A vector is one row.
struct AdafactorTiles {
  static constexpr int64_t kColumns = 128, kElements = 2048, kMost = 8192;
  static constexpr int64_t kLines = 32;  // rows or columns whose averages a warp makes

  int32_t rows, columns;
  int32_t across, down;  // tiles
  int32_t tile_rows;

  static constexpr int64_t Ceil(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
  static AdafactorTiles Of(const TensorView& x) {
    const int64_t rows = x.rank == 1 ? 1 : x.dim(0), columns = x.dim(x.rank - 1);
    CHECK(std::max(rows, columns) <= std::numeric_limits<int32_t>::max());
    if (rows == 0 || columns == 0) return {};
    const int64_t across = Ceil(columns, kColumns);
    const int64_t tile_rows = std::max(Ceil(kElements, std::min(columns, kColumns)),
                                       Ceil(rows, std::max<int64_t>(1, kMost / across)));
    return {static_cast<int32_t>(rows), static_cast<int32_t>(columns), static_cast<int32_t>(across),
            static_cast<int32_t>(Ceil(rows, tile_rows)), static_cast<int32_t>(tile_rows)};
  }
  // Up to kShares warps share what is to be added up for kLines averages.
  static constexpr int64_t kShares = 8;
  static constexpr int64_t Shares(int64_t parts) {
    int64_t shares = 1;
    while (shares < kShares && 2 * shares <= parts) shares *= 2;
    return shares;
  }
  // Of kShares warps each, for the averages of the rows, or columns.
  constexpr int64_t row_blocks() const { return Ceil(row_pieces() * Shares(across), kShares); }
  constexpr int64_t column_blocks() const { return Ceil(column_pieces() * Shares(down), kShares); }
  constexpr int64_t count() const { return int64_t{across} * down; }
  constexpr int64_t row_pieces() const { return (rows + kLines - 1) / kLines; }
  constexpr int64_t column_pieces() const { return (columns + kLines - 1) / kLines; }

  // Sums in f64, one after the other in the workspace: of each row in each tile, (across, rows); of
  // each column, (down, columns); of each kLines averages of rows; of the squares of the
  // directions, and of the parameters, in each tile.
  constexpr int64_t column_sums() const { return int64_t{across} * rows; }
  constexpr int64_t average_sums() const { return column_sums() + int64_t{down} * columns; }
  constexpr int64_t direction_sums() const { return average_sums() + row_pieces(); }
  constexpr int64_t param_sums() const { return direction_sums() + count(); }
  constexpr int64_t sums() const { return param_sums() + count(); }
};

}  // namespace attune
