// Launches of kernels whose blocks may start while the last ones of the kernel before still run:
// ends and beginnings are a twentieth of the time that a small kernel takes. Before compute
// capability 9.0 a kernel starts when the one before has ended.
#pragma once

#include <cuda_runtime.h>

#include "kernels/core/cuda_error.h"

namespace attune {

// Bulk copies, clusters of blocks, and kernels that begin before the one ahead of them has ended
// need compute capability 9.0: what uses them is started where HasSm90, and compiled for
// `if constexpr (kSm90)`.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kSm90 = true;
#else
constexpr bool kSm90 = false;
#endif
inline bool HasSm90() {
  static const bool has = [] {
    int device = 0, major = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major >= 9;
  }();
  return has;
}

// Lets the kernel behind this one start.
__device__ inline void LetNextStart() {
  if constexpr (kSm90) cudaTriggerProgrammaticLaunchCompletion();
}
// Until the kernel before has ended: a block calls it before it touches memory.
__device__ inline void AwaitEarlier() {
  if constexpr (kSm90) cudaGridDependencySynchronize();
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks
};
// What the runtime is told of such a launch. Not to be copied: the configuration has its address.
struct EarlyLaunch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};

  EarlyLaunch(void* stream, const LaunchShape& shape) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {shape.cluster, 1, 1};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = StreamOf(stream);
    config.attrs = attributes;
    config.numAttrs = !HasSm90() ? 0 : shape.cluster > 1 ? 2 : 1;
  }
  EarlyLaunch(const EarlyLaunch&) = delete;
  EarlyLaunch& operator=(const EarlyLaunch&) = delete;
};
// The kernel is to call AwaitEarlier.
template <typename... Params, typename... Args>
void LaunchEarly(void* stream, const LaunchShape& shape, void (*kernel)(Params...),
                 const Args&... args) {
  const EarlyLaunch launch(stream, shape);
  CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, args...));
}

}  // namespace attune
