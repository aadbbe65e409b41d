#include <algorithm>
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/dora/dora.h"

namespace attune {
namespace {

// Columns that a thread sums at a time.
constexpr int64_t kColumns = 64;

template <typename A>
ATTUNE_CLONES A SquaresOfRow(const A* x, int64_t n) {
  LaneSum<A> sum;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] += x[c + i] * x[c + i];
  }
  for (int i = 0; c < n; ++c, ++i) sum.lane[i] += x[c] * x[c];
  return sum.Total();
}

template <typename A>
void Factors(const DoraFactorsArgs& a) {
  const int64_t N = a.v.dim(0), K = a.v.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(N * K))
  for (int64_t n = 0; n < N; ++n) {
    const A norm = std::sqrt(SquaresOfRow(a.v.As<A>() + n * a.v.stride(0), K));
    a.norm.As<A>()[n] = norm;
    if (!a.factor.defined()) continue;
    a.factor.As<A>()[n] = norm > 0 ? a.magnitude.As<A>()[n] / norm : A(0);
  }
}

template <typename T, typename A>
ATTUNE_CLONES void ScaleRow(const T* x, const A* factor, A offset, A alpha, bool accumulate, T* y,
                            int64_t n) {
  if (accumulate) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      StoreRounded<T>(ToAccumulator(y[c]) + alpha * (factor[c] + offset) * ToAccumulator(x[c]),
                      &y[c]);
    }
    return;
  }
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    StoreRounded<T>(alpha * (factor[c] + offset) * ToAccumulator(x[c]), &y[c]);
  }
}

template <typename T>
void Scale(const ScaleColumnsArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t rows = a.x.dim(0), N = a.x.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(rows * N))
  for (int64_t t = 0; t < rows; ++t) {
    ScaleRow<T, A>(a.x.As<T>() + t * a.x.stride(0), a.factor.As<A>(), static_cast<A>(a.offset),
                   static_cast<A>(a.alpha), a.accumulate, a.y.As<T>() + t * a.y.stride(0), N);
  }
}

template <typename T, typename A>
ATTUNE_CLONES void AddProducts(const T* x, const T* y, A* sum, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) sum[c] += ToAccumulator(x[c]) * ToAccumulator(y[c]);
}

// Threads share the columns, so that every sum is in the order of the tokens.
template <typename T>
void MagnitudeBackward(const DoraMagnitudeBackwardArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t tokens = a.dy.dim(0), N = a.dy.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(tokens * N))
  for (int64_t begin = 0; begin < N; begin += kColumns) {
    const int64_t n = std::min(kColumns, N - begin);
    A sum[kColumns] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      AddProducts<T, A>(a.dy.As<T>() + t * a.dy.stride(0) + begin,
                        a.u.As<T>() + t * a.u.stride(0) + begin, sum, n);
    }
    for (int64_t c = 0; c < n; ++c) {
      const A norm = a.norm.As<A>()[begin + c];
      if (norm > 0) a.dmagnitude.As<A>()[begin + c] += static_cast<A>(a.alpha) * sum[c] / norm;
    }
  }
}

}  // namespace

void DoraFactorsCpu(const Exec& exec, const DoraFactorsArgs& a) {
  if (a.v.dtype == DType::kF64) return Factors<double>(a);
  Factors<float>(a);
}

void ScaleColumnsCpu(const Exec& exec, const ScaleColumnsArgs& a) {
  DispatchFloat(a.x.dtype, [&]<typename T>() { Scale<T>(a); });
}

void DoraMagnitudeBackwardCpu(const Exec& exec, const DoraMagnitudeBackwardArgs& a) {
  DispatchFloat(a.dy.dtype, [&]<typename T>() { MagnitudeBackward<T>(a); });
}

}  // namespace attune
