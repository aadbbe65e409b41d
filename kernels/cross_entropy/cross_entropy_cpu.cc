// Cross entropy on the CPU: a thread owns a row.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/cross_entropy/cross_entropy.h"

namespace attune {
namespace {

// libm's tanh: logits under a soft cap are small against it, where Tanh loses digits.
template <typename A>
ATTUNE_INLINE A Capped(A x, A softcap) {
  return softcap > 0 ? softcap * std::tanh(x / softcap) : x;
}

// The largest element, NaN aside.
template <typename T>
ATTUNE_CLONES AccumulatorOf<T> MaxOf(const T* x, int64_t V) {
  using A = AccumulatorOf<T>;
  A best[kLanes];
  for (int l = 0; l < kLanes; ++l) best[l] = -std::numeric_limits<A>::infinity();
  int64_t v = 0;
  for (; v + kLanes <= V; v += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const A value = ToAccumulator(x[v + l]);
      best[l] = value > best[l] ? value : best[l];
    }
  }
  for (int l = 0; v + l < V; ++l) best[l] = std::max(best[l], ToAccumulator(x[v + l]));
  return *std::max_element(best, best + kLanes);
}

// sum_v exp(x[v] - shift)
template <typename T>
ATTUNE_CLONES AccumulatorOf<T> SumOfExp(const T* x, AccumulatorOf<T> shift, int64_t V) {
  using A = AccumulatorOf<T>;
  LaneSum<A> sum;
  int64_t v = 0;
  for (; v + kLanes <= V; v += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) sum.lane[l] += Exp(ToAccumulator(x[v + l]) - shift);
  }
  for (int l = 0; v + l < V; ++l) sum.lane[l] += Exp(ToAccumulator(x[v + l]) - shift);
  return sum.Total();
}

// sum_v z[v]
template <typename T>
AccumulatorOf<T> SumOfCapped(const T* x, AccumulatorOf<T> softcap, int64_t V) {
  LaneSum<AccumulatorOf<T>> sum;
  for (int64_t v = 0; v < V; ++v) sum.lane[v % kLanes] += Capped(ToAccumulator(x[v]), softcap);
  return sum.Total();
}

// x[v] = exp(x[v] - lse) * weight - shift. The target's share is the caller's.
template <typename T>
ATTUNE_CLONES void SoftmaxRow(T* x, AccumulatorOf<T> lse, AccumulatorOf<T> weight,
                              AccumulatorOf<T> shift, int64_t V) {
#pragma omp simd
  for (int64_t v = 0; v < V; ++v) {
    StoreRounded<T>(Exp(ToAccumulator(x[v]) - lse) * weight - shift, &x[v]);
  }
}

template <typename T>
AccumulatorOf<T> SumOfExpCapped(const T* x, AccumulatorOf<T> shift, AccumulatorOf<T> softcap,
                                int64_t V) {
  LaneSum<AccumulatorOf<T>> sum;
  for (int64_t v = 0; v < V; ++v) {
    sum.lane[v % kLanes] += Exp(Capped(ToAccumulator(x[v]), softcap) - shift);
  }
  return sum.Total();
}

template <typename T>
void SoftmaxRowCapped(T* x, AccumulatorOf<T> lse, AccumulatorOf<T> softcap, AccumulatorOf<T> weight,
                      AccumulatorOf<T> shift, AccumulatorOf<T> hit, int64_t target, int64_t V) {
  using A = AccumulatorOf<T>;
  for (int64_t v = 0; v < V; ++v) {
    const A z = Capped(ToAccumulator(x[v]), softcap);
    const A slope = A(1) - (z / softcap) * (z / softcap);
    StoreRounded<T>((Exp(z - lse) * weight - shift - (v == target ? hit : A(0))) * slope, &x[v]);
  }
}

template <typename T>
void Row(const CrossEntropyArgs& a, int64_t r) {
  using A = AccumulatorOf<T>;
  const int64_t V = a.logits.dim(1), target = a.targets.As<int32_t>()[r];
  T* x = a.logits.As<T>() + r * a.logits.stride(0);
  if (target < 0) {
    a.loss.As<A>()[r] = A(0);
    if (a.correct.defined()) a.correct.As<uint8_t>()[r] = 0;
    if (a.want_grad) std::fill(x, x + V, T(A(0)));
    return;
  }
  CHECK(target < V);
  const A softcap = static_cast<A>(a.softcap);
  const A x_max = MaxOf(x, V), x_target = ToAccumulator(x[target]);
  if (a.correct.defined()) {
    // tanh is monotone, so the argmax is that of the logits; the first of equal ones counts.
    bool correct = x_target == x_max;
    for (int64_t v = 0; correct && v < target; ++v) correct = ToAccumulator(x[v]) < x_max;
    a.correct.As<uint8_t>()[r] = correct;
  }
  const A z_max = Capped(x_max, softcap);
  const A sum = softcap > 0 ? SumOfExpCapped(x, z_max, softcap, V) : SumOfExp(x, z_max, V);
  const A lse = z_max + std::log(sum);
  const A smoothing = static_cast<A>(a.label_smoothing), z_loss = static_cast<A>(a.z_loss);
  A loss = lse - (A(1) - smoothing) * Capped(x_target, softcap);
  if (smoothing > 0) loss -= smoothing * (SumOfCapped(x, softcap, V) / static_cast<A>(V));
  if (z_loss > 0) loss += z_loss * lse * lse;
  a.loss.As<A>()[r] = loss;
  if (!a.want_grad) return;
  const A grad_scale = a.grad_scale.As<A>()[0];
  const A rise = z_loss > 0 ? A(1) + A(2) * z_loss * lse : A(1);
  const A spread = smoothing / static_cast<A>(V);
  const A hit = A(1) - smoothing;
  if (softcap > 0) {
    return SoftmaxRowCapped(x, lse, softcap, rise * grad_scale, spread * grad_scale,
                            hit * grad_scale, target, V);
  }
  SoftmaxRow(x, lse, rise * grad_scale, spread * grad_scale, V);
  StoreRounded<T>((Exp(x_target - lse) * rise - spread - hit) * grad_scale, &x[target]);
}

}  // namespace

void CrossEntropyCpu(const Exec& exec, const CrossEntropyArgs& a) {
  DispatchFloat(a.logits.dtype, [&]<typename T>() {
    const int64_t rows = a.logits.dim(0);
#pragma omp parallel for schedule(static) if (WorthThreads(a.logits.size()))
    for (int64_t r = 0; r < rows; ++r) Row<T>(a, r);
  });
}

}  // namespace attune
