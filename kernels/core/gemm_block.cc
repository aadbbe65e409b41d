#include "kernels/core/gemm_block.h"

#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/simd.h"

namespace attune {
namespace {

template <typename A>
struct Vector {
  // Bytes of one AVX-512 register; narrower machines use two or four.
  typedef A Type __attribute__((vector_size(64), aligned(8)));
  static constexpr int kSize = 64 / sizeof(A);
};

// kRows rows of C by one vector of columns, held in registers over the whole of k.
template <int kRows, typename A>
ATTUNE_INLINE void Tile(const GemmBlockArgs<A>& g, int64_t row, int64_t column) {
  using V = typename Vector<A>::Type;
  const A* a = g.a + row * g.a_row;
  const A* b = g.b + column;
  A* c = g.c + row * g.c_row + column;
  V sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    if (g.accumulate) {
      std::memcpy(&sum[r], c + r * g.c_row, sizeof(V));
    } else {
      sum[r] = V{};
    }
  }
  for (int64_t i = 0; i < g.k; ++i) {
    V line;
    std::memcpy(&line, b + i * g.b_row, sizeof(V));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] += line * a[r * g.a_row + i * g.a_column];
  }
  for (int r = 0; r < kRows; ++r) std::memcpy(c + r * g.c_row, &sum[r], sizeof(V));
}

template <typename A>
ATTUNE_INLINE void Product(const GemmBlockArgs<A>& g) {
  constexpr int kRows = 6;
  for (int64_t column = 0; column < g.n; column += Vector<A>::kSize) {
    int64_t row = 0;
    for (; row + kRows <= g.m; row += kRows) Tile<kRows>(g, row, column);
    if (row + 4 <= g.m) {
      Tile<4>(g, row, column);
      row += 4;
    }
    if (row + 2 <= g.m) {
      Tile<2>(g, row, column);
      row += 2;
    }
    if (row < g.m) Tile<1>(g, row, column);
  }
}

ATTUNE_CLONES void Run(const GemmBlockArgs<float>& args) {
  Product(args);
}
ATTUNE_CLONES void Run(const GemmBlockArgs<double>& args) {
  Product(args);
}

}  // namespace

void GemmBlock(const GemmBlockArgs<float>& args) {
  CHECK(args.n % kGemmPad == 0);
  Run(args);
}
void GemmBlock(const GemmBlockArgs<double>& args) {
  CHECK(args.n % kGemmPad == 0);
  Run(args);
}

}  // namespace attune
