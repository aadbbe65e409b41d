// Tiles of a matrix copied by the tensor memory accelerator: from global to shared memory and back,
// one instruction for a box of up to 256 rows and kBoxColumns columns (sm_90; PTX ISA,
// "cp.async.bulk.tensor"; CUDA driver API, "cuTensorMapEncodeTiled"). What of a box lies outside of
// the matrix is zero in shared memory, and is not written back.
//
// In shared memory the rows of a box are kBoxColumns apart, and the 16 bytes of number i of a row
// are at i ^ (row % 8): eight rows of the same column are in different banks. Boxes begin at
// multiples of 1024 bytes there.
#pragma once

#include <cuda.h>

#include "kernels/core/tensor_core.cuh"

namespace attune {

constexpr int kBoxColumns = 64;

// Where (row, column) is in a box, in elements; columns in multiples of 8.
__device__ inline int BoxPlace(int row, int column) {
  return row * kBoxColumns + ((column / 8) ^ (row % 8)) * 8;
}

// Of a matrix (rows, columns) whose address and stride (in elements) are multiples of 16 bytes.
inline CUtensorMap BoxesOf(const Bf16* data, int64_t rows, int64_t columns, int64_t stride,
                           int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      CudaFailed(__FILE__, __LINE__, "cuTensorMapEncodeTiled", "the driver does not have it");
    }
    return reinterpret_cast<Encode>(f);
  }();
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  // Of a single row it says nothing, but has to be valid.
  const cuuint64_t bytes[1] = {2 * static_cast<cuuint64_t>(rows > 1 ? stride : columns + 7) / 16 *
                               16};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<Bf16*>(data), size, bytes, box,
             step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    CudaFailed(__FILE__, __LINE__, "cuTensorMapEncodeTiled", "address, stride or size");
  }
  return map;
}

// A kernel's first use of a map waits for it: by one thread, before there is something to copy.
__device__ inline void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// By one thread, of a map in the kernel's parameters. The whole box counts for the barrier.
__device__ inline void LoadBox(Bf16* to, const CUtensorMap& map, int row, int column,
                               uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(barrier))
      : "memory");
}
// For what is read once and large: what is made of it stays in the L2 cache instead.
__device__ inline uint64_t ReadOncePolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void LoadBox(Bf16* to, const CUtensorMap& map, int row, int column,
                               uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
// Belongs to the group that the next CommitBulkStores ends.
__device__ inline void StoreBox(const CUtensorMap& map, int row, int column, const Bf16* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(SharedAddress(from))
      : "memory");
}

}  // namespace attune
