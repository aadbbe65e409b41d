// A thread owns whole heads, so no sum is shared.
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/qk_norm/qk_norm.h"

namespace attune {
namespace {

constexpr int64_t kMaxHead = 512;

// The first 2 * half elements of x turned in place; `sign` -1 turns back.
template <typename A>
ATTUNE_INLINE void Rotate(A* x, const A* cos, const A* sin, A sign, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A first = x[i], second = x[half + i], s = sign * sin[i];
    x[i] = first * cos[i] - second * s;
    x[half + i] = second * cos[i] + first * s;
  }
}

template <typename A>
ATTUNE_INLINE A DotOf(const A* a, const A* b, int64_t n) {
  LaneSum<A> sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) sum.lane[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < n; ++l) sum.lane[l] += a[i + l] * b[i + l];
  return sum.Total();
}

// One head and what turns it.
template <typename A>
struct Turn {
  const A* cos;
  const A* sin;
  int64_t half;
};

template <typename T>
ATTUNE_CLONES void ForwardHead(const T* x, const T* w, Turn<AccumulatorOf<T>> turn,
                               AccumulatorOf<T> eps, AccumulatorOf<T> offset, int64_t D, T* y,
                               AccumulatorOf<T>* rstd) {
  using A = AccumulatorOf<T>;
  A n[kMaxHead];
  for (int64_t i = 0; i < D; ++i) n[i] = ToAccumulator(x[i]);
  *rstd = A(1) / std::sqrt(DotOf(n, n, D) / static_cast<A>(D) + eps);
  for (int64_t i = 0; i < D; ++i) n[i] *= *rstd * (ToAccumulator(w[i]) + offset);
  Rotate(n, turn.cos, turn.sin, A(1), turn.half);
  for (int64_t i = 0; i < D; ++i) StoreRounded<T>(n[i], &y[i]);
}

template <typename T>
ATTUNE_CLONES void BackwardHead(const T* dy, const T* x, const T* w, Turn<AccumulatorOf<T>> turn,
                                AccumulatorOf<T> rstd, AccumulatorOf<T> offset, int64_t D, T* dx) {
  using A = AccumulatorOf<T>;
  A g[kMaxHead], xh[kMaxHead];
  for (int64_t i = 0; i < D; ++i) g[i] = ToAccumulator(dy[i]);
  Rotate(g, turn.cos, turn.sin, A(-1), turn.half);
  for (int64_t i = 0; i < D; ++i) {
    g[i] *= ToAccumulator(w[i]) + offset;
    xh[i] = ToAccumulator(x[i]) * rstd;
  }
  const A mean = DotOf(g, xh, D) / static_cast<A>(D);
  for (int64_t i = 0; i < D; ++i) StoreRounded<T>(rstd * (g[i] - xh[i] * mean), &dx[i]);
}

template <typename T>
T* Head(const TensorView& x, int64_t t, int64_t h) {
  return x.As<T>() + t * x.stride(0) + h * x.stride(1);
}

template <typename A, typename Args>
Turn<A> TurnAt(const Args& a, int64_t t) {
  if (a.rotary_dim == 0) return {nullptr, nullptr, 0};
  return {a.cos.template As<A>() + t * a.cos.stride(0),
          a.sin.template As<A>() + t * a.sin.stride(0), a.rotary_dim / 2};
}

}  // namespace

void QkNormForwardCpu(const Exec& exec, const QkNormForwardArgs& a) {
  DispatchFloat(a.heads[0].x.dtype, [&]<typename T>() {
    using A = AccumulatorOf<T>;
    for (const QkNormHeads& of : a.heads) {
      const int64_t tokens = of.x.dim(0), heads = of.x.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(of.x.size()))
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          ForwardHead(Head<T>(of.x, t, h), of.w.As<T>(), TurnAt<A>(a, t), static_cast<A>(a.eps),
                      static_cast<A>(a.weight_offset), of.x.dim(2), Head<T>(of.y, t, h),
                      of.rstd.As<A>() + t * heads + h);
        }
      }
    }
  });
}

void QkNormBackwardCpu(const Exec& exec, const QkNormBackwardArgs& a) {
  DispatchFloat(a.heads[0].x.dtype, [&]<typename T>() {
    using A = AccumulatorOf<T>;
    for (const QkNormHeadsBackward& of : a.heads) {
      const int64_t tokens = of.x.dim(0), heads = of.x.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(of.x.size()))
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          BackwardHead(Head<T>(of.dy, t, h), Head<T>(of.x, t, h), of.w.As<T>(), TurnAt<A>(a, t),
                       of.rstd.As<A>()[t * heads + h], static_cast<A>(a.weight_offset), of.x.dim(2),
                       Head<T>(of.dx, t, h));
        }
      }
    }
  });
}

}  // namespace attune
