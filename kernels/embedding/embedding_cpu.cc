#include <algorithm>
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
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

template <typename T>
ATTUNE_CLONES void AddScaledRow(const T* x, AccumulatorOf<T> scale, AccumulatorOf<T>* y,
                                int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) y[c] += scale * ToAccumulator(x[c]);
}

// Threads share the columns, so that every sum is in the order of the tokens.
template <typename T>
void Backward(const EmbeddingBackwardArgs& a) {
  using A = AccumulatorOf<T>;
  constexpr int64_t kColumns = 64;
  const int64_t tokens = a.dy.dim(0), V = a.dtable.dim(0), C = a.dy.dim(1);
  const int32_t* ids = a.ids.As<int32_t>();
#pragma omp parallel for schedule(static) if (WorthThreads(tokens * C))
  for (int64_t begin = 0; begin < C; begin += kColumns) {
    for (int64_t t = 0; t < tokens; ++t) {
      CHECK(0 <= ids[t] && ids[t] < V);
      if (ids[t] == a.padding_id) continue;
      AddScaledRow(a.dy.As<T>() + t * a.dy.stride(0) + begin, static_cast<A>(a.scale),
                   a.dtable.As<A>() + ids[t] * a.dtable.stride(0) + begin,
                   std::min(kColumns, C - begin));
    }
  }
}

template <typename T>
void AddNoise(const EmbeddingNoiseArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t C = a.x.dim(1);
  const int32_t* begin = a.q_begin.As<int32_t>();
  const int32_t segments = *a.num_segments.As<int32_t>();
  const int32_t* step_pack = a.step_pack.As<int32_t>();
  CHECK(0 <= segments && segments < a.q_begin.dim(0));
  const int64_t end = segments > 0 ? begin[segments] : 0;
#pragma omp parallel for schedule(static) if (WorthThreads(end * C))
  for (int64_t t = segments > 0 ? begin[0] : 0; t < end; ++t) {
    const int64_t s = std::upper_bound(begin, begin + segments + 1, t) - begin - 1;
    const A length = static_cast<A>(begin[s + 1] - begin[s]);
    const A size = static_cast<A>(a.alpha) / std::sqrt(length * static_cast<A>(C));
    T* x = a.x.As<T>() + t * a.x.stride(0);
    PhiloxBlock drawn{};
    for (int64_t c = 0; c < C; ++c) {
      const uint64_t element = static_cast<uint64_t>(t * C + c), block = element / 4;
      if (c == 0 || element % 4 == 0) {
        drawn = Philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(step_pack[0]),
                             static_cast<uint32_t>(step_pack[1]),
                             0xffffff00u | (static_cast<uint32_t>(block >> 32) & 0xffu)}},
                           static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
      }
      const A u = static_cast<A>(drawn.word[element % 4]) * A(4.656612873077392578125e-10) - A(1);
      StoreRounded<T>(ToAccumulator(x[c]) + size * u, &x[c]);
    }
  }
}

}  // namespace

void EmbeddingNoiseCpu(const Exec& exec, const EmbeddingNoiseArgs& a) {
  DispatchFloat(a.x.dtype, [&]<typename T>() { AddNoise<T>(a); });
}

void EmbeddingBackwardCpu(const Exec& exec, const EmbeddingBackwardArgs& a) {
  DispatchFloat(a.dy.dtype, [&]<typename T>() { Backward<T>(a); });
}

void EmbeddingForwardCpu(const Exec& exec, const EmbeddingForwardArgs& a) {
  DispatchFloat(a.table.dtype, [&]<typename T>() { Forward<T>(a); });
}

}  // namespace attune
