#include <algorithm>
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/rope/rope.h"

namespace attune {
namespace {

template <typename A>
void Table(const RopeTableArgs& a) {
  const int64_t T = a.positions.dim(0), half = a.inv_freq.dim(0);
  const int32_t* positions = a.positions.As<int32_t>();
  const float* inv_freq = a.inv_freq.As<float>();
  const double scaling = a.attention_scaling;
  A* cos = a.cos.As<A>();
  A* sin = a.sin.As<A>();
#pragma omp parallel for schedule(static) if (WorthThreads(T * half))
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < half; ++i) {
      // The product in f32, whatever A is: the frequencies of the model are defined so.
      const float angle = static_cast<float>(positions[t]) * inv_freq[i];
      cos[t * half + i] = static_cast<A>(std::cos(static_cast<double>(angle)) * scaling);
      sin[t * half + i] = static_cast<A>(std::sin(static_cast<double>(angle)) * scaling);
    }
  }
}

template <typename T>
ATTUNE_CLONES void RotateHead(const T* x, T* y, const AccumulatorOf<T>* cos,
                              const AccumulatorOf<T>* sin, AccumulatorOf<T> sign, int64_t half,
                              int64_t head_dim) {
  using A = AccumulatorOf<T>;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A first = ToAccumulator(x[i]), second = ToAccumulator(x[half + i]);
    const A s = sign * sin[i];
    StoreRounded<T>(first * cos[i] - second * s, &y[i]);
    StoreRounded<T>(second * cos[i] + first * s, &y[half + i]);
  }
  if (y != x) std::copy(x + 2 * half, x + head_dim, y + 2 * half);
}

template <typename T>
void Rotate(const RopeArgs& a, const RopeHeads& heads) {
  using A = AccumulatorOf<T>;
  const TensorView &x = heads.x, &y = heads.y.defined() ? heads.y : heads.x;
  const int64_t half = heads.turned ? a.rotary_dim / 2 : 0;
  const A sign = a.inverse ? A(-1) : A(1);
#pragma omp parallel for schedule(static) if (WorthThreads(x.size()))
  for (int64_t t = 0; t < x.dim(0); ++t) {
    for (int64_t h = 0; h < x.dim(1); ++h) {
      RotateHead(x.As<T>() + t * x.stride(0) + h * x.stride(1),
                 y.As<T>() + t * y.stride(0) + h * y.stride(1), a.cos.As<A>() + t * a.cos.stride(0),
                 a.sin.As<A>() + t * a.sin.stride(0), sign, half, x.dim(2));
    }
  }
}

}  // namespace

void RopeTableCpu(const Exec& exec, const RopeTableArgs& a) {
  if (a.cos.dtype == DType::kF64) return Table<double>(a);
  Table<float>(a);
}

void RopeCpu(const Exec& exec, const RopeArgs& a) {
  DispatchFloat(a.heads[0].x.dtype, [&]<typename T>() {
    for (const RopeHeads& heads : a.heads) Rotate<T>(a, heads);
  });
}

}  // namespace attune
