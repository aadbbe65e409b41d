// FrozenMatrix: weights (N, K) that are not trained, dense or as NF4, possibly several matrices
// with the same input stacked by rows (q, k, v; gate, up). Each keeps its own quantisation
// statistics, so the bits are those of the single matrices.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/layers/context.h"

namespace attune {

enum class WeightStorage : uint8_t { kDense, kNf4, kNf4Double };

class FrozenMatrix {
 public:
  // Takes room for the matrices from the arena's bottom; contents come with Load.
  FrozenMatrix(const LayerContext& ctx, WeightStorage storage, std::vector<int64_t> part_rows,
               int64_t in);

  int64_t rows() const { return rows_; }
  int64_t in() const { return in_; }
  int parts() const { return static_cast<int>(part_rows_.size()); }
  int64_t row_begin(int part) const { return row_begin_[part]; }
  int64_t part_rows(int part) const { return part_rows_[part]; }

  // Fills part `part` from w (part_rows, K), f64, f32 or bf16 on the device; quantises.
  void Load(const LayerContext& ctx, int part, const TensorView& w);

  // (N, K) in ctx.dtype: the weights themselves where they are stored so, else expanded into
  // scratch, which lives as long as the caller's ArenaScope.
  TensorView Expand(const LayerContext& ctx) const;

 private:
  struct Nf4Part {
    TensorView packed, absmax, codes, absmax2, offset;
  };

  WeightStorage storage_;
  std::vector<int64_t> part_rows_;
  std::vector<int64_t> row_begin_;
  int64_t rows_ = 0;
  int64_t in_;
  TensorView dense_;            // (N, K), kDense
  std::vector<Nf4Part> parts_;  // kNf4, kNf4Double
};

}  // namespace attune
