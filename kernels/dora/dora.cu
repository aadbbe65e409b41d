// A block per row of V; a thread per element; and for the gradient of the magnitudes a block per 32
// columns, whose warps take every kWarps-th token and add up in the order of the warps.
#include "kernels/core/cuda.cuh"
#include "kernels/dora/dora.h"

namespace attune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__global__ __launch_bounds__(kThreads) void FactorsKernel(Rows<const float> v, int64_t columns,
                                                          const float* magnitude, float* norm,
                                                          float* factor) {
  const int64_t n = blockIdx.x;
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
    const float x = *v(n, c);
    squares += x * x;
  }
  const float length = sqrtf(BlockSum<kThreads>(squares));
  if (threadIdx.x != 0) return;
  norm[n] = length;
  if (factor != nullptr) factor[n] = length > 0.0f ? magnitude[n] / length : 0.0f;
}

template <typename T, int N>
struct Scale {
  static constexpr int kPack = N;
  Rows<const T> x;
  Rows<T> y;
  const float* factor;
  float offset, alpha;
  bool accumulate;
  __device__ void operator()(int64_t row, int64_t c) const {
    Pack<T, N> v = Pack<T, N>::Load(x(row, c));
    const Pack<T, N> before = accumulate ? Pack<T, N>::Load(y(row, c)) : v;
    for (int i = 0; i < N; ++i) {
      const float scaled = alpha * (factor[c + i] + offset) * v[i];
      v.Set(i, accumulate ? before[i] + scaled : scaled);
    }
    v.Store(y(row, c));
  }
};

template <typename T>
__global__ __launch_bounds__(kThreads) void MagnitudeKernel(Rows<const T> dy, Rows<const T> u,
                                                            int64_t tokens, int64_t columns,
                                                            const float* norm, float* dmagnitude,
                                                            float alpha) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (c < columns) {
    for (int64_t t = warp; t < tokens; t += kWarps) sum += ToFloat(*dy(t, c)) * ToFloat(*u(t, c));
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= columns) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  if (norm[c] > 0.0f) dmagnitude[c] += alpha * sum / norm[c];
}

}  // namespace

void DoraFactorsCuda(const Exec& exec, const DoraFactorsArgs& a) {
  if (a.v.dim(0) == 0) return;
  CHECK(a.v.dtype == DType::kF32);
  FactorsKernel<<<static_cast<unsigned>(a.v.dim(0)), kThreads, 0, StreamOf(exec.stream)>>>(
      RowsOf<const float>(a.v), a.v.dim(1), Data<const float>(a.magnitude), Data<float>(a.norm),
      Data<float>(a.factor));
  CUDA_CHECK(cudaGetLastError());
}

void ScaleColumnsCuda(const Exec& exec, const ScaleColumnsArgs& a) {
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(
          Scale<T, N>{RowsOf<const T>(a.x), RowsOf<T>(a.y), Data<const float>(a.factor),
                      static_cast<float>(a.offset), static_cast<float>(a.alpha), a.accumulate},
          a.y.dim(0), a.y.dim(1), exec.stream);
    };
    if (Packable(kPackSize<T>, {&a.x, &a.y})) return run.template operator()<kPackSize<T>>();
    run.template operator()<1>();
  });
}

void DoraMagnitudeBackwardCuda(const Exec& exec, const DoraMagnitudeBackwardArgs& a) {
  const int64_t T = a.dy.dim(0), N = a.dy.dim(1);
  if (N == 0) return;
  DispatchCudaFloat(a.dy.dtype, [&]<typename E>() {
    MagnitudeKernel<E>
        <<<static_cast<unsigned>((N + 31) / 32), kThreads, 0, StreamOf(exec.stream)>>>(
            RowsOf<const E>(a.dy), RowsOf<const E>(a.u), T, N, Data<const float>(a.norm),
            Data<float>(a.dmagnitude), static_cast<float>(a.alpha));
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
