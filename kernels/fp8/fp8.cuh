// Codes on the device, for every kernel that makes them. Products are rounded on their own (no
// fused multiply-add), as on the CPU: the bits are the same.
#pragma once

#include <cuda_fp8.h>

#include "kernels/core/cuda.cuh"
#include "kernels/fp8/fp8.h"

namespace attune {

ATTUNE_BACKENDS(Fp8Quantize);

__device__ inline uint8_t Fp8Encode(float v) {
  return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
}
// The first in the lower byte.
__device__ inline uint32_t Fp8EncodeTwo(float first, float second) {
  return __nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, __NV_E4M3);
}

// Puts the codes of x * inverse at q.
template <typename T, int N>
__device__ void StoreFp8(const Pack<T, N>& x, float inverse, uint8_t* q) {
  if constexpr (N == 1) {
    *q = Fp8Encode(__fmul_rn(x[0], inverse));
  } else {
    static_assert(N % 4 == 0);
    Pack<uint32_t, N / 4> words;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      words.v[i / 4] = Fp8EncodeTwo(__fmul_rn(x[i], inverse), __fmul_rn(x[i + 1], inverse)) |
                       Fp8EncodeTwo(__fmul_rn(x[i + 2], inverse), __fmul_rn(x[i + 3], inverse))
                           << 16;
    }
    words.Store(reinterpret_cast<uint32_t*>(q));
  }
}

// max |x|; NaN does not count.
template <typename T, int N>
__device__ float LargestOf(const Pack<T, N>& x) {
  if constexpr (std::is_same_v<T, Bf16> && N % 2 == 0) {
    __nv_bfloat162 largest = __habs2(__nv_bfloat162(x.v[0], x.v[1]));
#pragma unroll
    for (int i = 2; i < N; i += 2) {
      largest = __hmax2(largest, __habs2(__nv_bfloat162(x.v[i], x.v[i + 1])));
    }
    return fmaxf(fmaxf(0.0f, __low2float(largest)), __high2float(largest));
  } else {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
  }
}

// The largest of a block (of the first dimension), in every thread. Once in a kernel.
__device__ inline float BlockMax(float x) {
  __shared__ float partial[32];
  x = WarpMax(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < (blockDim.x + 31) / 32 ? partial[threadIdx.x % 32] : 0.0f;
  return WarpMax(x);
}

__device__ inline float Fp8ScaleOf(float largest) {
  return __fdiv_rn(largest, Float8E4M3::kMax);
}
__device__ inline float Fp8InverseOf(float scale) {
  return scale >= kFp8LeastRowScale ? __frcp_rn(scale) : 0.0f;
}

// Fp8Rows as a kernel sees them.
struct Fp8RowsOut {
  Rows<uint8_t> q;
  float* scale;
};
inline Fp8RowsOut Fp8RowsOutOf(const Fp8Rows& rows) {
  return {RowsOf<uint8_t>(rows.q), Data<float>(rows.scale)};
}
// True if codes can be stored in packs of n.
inline bool Fp8Packable(int64_t n, const Fp8Rows& rows) {
  const auto bytes = static_cast<uintptr_t>(n);
  return reinterpret_cast<uintptr_t>(rows.q.data) % bytes == 0 && rows.q.stride(0) % n == 0;
}

}  // namespace attune
