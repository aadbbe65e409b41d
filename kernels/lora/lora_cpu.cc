#include <algorithm>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/lora/lora.h"

namespace attune {
namespace {

template <typename T>
void PutBeside(const LoraExtendArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t r = a.parts[0].a.dim(0), K = a.parts[0].a.dim(1);
  const int64_t E = a.w.dim(1) - K, N = a.w.dim(0) - E, stride = a.w.stride(0);
  T* w = a.w.As<T>() + K;
#pragma omp parallel for schedule(static) if (WorthThreads(N * E))
  for (int64_t n = 0; n < N; ++n) std::fill_n(w + n * stride, E, T{});
  for (size_t i = 0; i < a.parts.size(); ++i) {
    const LoraExtendPart& part = a.parts[i];
    const T* b = part.b.As<T>();
    for (int64_t n = 0; n < part.b.dim(0); ++n) {
      T* row = w + (part.row_begin + n) * stride + static_cast<int64_t>(i) * r;
      for (int64_t j = 0; j < r; ++j) {
        StoreRounded<T>(static_cast<A>(a.scale) * ToAccumulator(b[n * r + j]), &row[j]);
      }
    }
  }
}

template <typename T>
void PutBelow(const LoraExtendArgs& a) {
  const int64_t r = a.parts[0].a.dim(0), K = a.parts[0].a.dim(1);
  const int64_t E = a.w.dim(1) - K, N = a.w.dim(0) - E, stride = a.w.stride(0);
  T* w = a.w.As<T>() + N * stride;
  for (int64_t e = 0; e < E; ++e) {
    const size_t i = static_cast<size_t>(e / r);
    if (i < a.parts.size()) {
      std::copy_n(a.parts[i].a.As<T>() + e % r * K, K, w + e * stride);
    } else {
      std::fill_n(w + e * stride, K, T{});
    }
  }
}

}  // namespace

void LoraExtendAllCpu(const Exec&, const LoraExtendAllArgs& args) {
  DispatchFloat(args.all.front().w.dtype, [&]<typename T>() {
    for (const LoraExtendArgs& a : args.all) {
      if (a.beside) PutBeside<T>(a);
      if (a.below) PutBelow<T>(a);
    }
  });
}

}  // namespace attune
