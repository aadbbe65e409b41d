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

// N adjacent elements, loaded and stored at once, as the words that they are: a Pack of 2-byte
// elements that outlives a branch is taken apart by the compiler, and fills a register with each.
template <typename T, int N>
struct Words {
  static_assert(N == 1 || N % 4 == 0);
  static constexpr int kPairs = (N + 1) / 2;  // one of N = 1 has no second
  static constexpr int kWords = N == 1 ? 1 : N * static_cast<int>(sizeof(T)) / 4;
  Pack<uint32_t, kWords> words;

  __device__ static Words Load(const T* p) {
    Words out{};
    if constexpr (N == 1) {
      out.SetPair(0, {ToFloat(*p), 0.0f});
    } else {
      out.words = Pack<uint32_t, kWords>::Load(reinterpret_cast<const uint32_t*>(p));
    }
    return out;
  }
  __device__ void Store(T* p) const {
    if constexpr (N == 1) {
      *p = FromFloat<T>(Pair(0).x);
    } else if constexpr (kWords == 4) {  // said so, since the compiler makes four stores else
      __stwb(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(words));
    } else {
      words.Store(reinterpret_cast<uint32_t*>(p));
    }
  }
  // Elements 2 i and 2 i + 1.
  __device__ float2 Pair(int i) const {
    if constexpr (std::is_same_v<T, Bf16>) {
      return {__uint_as_float(words.v[i] << 16), __uint_as_float(words.v[i] & 0xffff0000u)};
    } else if constexpr (N == 1) {
      return {__uint_as_float(words.v[0]), 0.0f};
    } else {
      return {__uint_as_float(words.v[2 * i]), __uint_as_float(words.v[2 * i + 1])};
    }
  }
  __device__ void SetPair(int i, float2 x) {
    if constexpr (std::is_same_v<T, Bf16>) {
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(x.x, x.y);
      words.v[i] = reinterpret_cast<const uint32_t&>(rounded);
    } else if constexpr (N == 1) {
      words.v[0] = __float_as_uint(x.x);
    } else {
      words.v[2 * i] = __float_as_uint(x.x);
      words.v[2 * i + 1] = __float_as_uint(x.y);
    }
  }
  // max |x|; NaN does not count.
  __device__ float Largest() const {
    if constexpr (std::is_same_v<T, Bf16>) {
      __nv_bfloat162 largest = __float2bfloat162_rn(0.0f);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        largest = __hmax2(largest, __habs2(reinterpret_cast<const __nv_bfloat162&>(words.v[i])));
      }
      return fmaxf(__low2float(largest), __high2float(largest));
    } else {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        largest = fmaxf(largest, fmaxf(fabsf(Pair(i).x), fabsf(Pair(i).y)));
      }
      return largest;
    }
  }
  // Puts the codes of x * inverse at q.
  __device__ void StoreFp8(float inverse, uint8_t* q) const {
    if constexpr (N == 1) {
      *q = Fp8Encode(__fmul_rn(Pair(0).x, inverse));
    } else {
      Pack<uint32_t, N / 4> codes;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const float2 a = Pair(2 * i), b = Pair(2 * i + 1);
        codes.v[i] = Fp8EncodeTwo(__fmul_rn(a.x, inverse), __fmul_rn(a.y, inverse)) |
                     Fp8EncodeTwo(__fmul_rn(b.x, inverse), __fmul_rn(b.y, inverse)) << 16;
      }
      codes.Store(reinterpret_cast<uint32_t*>(q));
    }
  }
};

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
