// RMSNorm on the CPU: a thread owns whole rows (columns for dw), so no sum is shared.
#include <algorithm>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/rms_norm/rms_norm.h"

namespace attune {

ATTUNE_BACKENDS(Fp8Quantize);

namespace {

template <typename T>
ATTUNE_CLONES void AddRows(const T* x, const T* delta, T* sum, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c)
    StoreRounded<T>(ToAccumulator(x[c]) + ToAccumulator(delta[c]), &sum[c]);
}

template <typename T>
ATTUNE_CLONES AccumulatorOf<T> SumOfSquares(const T* x, int64_t C) {
  using A = AccumulatorOf<T>;
  LaneSum<A> sum;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const A v = ToAccumulator(x[c + l]);
      sum.lane[l] += v * v;
    }
  }
  for (int l = 0; c + l < C; ++l) {
    const A v = ToAccumulator(x[c + l]);
    sum.lane[l] += v * v;
  }
  return sum.Total();
}

// sum_c dy[c] * (w[c] + offset) * x[c]
template <typename T, typename W>
ATTUNE_CLONES AccumulatorOf<T> SumOfProducts(const T* dy, const T* x, const W* w,
                                             AccumulatorOf<T> offset, int64_t C) {
  using A = AccumulatorOf<T>;
  LaneSum<A> sum;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      sum.lane[l] +=
          ToAccumulator(dy[c + l]) * (ToAccumulator(w[c + l]) + offset) * ToAccumulator(x[c + l]);
    }
  }
  for (int l = 0; c + l < C; ++l) {
    sum.lane[l] +=
        ToAccumulator(dy[c + l]) * (ToAccumulator(w[c + l]) + offset) * ToAccumulator(x[c + l]);
  }
  return sum.Total();
}

template <typename T, typename W>
ATTUNE_CLONES void NormalizeRow(const T* x, const W* w, AccumulatorOf<T> rstd,
                                AccumulatorOf<T> offset, T* y, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    StoreRounded<T>(ToAccumulator(x[c]) * rstd * (ToAccumulator(w[c]) + offset), &y[c]);
  }
}

// dx = rstd * (dy * (w + offset) - x * mean) + dresidual, with mean = rstd^2 * mean_c(g * x).
template <typename T, typename W>
ATTUNE_CLONES void BackwardRow(const T* dy, const T* x, const W* w, const T* dresidual,
                               AccumulatorOf<T> rstd, AccumulatorOf<T> mean,
                               AccumulatorOf<T> offset, T* dx, int64_t C) {
  using A = AccumulatorOf<T>;
  if (dresidual == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const A g = ToAccumulator(dy[c]) * (ToAccumulator(w[c]) + offset);
      StoreRounded<T>(rstd * (g - ToAccumulator(x[c]) * mean), &dx[c]);
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const A g = ToAccumulator(dy[c]) * (ToAccumulator(w[c]) + offset);
      StoreRounded<T>(rstd * (g - ToAccumulator(x[c]) * mean) + ToAccumulator(dresidual[c]),
                      &dx[c]);
    }
  }
}

template <typename T>
ATTUNE_CLONES void AccumulateWeightRow(const T* dy, const T* x, AccumulatorOf<T> rstd,
                                       AccumulatorOf<T>* dw, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) dw[c] += ToAccumulator(dy[c]) * (ToAccumulator(x[c]) * rstd);
}

template <typename T>
T* Row(const TensorView& x, int64_t m) {
  return x.As<T>() + m * x.stride(0);
}

template <typename T, typename W>
void Forward(const RmsNormForwardArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t M = a.x.dim(0), C = a.x.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(M * C))
  for (int64_t m = 0; m < M; ++m) {
    const T* x = Row<T>(a.x, m);
    if (a.delta.defined()) {
      AddRows(x, Row<T>(a.delta, m), Row<T>(a.sum, m), C);
      x = Row<T>(a.sum, m);
    }
    const A rstd = A(1) / std::sqrt(SumOfSquares(x, C) / static_cast<A>(C) + static_cast<A>(a.eps));
    a.rstd.As<A>()[m] = rstd;
    NormalizeRow(x, a.w.As<W>(), rstd, static_cast<A>(a.weight_offset), Row<T>(a.y, m), C);
  }
}

template <typename T, typename W>
void Rebuild(const RmsNormRebuildArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t M = a.x.dim(0), C = a.x.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(M * C))
  for (int64_t m = 0; m < M; ++m) {
    NormalizeRow(Row<T>(a.x, m), a.w.As<W>(), a.rstd.As<A>()[m], static_cast<A>(a.weight_offset),
                 Row<T>(a.y, m), C);
  }
}

template <typename T, typename W>
void Backward(const RmsNormBackwardArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t M = a.x.dim(0), C = a.x.dim(1);
  const A offset = static_cast<A>(a.weight_offset);
  if (a.dw.defined()) {
    // A thread owns columns, and walks the rows in order.
    constexpr int64_t kColumns = 256;
#pragma omp parallel for schedule(static) if (WorthThreads(M * C))
    for (int64_t c = 0; c < C; c += kColumns) {
      for (int64_t m = 0; m < M; ++m) {
        AccumulateWeightRow(Row<T>(a.dy, m) + c, Row<T>(a.x, m) + c, a.rstd.As<A>()[m],
                            a.dw.As<A>() + c, std::min(kColumns, C - c));
      }
    }
  }
#pragma omp parallel for schedule(static) if (WorthThreads(M * C))
  for (int64_t m = 0; m < M; ++m) {
    const T* dy = Row<T>(a.dy, m);
    const T* x = Row<T>(a.x, m);
    const W* w = a.w.As<W>();
    const A rstd = a.rstd.As<A>()[m];
    const A mean = rstd * rstd * (SumOfProducts(dy, x, w, offset, C) / static_cast<A>(C));
    const T* dresidual = a.dresidual.defined() ? Row<T>(a.dresidual, m) : nullptr;
    BackwardRow(dy, x, w, dresidual, rstd, mean, offset, Row<T>(a.dx, m), C);
  }
}

// Calls f.operator()<T, W>() with the dtypes of x and w.
template <typename F>
void DispatchNorm(const TensorView& x, const TensorView& w, F&& f) {
  DispatchFloat(x.dtype, [&]<typename T>() {
    if (w.dtype == x.dtype) return f.template operator()<T, T>();
    f.template operator()<T, float>();
  });
}

}  // namespace

void RmsNormForwardCpu(const Exec& exec, const RmsNormForwardArgs& a) {
  DispatchNorm(a.x, a.w, [&]<typename T, typename W>() { Forward<T, W>(a); });
  if (a.fp8.defined()) Fp8QuantizeCpu(exec, Fp8QuantizeOf(a.y, a.fp8));
}

void RmsNormRebuildCpu(const Exec& exec, const RmsNormRebuildArgs& a) {
  DispatchNorm(a.x, a.w, [&]<typename T, typename W>() { Rebuild<T, W>(a); });
  if (a.fp8.defined()) Fp8QuantizeCpu(exec, Fp8QuantizeOf(a.y, a.fp8));
}

void RmsNormBackwardCpu(const Exec& exec, const RmsNormBackwardArgs& a) {
  DispatchNorm(a.x, a.w, [&]<typename T, typename W>() { Backward<T, W>(a); });
}

}  // namespace attune
