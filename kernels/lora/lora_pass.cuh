// What the passes over the gradients of rows share on the device.
#pragma once

#include "kernels/core/tensor_core.cuh"
#include "kernels/lora/lora_pass.h"

namespace attune {

// The tiles of a block, and its strip.
struct PassRun {
  int strip, begin, end;
};
__device__ inline PassRun RunOf(const PassGrid& grid, int tiles, int block) {
  const int run = block / grid.strips;
  return {block % grid.strips, static_cast<int>(int64_t{run} * tiles / grid.runs),
          static_cast<int>(int64_t{run + 1} * tiles / grid.runs)};
}

// Adds up `count` times four sums, `stride` apart.
__device__ inline Pack<float, 4> SumOf(const float* from, int64_t stride, int count) {
  using P = Pack<float, 4>;
  P sum = P::Load(from);
#pragma unroll 8
  for (int i = 1; i < count; ++i) {
    const P next = P::Load(from + i * stride);
    for (int k = 0; k < 4; ++k) sum.v[k] += next.v[k];
  }
  return sum;
}

// A thread per pack, 256 to a block. The blocks may start while the last of the kernel before still
// run; they wait for its end.
template <typename Params>
void LaunchBehind(const Exec& exec, void (*kernel)(Params), const Params& x, int64_t packs) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(DivideUp(packs, 256)));
  config.blockDim = dim3(256);
  config.stream = StreamOf(exec.stream);
  config.attrs = &early;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, x));
}

}  // namespace attune
