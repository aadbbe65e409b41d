// One launch for up to some number of tensors, whose pointers travel as kernel parameters. A block
// of threads takes a piece of one tensor.
#pragma once

#include <cstdint>

#include "kernels/core/cuda.cuh"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int kOptimizerThreads = 256;

struct DeviceScalar {
  const void* data = nullptr;
  bool is_double = false;
  __device__ double Read(double otherwise) const {
    if (data == nullptr) return otherwise;
    return is_double ? *static_cast<const double*>(data)
                     : static_cast<double>(*static_cast<const float*>(data));
  }
};
inline DeviceScalar DeviceScalarOf(const TensorView& x) {
  if (!x.defined()) return {};
  return {x.data, x.dtype == DType::kF64};
}

// Which of `count` tensors piece `block` belongs to; `first` ascends. By halves: a look at a
// parameter takes tens of cycles.
__device__ inline int TensorOf(const int32_t* first, int count, int64_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Puts `tensors` into `b` and launches it as often as it takes. fill(i, tensor) sets element i of
// the batch and returns in how many pieces that tensor is worked on; launch(grid) runs them.
template <int kCount, typename Batch, typename Tensors, typename Fill, typename Launch>
void InBatches(Batch* b, const Tensors& tensors, const Fill& fill, const Launch& launch) {
  int64_t pieces = 0;
  const auto flush = [&] {
    if (pieces == 0) return;
    launch(static_cast<unsigned>(pieces));
    CUDA_CHECK(cudaGetLastError());
    b->count = 0;
    pieces = 0;
  };
  for (const auto& tensor : tensors) {
    const int64_t count = fill(b->count, tensor);
    if (count == 0) continue;
    b->first_piece[b->count++] = static_cast<int32_t>(pieces);
    pieces += count;
    if (b->count == kCount) flush();
  }
  flush();
}

}  // namespace attune
