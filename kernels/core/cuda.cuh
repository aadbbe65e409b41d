// What the kernels are made of: element types on the device, packs of 16 bytes, sums over a block
// in a fixed order, and the launch of an operation over the elements of a matrix.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/core/cuda_error.h"
#include "kernels/core/dispatch.h"
#include "kernels/core/early_launch.cuh"

namespace attune {

using Bf16 = __nv_bfloat16;

// Calls f.operator()<T>() with the device type of a dtype that CUDA ops compute in.
template <typename F>
void DispatchCudaFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kBF16:
      return f.template operator()<Bf16>();
    default:
      CHECK(false && "the CUDA backend computes in f32 and bf16");
  }
}
// The same with f64, for ops that move data.
template <typename F>
void DispatchCudaFloat64(DType dtype, F&& f) {
  if (dtype == DType::kF64) return f.template operator()<double>();
  DispatchCudaFloat(dtype, f);
}

template <typename T>
T* Data(const TensorView& x) {
  return static_cast<T*>(x.data);
}

__device__ inline float ToFloat(float x) {
  return x;
}
__device__ inline float ToFloat(Bf16 x) {
  return __bfloat162float(x);
}
template <typename T>
__device__ T FromFloat(float x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// A pair of bf16 in a word; the first one is the lower half.
__device__ inline uint32_t RoundedPair(float2 x) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(x.x, x.y);
  return reinterpret_cast<const uint32_t&>(rounded);
}
__device__ inline float2 PairAsFloats(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// N adjacent elements, loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T v[N];

  __device__ static Pack Load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ void Store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }
  __device__ float operator[](int i) const { return ToFloat(v[i]); }
  __device__ void Set(int i, float x) { v[i] = FromFloat<T>(x); }
};

// Elements of a pack of 16 bytes.
template <typename T>
constexpr int kPackSize = 16 / sizeof(T);

// True if rows of every view can be read in packs of n elements.
inline bool Packable(int64_t n, std::initializer_list<const TensorView*> views) {
  for (const TensorView* x : views) {
    if (!x->defined()) continue;
    const int64_t width = DTypeBytes(x->dtype);
    const int64_t bytes = std::min<int64_t>(16, n * width);
    if (reinterpret_cast<uintptr_t>(x->data) % bytes != 0) return false;
    if (x->dim(x->rank - 1) % n != 0) return false;
    for (int i = 0; i + 1 < x->rank; ++i) {
      if (x->dim(i) > 1 && x->stride(i) * width % bytes != 0) return false;
    }
  }
  return true;
}

// ---- Reductions ----

__device__ inline float WarpSum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline double WarpSum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float WarpMax(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// The sum over the kThreads threads of a block (of the first dimension), in every thread.
template <int kThreads, typename A>
__device__ A BlockSum(A x) {
  x = WarpSum(x);
  if constexpr (kThreads > 32) {
    __shared__ A partial[kThreads / 32];
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = A(0);
    for (int w = 0; w < kThreads / 32; ++w) x += partial[w];
    __syncthreads();  // before the next use of `partial`
  }
  return x;
}

// ---- One operation per element ----

template <typename Op>
__global__ __launch_bounds__(256) void ForEachPackKernel(Op op, int64_t rows, int64_t packs) {
  const int64_t pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pack >= packs) return;
  AwaitEarlier();
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    op(row, pack * Op::kPack);
  }
}

// Calls op(row, column) for each row and each multiple of Op::kPack below `columns`.
template <typename Op>
void ForEachPack(const Op& op, int64_t rows, int64_t columns, void* stream) {
  if (rows == 0 || columns == 0) return;
  const int64_t packs = columns / Op::kPack;
  unsigned width = 1;
  while (width < 256 && width < packs) width *= 2;
  const dim3 block(width, 256 / width);
  const int64_t grid_y = std::min<int64_t>((rows + block.y - 1) / block.y, 65535);
  const dim3 grid(static_cast<unsigned>((packs + width - 1) / width),
                  static_cast<unsigned>(grid_y));
  LaunchEarly(stream, {grid, block}, ForEachPackKernel<Op>, op, rows, packs);
}

// A matrix as a kernel sees it. A vector is one row; a contiguous view of any rank may be, too.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* operator()(int64_t row, int64_t column) const {
    return data + row * stride + column;
  }
};
template <typename T>
Rows<T> RowsOf(const TensorView& x) {
  return {static_cast<T*>(x.data), x.rank == 2 && x.dim(0) > 1 ? x.stride(0) : 0};
}

}  // namespace attune
