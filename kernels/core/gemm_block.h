// The inner product of the CPU backend's own loops (attention, plain matmul):
//   C (m, n) = [C +] A (m, k) B (k, n)
// on small blocks that lie in cache. A has any strides; rows of B and C are padded to multiples of
// kGemmPad elements, and n counts the padding (B's may hold anything finite; C's is written).
// Every element of C sums over k in ascending order, so results do not hang on the blocking
// elsewhere or the number of threads. Where the machine multiplies and adds at once they are
// rounded once.
#pragma once

#include <cstdint>

namespace attune {

constexpr int64_t kGemmPad = 16;
constexpr int64_t GemmPadded(int64_t n) {
  return (n + kGemmPad - 1) / kGemmPad * kGemmPad;
}

template <typename A>
struct GemmBlockArgs {
  int64_t m, n, k;
  const A* a;
  int64_t a_row, a_column;  // strides of A in elements
  const A* b;
  int64_t b_row;
  A* c;
  int64_t c_row;
  bool accumulate;
};

void GemmBlock(const GemmBlockArgs<float>& args);
void GemmBlock(const GemmBlockArgs<double>& args);

}  // namespace attune
