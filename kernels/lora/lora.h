// The adapter's share of an expanded weight, so that one product does base and adapter:
//   [x | s] [W | scale B]^T = x W^T + scale s B^T        s = x A^T
//   [dy | ds] [W ; A]       = dy W + ds A                ds = dy (scale B)
//
// The expansion is one buffer (N + E, K + E): W is its first N rows and K columns (written by
// others), scale B its last E columns beside W, A its last E rows below W. For stacked matrices
// (q, k, v) B is block-diagonal: part i has the rows of its own matrix and the columns
// [i r, (i + 1) r). E is the number of parts times r, rounded up to a multiple of 8; what no part
// fills is zero. The corner (E, E) is not touched. Either of the two may be left out: the first
// product takes scale B only, the second A only.
// Cost: one pass over E N and E K elements.
#pragma once

#include <span>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int kMaxLoraParts = 4;

// E for `parts` adapters of rank r. Rows of the expansion then keep the alignment of K.
constexpr int64_t LoraExtension(int64_t parts, int64_t r) {
  return (parts * r + 7) / 8 * 8;
}

struct LoraExtendPart {
  TensorView a;           // (r, K)    f64, f32 or bf16
  TensorView b;           // (N_p, r)
  int64_t row_begin = 0;  // of the part's matrix in W
};
struct LoraExtendArgs {
  std::span<const LoraExtendPart> parts;  // 1 to kMaxLoraParts, ascending row_begin
  TensorView w;                           // (N + E, K + E)  out, dtype of a; rows may be strided
  double scale = 1.0;
  bool beside = true;  // whether scale B is written
  bool below = true;   // whether A is
};
void LoraExtend(const Exec& exec, const LoraExtendArgs& args);
// Many at once, all of one dtype: one by one they are short operations for a GPU.
struct LoraExtendAllArgs {
  std::span<const LoraExtendArgs> all;
};
void LoraExtendAll(const Exec& exec, const LoraExtendAllArgs& args);

}  // namespace attune
