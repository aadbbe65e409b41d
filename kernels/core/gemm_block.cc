#include "kernels/core/gemm_block.h"

#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/simd.h"

namespace attune {
namespace {

// A tile of C is kRows by 64 bytes of columns, as many registers as those take, held over the whole
// of k. The registers are named by their size: a vector type that is wider than the machine's goes
// through memory.
template <int kBytes>
constexpr int kTileRows = kBytes == 64   ? 12
                          : kBytes == 32 ? 6
                                         : 2;

template <int kBytes, int kRows, typename A>
ATTUNE_INLINE void Tile(const GemmBlockArgs<A>& g, int64_t row, int64_t column) {
  typedef A V __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
  constexpr int kVectors = 64 / kBytes, kSize = kBytes / sizeof(A);
  const A* a = g.a + row * g.a_row;
  const A* b = g.b + column;
  A* c = g.c + row * g.c_row + column;
  V sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = g.accumulate ? *reinterpret_cast<const V*>(c + r * g.c_row + v * kSize) : V{};
    }
  }
  for (int64_t i = 0; i < g.k; ++i) {
    V line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      line[v] = *reinterpret_cast<const V*>(b + i * g.b_row + v * kSize);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const A value = a[r * g.a_row + i * g.a_column];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += line[v] * value;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<V*>(c + r * g.c_row + v * kSize) = sum[r][v];
    }
  }
}

// Rows from `row` on, in tiles of kRows and then of half as many.
template <int kBytes, int kRows, typename A>
ATTUNE_INLINE void Rows(const GemmBlockArgs<A>& g, int64_t row, int64_t column) {
  for (; row + kRows <= g.m; row += kRows) Tile<kBytes, kRows>(g, row, column);
  if constexpr (kRows > 1) Rows<kBytes, kRows / 2>(g, row, column);
}

template <int kBytes, typename A>
ATTUNE_INLINE void Product(const GemmBlockArgs<A>& g) {
  for (int64_t column = 0; column < g.n; column += 64 / sizeof(A)) {
    Rows<kBytes, kTileRows<kBytes>>(g, 0, column);
  }
}

#ifdef ATTUNE_HAS_CLONES
template <typename A>
__attribute__((target("arch=x86-64-v4"))) void RunV4(const GemmBlockArgs<A>& args) {
  Product<64>(args);
}
template <typename A>
__attribute__((target("arch=x86-64-v3"))) void RunV3(const GemmBlockArgs<A>& args) {
  Product<32>(args);
}
#endif

template <typename A>
void Run(const GemmBlockArgs<A>& args) {
  CHECK(args.n % kGemmPad == 0);
#ifdef ATTUNE_HAS_CLONES
  static const bool v4 = __builtin_cpu_supports("x86-64-v4") != 0;
  static const bool v3 = __builtin_cpu_supports("x86-64-v3") != 0;
  if (v4) return RunV4(args);
  if (v3) return RunV3(args);
#endif
  Product<16>(args);
}

}  // namespace

void GemmBlock(const GemmBlockArgs<float>& args) {
  Run(args);
}
void GemmBlock(const GemmBlockArgs<double>& args) {
  Run(args);
}

}  // namespace attune
