// The cluster of blocks of threads that a block belongs to. Before compute capability 9.0 there are
// none: one block is a cluster there, and kernels are to be launched so.
#pragma once

#include <cooperative_groups.h>

namespace attune {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline cooperative_groups::cluster_group ThisCluster() {
  return cooperative_groups::this_cluster();
}
// Arrival at its barrier that orders no accesses to memory: sync() and barrier_arrive() make every
// thread wait for all that it has stored, to global memory too. What a thread has for the other
// blocks, it stores before ClusterFence().
__device__ inline void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ inline void ClusterFence() {
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
}
#else
struct OneBlock {
  __device__ unsigned num_blocks() const { return 1; }
  __device__ unsigned block_rank() const { return 0; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void barrier_wait() const { __syncthreads(); }
  template <typename T>
  __device__ T* map_shared_rank(T* x, unsigned) const {
    return x;
  }
};
__device__ inline OneBlock ThisCluster() {
  return {};
}
__device__ inline void ClusterArriveRelaxed() {}
__device__ inline void ClusterFence() {}
#endif

}  // namespace attune
