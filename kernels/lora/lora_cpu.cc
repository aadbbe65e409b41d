#include <algorithm>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/lora/lora.h"

namespace attune {
namespace {

template <typename T>
void Extend(const LoraExtendArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t r = a.parts[0].a.dim(0), K = a.parts[0].a.dim(1);
  const int64_t E = a.w.dim(1) - K, N = a.w.dim(0) - E, stride = a.w.stride(0);
  T* w = a.w.As<T>();
#pragma omp parallel for schedule(static) if (WorthThreads(N * E))
  for (int64_t n = 0; n < N; ++n) std::fill_n(w + n * stride + K, E, T{});
  for (int64_t e = 0; e < E; ++e) std::fill_n(w + (N + e) * stride, K, T{});
  for (size_t i = 0; i < a.parts.size(); ++i) {
    const LoraExtendPart& part = a.parts[i];
    const int64_t column = K + static_cast<int64_t>(i) * r;
    const T* b = part.b.As<T>();
    for (int64_t n = 0; n < part.b.dim(0); ++n) {
      T* row = w + (part.row_begin + n) * stride + column;
      for (int64_t j = 0; j < r; ++j) {
        StoreRounded<T>(static_cast<A>(a.scale) * ToAccumulator(b[n * r + j]), &row[j]);
      }
    }
    for (int64_t j = 0; j < r; ++j) {
      std::copy_n(part.a.As<T>() + j * K, K, w + (N + static_cast<int64_t>(i) * r + j) * stride);
    }
  }
}

}  // namespace

void LoraExtendCpu(const Exec& exec, const LoraExtendArgs& a) {
  DispatchFloat(a.w.dtype, [&]<typename T>() { Extend<T>(a); });
}

}  // namespace attune
