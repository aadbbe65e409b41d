#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/embedding/embedding.h"

namespace attune {
namespace {

template <typename T>
ATTUNE_CLONES void ScaleRow(const T* x, AccumulatorOf<T> scale, T* y, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) StoreRounded<T>(ToAccumulator(x[c]) * scale, &y[c]);
}

template <typename T>
void Forward(const EmbeddingForwardArgs& a) {
  const int64_t tokens = a.y.dim(0), V = a.table.dim(0), C = a.table.dim(1);
  const int32_t* ids = a.ids.As<int32_t>();
#pragma omp parallel for schedule(static) if (WorthThreads(tokens * C))
  for (int64_t t = 0; t < tokens; ++t) {
    CHECK(0 <= ids[t] && ids[t] < V);
    ScaleRow(a.table.As<T>() + ids[t] * a.table.stride(0), static_cast<AccumulatorOf<T>>(a.scale),
             a.y.As<T>() + t * a.y.stride(0), C);
  }
}

}  // namespace

void EmbeddingForwardCpu(const Exec& exec, const EmbeddingForwardArgs& a) {
  DispatchFloat(a.table.dtype, [&]<typename T>() { Forward<T>(a); });
}

}  // namespace attune
