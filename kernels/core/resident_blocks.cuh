// Grids of kernels whose blocks of threads go on to further work themselves.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/core/cuda_error.h"

namespace attune {

// Blocks of threads, each of which takes every so many-th of `units`: as many as run at once.
template <typename... Params>
unsigned ResidentBlocks(void (*kernel)(Params...), int threads, int64_t units) {
  int device = 0, multiprocessors = 0, each = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
  return static_cast<unsigned>(std::min<int64_t>(units, int64_t{each} * multiprocessors));
}

}  // namespace attune
