// A block per row of V; a thread per pack; and for the gradient of the magnitudes a cluster of
// blocks per kAcross packs of columns, whose threads take every so many tokens and add up in their
// order.
#include "kernels/core/cluster.cuh"
#include "kernels/core/cuda.cuh"
#include "kernels/dora/dora.h"

namespace attune {
namespace {

constexpr int kThreads = 256;
constexpr int kAcross = 8, kDown = kThreads / kAcross;
constexpr int kMostCluster = 8;

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
    const Pack<float, N> factors = Pack<float, N>::Load(factor + c);
    for (int i = 0; i < N; ++i) {
      const float scaled = alpha * (factors[i] + offset) * v[i];
      v.Set(i, accumulate ? before[i] + scaled : scaled);
    }
    v.Store(y(row, c));
  }
};

template <typename T>
struct Magnitude {
  Rows<const T> dy, u;
  int64_t tokens, columns;
  const float* norm;
  float* dmagnitude;
  float alpha;
};

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void MagnitudeKernel(const Magnitude<T> x) {
  constexpr int kColumns = kAcross * N;
  __shared__ float sums[kDown][kColumns];
  __shared__ float of_block[kColumns];
  const auto cluster = ThisCluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int across = threadIdx.x % kAcross * N, down = threadIdx.x / kAcross;
  const int64_t begin = int64_t{blockIdx.x / blocks} * kColumns;
  Pack<float, N> sum{};
  AwaitEarlier();
  if (begin + across < x.columns) {
#pragma unroll 4
    for (int64_t t = rank * kDown + down; t < x.tokens; t += blocks * kDown) {
      const auto dy = Pack<T, N>::Load(x.dy(t, begin + across));
      const auto u = Pack<T, N>::Load(x.u(t, begin + across));
      for (int i = 0; i < N; ++i) sum.v[i] += dy[i] * u[i];
    }
  }
  for (int i = 0; i < N; ++i) sums[down][across + i] = sum.v[i];
  __syncthreads();
  if (threadIdx.x < kColumns) {
    float total = 0.0f;
    for (int k = 0; k < kDown; ++k) total += sums[k][threadIdx.x];
    of_block[threadIdx.x] = total;
  }
  cluster.sync();
  const int64_t c = begin + threadIdx.x;
  if (rank == 0 && threadIdx.x < kColumns && c < x.columns && x.norm[c] > 0.0f) {
    float total = 0.0f;
    for (int k = 0; k < blocks; ++k) total += cluster.map_shared_rank(of_block, k)[threadIdx.x];
    x.dmagnitude[c] += x.alpha * total / x.norm[c];
  }
  cluster.sync();  // until the first block has read the others' memory
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
    if (Packable(kPackSize<T>, {&a.x, &a.y, &a.factor})) {
      return run.template operator()<kPackSize<T>>();
    }
    run.template operator()<1>();
  });
}

void DoraMagnitudeBackwardCuda(const Exec& exec, const DoraMagnitudeBackwardArgs& a) {
  const int64_t T = a.dy.dim(0), N = a.dy.dim(1);
  if (N == 0) return;
  DispatchCudaFloat(a.dy.dtype, [&]<typename E>() {
    const Magnitude<E> x{
        RowsOf<const E>(a.dy),     RowsOf<const E>(a.u),       T, N, Data<const float>(a.norm),
        Data<float>(a.dmagnitude), static_cast<float>(a.alpha)};
    const auto run = [&]<int kPack>() {
      const unsigned blocks = HasSm90() ? kMostCluster : 1;
      const int64_t strips = (N + kAcross * kPack - 1) / (kAcross * kPack);
      LaunchEarly(exec.stream,
                  {dim3(static_cast<unsigned>(strips) * blocks), dim3(kThreads), 0, blocks},
                  MagnitudeKernel<E, kPack>, x);
    };
    Packable(kPackSize<E>, {&a.dy, &a.u}) ? run.template operator()<kPackSize<E>>()
                                          : run.template operator()<1>();
  });
}

}  // namespace attune
