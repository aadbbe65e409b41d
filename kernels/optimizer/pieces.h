// The pieces that the CUDA backend cuts long tensors into.
#pragma once

#include <cstdint>

#include "kernels/core/tensor.h"

namespace attune {

constexpr int64_t kCudaPiece = 8192;  // elements that one block of threads takes

// A matrix of Adafactor in tiles, one for each warp: of 128 columns and of at least 64 rows, more
// where there would be many tiles, since each block of threads adds up what all of them gave. A
// vector is one row.
struct AdafactorTiles {
  static constexpr int64_t kColumns = 128, kMinRows = 64, kTarget = 8192;
  static constexpr int64_t kLines = 256;  // rows or columns whose averages a block takes

  int64_t rows, columns;

  static AdafactorTiles Of(const TensorView& x) {
    return x.rank == 1 ? AdafactorTiles{1, x.dim(0)} : AdafactorTiles{x.dim(0), x.dim(1)};
  }
  static constexpr int64_t Ceil(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
  constexpr int64_t across() const { return Ceil(columns, kColumns); }
  // Not by std::max, which takes the addresses of constants: a device has none.
  constexpr int64_t tile_rows() const {
    const int64_t most = kTarget > across() ? kTarget / across() : 1;
    const int64_t even = Ceil(rows, most);
    return even > kMinRows ? even : kMinRows;
  }
  constexpr int64_t down() const { return Ceil(rows, tile_rows()); }
  constexpr int64_t count() const { return across() * down(); }
  constexpr int64_t row_pieces() const { return Ceil(rows, kLines); }
  constexpr int64_t column_pieces() const { return Ceil(columns, kLines); }

  // Sums in f64, one after the other in the workspace: of each row in each tile, (across, rows); of
  // each column, (down, columns); of each kLines averages of rows; of the squares of the
  // directions, and of the parameters, in each tile.
  constexpr int64_t column_sums() const { return across() * rows; }
  constexpr int64_t average_sums() const { return column_sums() + down() * columns; }
  constexpr int64_t direction_sums() const { return average_sums() + row_pieces(); }
  constexpr int64_t param_sums() const { return direction_sums() + count(); }
  constexpr int64_t sums() const { return param_sums() + count(); }
};

}  // namespace attune
