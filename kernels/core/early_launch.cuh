// Launches of kernels whose blocks may start while the last ones of the kernel before still run:
// ends and beginnings are a twentieth of the time that a small kernel takes. Before compute
// capability 9.0 a kernel starts when the one before has ended.
#pragma once

#include "kernels/core/cuda.cuh"
#include "kernels/core/exec.h"
#include "kernels/core/tensor_core.cuh"

namespace attune {

// Lets the kernel behind this one start.
__device__ inline void LetNextStart() {
  if constexpr (kSm90) cudaTriggerProgrammaticLaunchCompletion();
}
// Until the kernel before has ended: a block calls it before it touches memory.
__device__ inline void AwaitEarlier() {
  if constexpr (kSm90) cudaGridDependencySynchronize();
}

// `grid` blocks of `threads`, which are to call AwaitEarlier.
template <typename... Params, typename... Args>
void LaunchEarly(const Exec& exec, void (*kernel)(Params...), uint32_t grid, uint32_t threads,
                 const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.stream = StreamOf(exec.stream);
  config.attrs = &early;
  config.numAttrs = HasSm90() ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace attune
