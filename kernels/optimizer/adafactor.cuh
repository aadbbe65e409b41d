// What the two ways of Adafactor on CUDA share: by clusters of blocks that keep the gradient in
// their shared memory, and by passes over tiles.
#pragma once

#include "kernels/optimizer/batches.cuh"
#include "kernels/optimizer/pieces.h"

namespace attune {

// A vector is one row here, whose v is v_column; its v_row is null.
struct AdafactorBatch {
  static constexpr int kMost = 350;  // what 32 KiB of parameters hold
  float* param[kMost];
  const float* grad[kMost];
  float* v_row[kMost];
  float* v_column[kMost];
  float* m[kMost];  // or null
  double* sums[kMost];
  double lr[kMost];
  double weight_decay[kMost];
  AdafactorTiles tiles[kMost];
  int32_t first_piece[kMost];  // of the tiles
  int32_t first_line[kMost];   // of the blocks that make averages
  int count = 0;
  // Common to all; rounded from f64 once.
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, clip_threshold;
  bool scale_parameter;
  DeviceScalar grad_scale;
};
static_assert(sizeof(AdafactorBatch) <= 32764);

__device__ inline double Square(float x) {
  return static_cast<double>(x) * static_cast<double>(x);
}

// A matrix, or a vector, whose columns the blocks of a cluster share: each keeps its columns of all
// rows in shared memory.
struct AdafactorStrip {
  static constexpr int kBlocks = 8;

  int32_t rows, columns;

  constexpr int width() const { return (columns + kBlocks - 1) / kBlocks; }  // of a block
  // From a row to the next one, in floats. Rows lie to 16 bytes as they do in global memory.
  constexpr int pitch() const { return (width() + 6) / 4 * 4; }
  // The gradient; in f64 a sum for each row; then factors of rows and of columns.
  constexpr int64_t bytes() const {
    return int64_t{4} * rows * pitch() + int64_t{12} * rows + int64_t{4} * width();
  }
};
// Tensors whose strips have up to `bytes`.
void LaunchAdafactorStrips(const AdafactorBatch& batch, unsigned blocks, int64_t bytes,
                           void* stream);

}  // namespace attune
