// fp8 on CUDA. Every product is rounded on its own (no fused multiply-add), as on the CPU: the bits
// are the same.
#include <cuda_fp8.h>

#include "kernels/core/cuda.cuh"
#include "kernels/fp8/fp8.h"

namespace attune {
namespace {

constexpr int kThreads = 256;

__device__ uint8_t Encode(float v) {
  return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
}
__device__ float Decode(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

struct TwoCodes {
  uint8_t high, low;
  __device__ explicit TwoCodes(float v) : high(Encode(v)), low(Encode(v - Decode(high))) {}
};

// The largest of a block, in every thread.
__device__ float BlockMax(float x) {
  __shared__ float partial[32];
  x = WarpMax(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < (blockDim.x + 31) / 32 ? partial[threadIdx.x % 32] : 0.0f;
  return WarpMax(x);
}

// ---- Rows of activations: a block per row ----

constexpr int kHeld = 4;  // packs of 8 elements that a thread keeps from one reading to the other

template <typename T, int N>
struct alignas(N) Codes {
  uint8_t v[N];
  __device__ Codes(const Pack<T, N>& x, float inverse) {
    if constexpr (N == 1) {
      v[0] = Encode(__fmul_rn(x[0], inverse));
    } else {
      for (int i = 0; i < N; i += 2) {
        const float2 pair{__fmul_rn(x[i], inverse), __fmul_rn(x[i + 1], inverse)};
        const __nv_fp8x2_storage_t codes =
            __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
        v[i] = static_cast<uint8_t>(codes);
        v[i + 1] = static_cast<uint8_t>(codes >> 8);
      }
    }
  }
  __device__ void Store(uint8_t* to) const { *reinterpret_cast<Codes*>(to) = *this; }
};

template <typename T, int N>
__device__ float LargestOf(const Pack<T, N>& x) {
  float largest = 0.0f;
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

template <typename T, int N>
__global__ void QuantizeRowsKernel(const T* x_data, int64_t x_stride, int k, int e, uint8_t* q_data,
                                   int64_t q_stride, int extension, float* scale) {
  const T* x = x_data + blockIdx.x * x_stride;
  uint8_t* q = q_data + blockIdx.x * q_stride;
  const int step = blockDim.x * N, begin = threadIdx.x * N;
  Pack<T, N> held[kHeld];
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = begin + i * step;
    if (c >= k) continue;
    held[i] = Pack<T, N>::Load(x + c);
    largest = fmaxf(largest, LargestOf(held[i]));
  }
  for (int c = begin + kHeld * step; c < k; c += step) {
    largest = fmaxf(largest, LargestOf(Pack<T, N>::Load(x + c)));
  }
  for (int j = threadIdx.x; j < e; j += blockDim.x)
    largest = fmaxf(largest, fabsf(ToFloat(x[k + j])));
  largest = BlockMax(largest);
  if (threadIdx.x == 0) scale[blockIdx.x] = __fdiv_rn(largest, Float8E4M3::kMax);
  const float inverse = largest > 0.0f ? __fdiv_rn(Float8E4M3::kMax, largest) : 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = begin + i * step;
    if (c < k) Codes<T, N>(held[i], inverse).Store(q + c);
  }
  for (int c = begin + kHeld * step; c < k; c += step) {
    Codes<T, N>(Pack<T, N>::Load(x + c), inverse).Store(q + c);
  }
  for (int j = threadIdx.x; j < e; j += blockDim.x) {
    const TwoCodes codes(__fmul_rn(ToFloat(x[k + j]), inverse));
    q[k + j] = q[k + 2 * e + j] = codes.high;
    q[k + e + j] = codes.low;
  }
  for (int j = 3 * e + threadIdx.x; j < extension; j += blockDim.x) q[k + j] = 0;
}

template <typename T, int N>
void QuantizeRows(const Exec& exec, const Fp8QuantizeArgs& a) {
  const int64_t M = a.x.dim(0), K = a.x.dim(1) - a.e;
  if (M == 0) return;
  const int64_t wanted = (K / N + kHeld - 1) / kHeld;
  const unsigned threads =
      static_cast<unsigned>(std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, 1024));
  QuantizeRowsKernel<T, N><<<static_cast<unsigned>(M), threads, 0, StreamOf(exec.stream)>>>(
      Data<const T>(a.x), a.x.stride(0), static_cast<int>(K), static_cast<int>(a.e),
      Data<uint8_t>(a.q), a.q.stride(0), static_cast<int>(Fp8Extension(a.e)), Data<float>(a.scale));
  CUDA_CHECK(cudaGetLastError());
}

// ---- Weights ----

template <typename T>
__global__ __launch_bounds__(kThreads) void WeightScaleKernel(Rows<const T> w, int64_t rows,
                                                              int64_t columns, float* scale) {
  float largest = 0.0f;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
      largest = fmaxf(largest, fabsf(ToFloat(*w(row, c))));
    }
  }
  largest = BlockMax(largest);
  if (threadIdx.x != 0) return;
  // Bits of floats that are not negative ascend as the floats do.
  const float wanted = fmaxf(__fdiv_rn(largest, kFp8WeightRange), kFp8LeastScale);
  atomicMax(reinterpret_cast<int*>(scale), __float_as_int(wanted));
}

__global__ __launch_bounds__(kThreads) void SpreadKernel(float* scale, int64_t n) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i > 0 && i < n) scale[i] = scale[0];
}

constexpr int kTile = 64;

template <typename T>
__global__ __launch_bounds__(kThreads) void QuantizeWeightKernel(Rows<const T> w, int64_t rows,
                                                                 int64_t columns,
                                                                 const float* scale,
                                                                 Rows<uint8_t> q, bool turned) {
  __shared__ uint8_t tile[kTile][kTile + 4];
  const float inverse = __frcp_rn(*scale);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int across = threadIdx.x % kTile;
  for (int down = threadIdx.x / kTile; down < kTile; down += kThreads / kTile) {
    const int64_t row = row0 + down, column = column0 + across;
    if (row >= rows || column >= columns) continue;
    const uint8_t code = Encode(__fmul_rn(ToFloat(*w(row, column)), inverse));
    if (turned) {
      tile[down][across] = code;
    } else {
      *q(row, column) = code;
    }
  }
  if (!turned) return;
  __syncthreads();
  for (int down = threadIdx.x / kTile; down < kTile; down += kThreads / kTile) {
    const int64_t row = row0 + across, column = column0 + down;
    if (row < rows && column < columns) *q(column, row) = tile[across][down];
  }
}

// ---- The adapter's share: a thread per column of a row ----

template <typename T>
struct Extension {
  struct Part {
    const T* a;
    const T* b;
    int64_t begin, end;  // rows of W
  };
  Part part[kMaxLoraParts];
  int parts, r, columns;  // columns: Fp8Extension(parts * r)
  int64_t rows, k;        // rows: of q
  const float* scale;
  Rows<uint8_t> q;
  bool turned;
  float factor;

  __device__ float B(int64_t row, int j) const {
    const Part& x = part[j / r];
    if (row < x.begin || row >= x.end) return 0.0f;
    return __fmul_rn(factor, ToFloat(x.b[(row - x.begin) * r + j % r]));
  }
  __device__ float A(int64_t column, int j) const {
    return ToFloat(part[j / r].a[(j % r) * k + column]);
  }
};

template <typename T>
__global__ __launch_bounds__(kThreads) void ExtendKernel(const __grid_constant__ Extension<T> x) {
  const int e = x.parts * x.r;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / x.columns;
  const int j = static_cast<int>(i - row * x.columns);
  if (row >= x.rows) return;
  uint8_t* out = x.q(row, 0);
  if (j >= 3 * e) out[j] = 0;
  if (j >= e) return;
  const TwoCodes codes(__fmul_rn(x.turned ? x.A(row, j) : x.B(row, j), __frcp_rn(*x.scale)));
  out[j] = out[e + j] = codes.high;
  out[2 * e + j] = codes.low;
}

template <typename T>
void Extend(const Exec& exec, const Fp8ExtendArgs& a) {
  Extension<T> x{};
  x.parts = static_cast<int>(a.parts.size());
  for (int i = 0; i < x.parts; ++i) {
    const LoraExtendPart& part = a.parts[i];
    x.part[i] = {Data<const T>(part.a), Data<const T>(part.b), part.row_begin,
                 part.row_begin + part.b.dim(0)};
  }
  x.r = static_cast<int>(a.parts[0].a.dim(0));
  x.turned = a.transposed;
  const TensorView& out = a.q;
  x.columns = static_cast<int>(out.dim(1));
  x.rows = out.dim(0);
  x.k = a.parts[0].a.dim(1);
  x.scale = Data<const float>(a.scale);
  x.q = RowsOf<uint8_t>(out);
  x.factor = static_cast<float>(a.factor);
  const int64_t elements = x.columns * x.rows;
  if (elements == 0) return;
  const unsigned blocks = static_cast<unsigned>((elements + kThreads - 1) / kThreads);
  ExtendKernel<T><<<blocks, kThreads, 0, StreamOf(exec.stream)>>>(x);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void Fp8QuantizeCuda(const Exec& exec, const Fp8QuantizeArgs& a) {
  const TensorView x = a.x.Slice(1, 0, a.x.dim(1) - a.e), q = a.q.Slice(1, 0, x.dim(1));
  const bool packable = Packable(8, {&x, &q});
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    packable ? QuantizeRows<T, 8>(exec, a) : QuantizeRows<T, 1>(exec, a);
  });
}

void Fp8WeightScaleCuda(const Exec& exec, const Fp8WeightScaleArgs& a) {
  const int64_t n = a.scale.dim(0);
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(a.w.dim(0), 1, 1024));
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    WeightScaleKernel<T><<<blocks, kThreads, 0, StreamOf(exec.stream)>>>(
        RowsOf<const T>(a.w), a.w.dim(0), a.w.dim(1), Data<float>(a.scale));
  });
  CUDA_CHECK(cudaGetLastError());
  const unsigned spread = static_cast<unsigned>((n + kThreads - 1) / kThreads);
  SpreadKernel<<<spread, kThreads, 0, StreamOf(exec.stream)>>>(Data<float>(a.scale), n);
  CUDA_CHECK(cudaGetLastError());
}

void Fp8QuantizeWeightCuda(const Exec& exec, const Fp8QuantizeWeightArgs& a) {
  const int64_t N = a.w.dim(0), K = a.w.dim(1);
  if (N == 0 || K == 0) return;
  const dim3 grid(static_cast<unsigned>((K + kTile - 1) / kTile),
                  static_cast<unsigned>((N + kTile - 1) / kTile));
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    QuantizeWeightKernel<T><<<grid, kThreads, 0, StreamOf(exec.stream)>>>(
        RowsOf<const T>(a.w), N, K, Data<const float>(a.scale), RowsOf<uint8_t>(a.q), a.transposed);
  });
  CUDA_CHECK(cudaGetLastError());
}

void Fp8ExtendCuda(const Exec& exec, const Fp8ExtendArgs& a) {
  DispatchCudaFloat(a.parts[0].a.dtype, [&]<typename T>() { Extend<T>(exec, a); });
}

}  // namespace attune
