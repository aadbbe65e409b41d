#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/elementwise/elementwise.h"

namespace attune {
namespace {

// A view as runs of adjacent elements: its rows, or pieces of a contiguous view.
struct Runs {
  int64_t count, length;
  int64_t total;  // elements; the last run of a contiguous view may be short

  int64_t LengthOf(int64_t run) const { return std::min(length, total - run * length); }
};

constexpr int64_t kPiece = 16384;

Runs RunsOf(const TensorView& x, bool contiguous) {
  const int64_t total = x.size();
  if (total == 0) return {0, 1, 0};
  if (contiguous) return {(total + kPiece - 1) / kPiece, kPiece, total};
  return {x.dim(0), x.dim(1), total};
}

template <typename T>
T* RunBegin(const TensorView& x, const Runs& runs, bool contiguous, int64_t run) {
  return static_cast<T*>(x.data) + run * (contiguous ? runs.length : x.stride(0));
}

// f(run, begin of x's run, length), in parallel.
template <typename T, typename F>
void ForEachRun(const TensorView& x, F&& f) {
  const bool contiguous = x.contiguous();
  const Runs runs = RunsOf(x, contiguous);
#pragma omp parallel for schedule(static) if (WorthThreads(runs.total))
  for (int64_t run = 0; run < runs.count; ++run) {
    f(RunBegin<T>(x, runs, contiguous, run), runs.LengthOf(run));
  }
}

// f(begin of x's run, begin of y's run, length), in parallel, for views of one shape.
template <typename X, typename Y, typename F>
void ForEachRunOfTwo(const TensorView& x, const TensorView& y, F&& f) {
  const bool contiguous = x.contiguous() && y.contiguous();
  const Runs runs = RunsOf(x, contiguous);
  // A contiguous rank 1 or higher view beside a strided one is rank 2 as well: rows of both.
#pragma omp parallel for schedule(static) if (WorthThreads(runs.total))
  for (int64_t run = 0; run < runs.count; ++run) {
    f(RunBegin<X>(x, runs, contiguous, run), RunBegin<Y>(y, runs, contiguous, run),
      runs.LengthOf(run));
  }
}

template <typename X, typename Y>
using WiderOf =
    std::conditional_t<std::is_same_v<X, double> || std::is_same_v<Y, double>, double, float>;

template <typename X, typename Y>
ATTUNE_CLONES void CopyRun(const X* x, Y* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<X, double> || std::is_same_v<Y, double>) {
      if constexpr (std::is_same_v<X, double>) {
        StoreRounded<Y>(static_cast<AccumulatorOf<Y>>(x[i]), &y[i]);
      } else {
        y[i] = static_cast<double>(static_cast<float>(x[i]));
      }
    } else {
      StoreRounded<Y>(static_cast<float>(x[i]), &y[i]);
    }
  }
}

template <typename X, typename Y>
ATTUNE_CLONES void AddRun(const X* x, Y* y, WiderOf<X, Y> alpha, int64_t n) {
  using A = WiderOf<X, Y>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A sum = static_cast<A>(ToAccumulator(y[i])) + alpha * static_cast<A>(ToAccumulator(x[i]));
    StoreRounded<Y>(static_cast<AccumulatorOf<Y>>(sum), &y[i]);
  }
}

template <typename X, typename Y>
void AddToRows(const TensorView& x, const TensorView& y, WiderOf<X, Y> alpha) {
#pragma omp parallel for schedule(static) if (WorthThreads(y.size()))
  for (int64_t row = 0; row < y.dim(0); ++row) {
    AddRun<X, Y>(x.As<X>(), y.As<Y>() + row * y.stride(0), alpha, y.dim(1));
  }
}

// libm's tanh: logits are small against the cap, where Tanh loses digits.
template <typename T>
void SoftCapRun(T* x, AccumulatorOf<T> cap, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    StoreRounded<T>(cap * std::tanh(ToAccumulator(x[i]) / cap), &x[i]);
}

template <typename T>
ATTUNE_CLONES void ScaleRun(T* x, AccumulatorOf<T> alpha, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) StoreRounded<T>(ToAccumulator(x[i]) * alpha, &x[i]);
}

template <typename T>
ATTUNE_CLONES double SumRun(const T* x, int64_t n) {
  LaneSum<double> sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) sum.lane[l] += static_cast<double>(ToAccumulator(x[i + l]));
  }
  for (int l = 0; i + l < n; ++l) sum.lane[l] += static_cast<double>(ToAccumulator(x[i + l]));
  return sum.Total();
}

template <typename T>
double Sum(const TensorView& x) {
  const bool contiguous = x.contiguous();
  const Runs runs = RunsOf(x, contiguous);
  double sum = 0.0;
  for (int64_t run = 0; run < runs.count; ++run) {
    sum += SumRun(RunBegin<const T>(x, runs, contiguous, run), runs.LengthOf(run));
  }
  return sum;
}

double ReadScalar(const TensorView& x) {
  return x.dtype == DType::kF64 ? *x.As<double>() : static_cast<double>(*x.As<float>());
}

template <typename T>
void FillWith(const TensorView& x, T value) {
  ForEachRun<T>(x, [&](T* run, int64_t n) { std::fill(run, run + n, value); });
}

template <typename X>
void CopyFrom(const CopyArgs& a) {
  DispatchFloat(a.y.dtype, [&]<typename Y>() {
    ForEachRunOfTwo<X, Y>(a.x, a.y, [](const X* x, Y* y, int64_t n) { CopyRun(x, y, n); });
  });
}

template <typename Bits>
void CopyBits(const CopyArgs& a) {
  ForEachRunOfTwo<Bits, Bits>(a.x, a.y, [](const Bits* x, Bits* y, int64_t n) {
    std::memcpy(y, x, static_cast<size_t>(n) * sizeof(Bits));
  });
}

}  // namespace

void FillCpu(const Exec& exec, const FillArgs& a) {
  switch (a.x.dtype) {
    case DType::kF64:
      return FillWith<double>(a.x, a.value);
    case DType::kF32:
      return FillWith<float>(a.x, static_cast<float>(a.value));
    case DType::kBF16:
      return FillWith<BFloat16>(a.x, BFloat16(static_cast<float>(a.value)));
    case DType::kI64:
      return FillWith<int64_t>(a.x, static_cast<int64_t>(a.value));
    case DType::kI32:
      return FillWith<int32_t>(a.x, static_cast<int32_t>(a.value));
    case DType::kI8:
      return FillWith<int8_t>(a.x, static_cast<int8_t>(a.value));
    case DType::kU8:
      return FillWith<uint8_t>(a.x, static_cast<uint8_t>(a.value));
    case DType::kF16:
      CHECK(a.value == 0.0);  // no op computes in f16
      return FillWith<uint16_t>(a.x, 0);
    case DType::kF8E4M3:
      CHECK(a.value == 0.0);
      return FillWith<uint8_t>(a.x, uint8_t{0});
  }
}

void CopyCpu(const Exec& exec, const CopyArgs& a) {
  if (a.x.dtype == a.y.dtype) {
    switch (DTypeBytes(a.x.dtype)) {
      case 1:
        return CopyBits<uint8_t>(a);
      case 2:
        return CopyBits<uint16_t>(a);
      case 4:
        return CopyBits<uint32_t>(a);
      default:
        return CopyBits<uint64_t>(a);
    }
  }
  if (a.x.dtype == DType::kF16) return CopyFrom<Float16>(a);
  DispatchFloat(a.x.dtype, [&]<typename X>() { CopyFrom<X>(a); });
}

void AddCpu(const Exec& exec, const AddArgs& a) {
  DispatchFloat(a.x.dtype, [&]<typename X>() {
    DispatchFloat(a.y.dtype, [&]<typename Y>() {
      const auto alpha = static_cast<WiderOf<X, Y>>(a.alpha);
      if (a.x.rank < a.y.rank) return AddToRows<X, Y>(a.x, a.y, alpha);
      ForEachRunOfTwo<X, Y>(a.x, a.y, [=](const X* x, Y* y, int64_t n) { AddRun(x, y, alpha, n); });
    });
  });
}

void ScaleCpu(const Exec& exec, const ScaleArgs& a) {
  const double alpha = a.alpha * (a.alpha_device.defined() ? ReadScalar(a.alpha_device) : 1.0);
  DispatchFloat(a.x.dtype, [&]<typename T>() {
    ForEachRun<T>(
        a.x, [=](T* run, int64_t n) { ScaleRun(run, static_cast<AccumulatorOf<T>>(alpha), n); });
  });
}

void SoftCapCpu(const Exec& exec, const SoftCapArgs& a) {
  DispatchFloat(a.x.dtype, [&]<typename T>() {
    const auto cap = static_cast<AccumulatorOf<T>>(a.cap);
    ForEachRun<T>(a.x, [=](T* run, int64_t n) { SoftCapRun(run, cap, n); });
  });
}

void SumToScalarCpu(const Exec& exec, const SumToScalarArgs& a) {
  double sum = 0.0;
  if (a.x.dtype == DType::kU8) {
    sum = Sum<uint8_t>(a.x);
  } else {
    DispatchFloat(a.x.dtype, [&]<typename T>() { sum = Sum<T>(a.x); });
  }
  if (a.accumulate) sum += ReadScalar(a.out);
  if (a.out.dtype == DType::kF64) {
    *a.out.As<double>() = sum;
  } else {
    *a.out.As<float>() = static_cast<float>(sum);
  }
}

}  // namespace attune
