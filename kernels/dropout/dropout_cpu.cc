#include <algorithm>
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "kernels/core/simd.h"
#include "kernels/dropout/dropout.h"

namespace attune {
namespace {

struct Stream {
  uint32_t key0, key1;
  uint32_t step, pack, module;  // words 1 to 3 of the counter; module without its low 8 bits
};

constexpr int kBlocks = 16;         // Philox blocks at a time
constexpr int kSpan = 4 * kBlocks;  // elements that they serve

// bits[4 i + w] = word w of block first_block + i.
ATTUNE_CLONES void Draw(const Stream& stream, uint64_t first_block, uint32_t* bits) {
  uint32_t words[4][kBlocks];
#pragma omp simd
  for (int i = 0; i < kBlocks; ++i) {
    const uint64_t block = first_block + static_cast<uint64_t>(i);
    const PhiloxBlock drawn =
        Philox4x32({{static_cast<uint32_t>(block), stream.step, stream.pack,
                     stream.module | (static_cast<uint32_t>(block >> 32) & 0xffu)}},
                   stream.key0, stream.key1);
    words[0][i] = drawn.word[0];
    words[1][i] = drawn.word[1];
    words[2][i] = drawn.word[2];
    words[3][i] = drawn.word[3];
  }
  for (int i = 0; i < kBlocks; ++i) {
    for (int w = 0; w < 4; ++w) bits[4 * i + w] = words[w][i];
  }
}

template <typename T>
ATTUNE_CLONES void Apply(const T* x, T* y, const uint32_t* bits, uint32_t threshold,
                         AccumulatorOf<T> scale, bool accumulate, int64_t n) {
  using A = AccumulatorOf<T>;
  if (accumulate) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A kept = bits[i] >= threshold ? ToAccumulator(x[i]) * scale : A(0);
      StoreRounded<T>(ToAccumulator(y[i]) + kept, &y[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      StoreRounded<T>(bits[i] >= threshold ? ToAccumulator(x[i]) * scale : A(0), &y[i]);
    }
  }
}

template <typename T>
void Run(const DropoutArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t M = a.x.dim(0), N = a.x.dim(1);
  const int32_t* step_pack = a.step_pack.As<int32_t>();
  const Stream stream{static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32),
                      static_cast<uint32_t>(step_pack[0]), static_cast<uint32_t>(step_pack[1]),
                      a.layer << 16 | a.module << 8};
  const uint32_t threshold =
      static_cast<uint32_t>(std::min(std::round(a.p * 4294967296.0), 4294967295.0));
  const A scale = static_cast<A>(1.0 / (1.0 - a.p));
#pragma omp parallel for schedule(static) if (WorthThreads(M * N))
  for (int64_t m = 0; m < M; ++m) {
    const T* x = a.x.As<T>() + m * a.x.stride(0);
    T* y = a.y.As<T>() + m * a.y.stride(0);
    const int64_t begin = (a.first_row + m) * N, end = begin + N;
    for (int64_t span = begin / 4 * 4; span < end; span += kSpan) {
      uint32_t bits[kSpan];
      Draw(stream, static_cast<uint64_t>(span / 4), bits);
      const int64_t from = std::max(span, begin), to = std::min(span + kSpan, end);
      Apply(x + (from - begin), y + (from - begin), bits + (from - span), threshold, scale,
            a.accumulate, to - from);
    }
  }
}

}  // namespace

void DropoutCpu(const Exec& exec, const DropoutArgs& a) {
  DispatchFloat(a.x.dtype, [&]<typename T>() { Run<T>(a); });
}

}  // namespace attune
