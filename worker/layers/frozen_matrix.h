// FrozenMatrix: weights (N, K) that are not trained, dense or as NF4, possibly several matrices
// with the same input stacked by rows (q, k, v; gate, up). Each keeps its own quantisation
// statistics, so the bits are those of the single matrices.
//
// Products read the expansion (N + E, K + E) in the dtype of products: W, and room for the adapter
// beside and below it (kernels/lora). It is the memory of the matrix itself where that is dense or
// kept expanded, else scratch that is filled for each use.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/layers/context.h"

namespace attune {

enum class WeightStorage : uint8_t { kDense, kNf4, kNf4Double };

struct FrozenMatrixOptions {
  WeightStorage storage = WeightStorage::kDense;
  // NF4 only: quantise while loading, but keep the values expanded. The same numbers, four times
  // the memory, no work per step.
  bool resident = false;
  int64_t extension = 0;  // E
};

class FrozenMatrix {
 public:
  // Takes room for the matrices from the arena's bottom; contents come with Load.
  FrozenMatrix(const LayerContext& ctx, const FrozenMatrixOptions& options,
               std::vector<int64_t> part_rows, int64_t in);

  int64_t rows() const { return rows_; }
  int64_t in() const { return in_; }
  int parts() const { return static_cast<int>(part_rows_.size()); }
  int64_t row_begin(int part) const { return row_begin_[part]; }
  int64_t part_rows(int part) const { return part_rows_[part]; }

  // Fills part `part` from w (part_rows, K), f64, f32 or bf16 on the device; quantises.
  void Load(const LayerContext& ctx, int part, const TensorView& w);

  // True if the expansion lasts, and with it the adapter's share.
  bool expanded() const { return dense_.defined(); }
  // (N + E, K + E): the lasting one, else in scratch, which lives as long as the caller's
  // ArenaScope and whose share of the adapter is not filled.
  TensorView Expand(const LayerContext& ctx) const;
  // W into `expansion`, where there is no lasting one.
  void ExpandInto(const LayerContext& ctx, const TensorView& expansion) const;
  TensorView ExpansionShape(const LayerContext& ctx) const;  // without memory

 private:
  struct Nf4Part {
    TensorView packed, absmax, codes, absmax2, offset;
  };

  Nf4Part NewPart(const LayerContext& ctx, ArenaEnd end, int64_t elements) const;
  void Quantize(const LayerContext& ctx, const TensorView& w, const Nf4Part& to) const;
  // W's rows of a part in an expansion.
  TensorView RowsOf(const TensorView& expansion, int part) const;
  static void Dequantize(const LayerContext& ctx, const Nf4Part& from, const TensorView& to);

  FrozenMatrixOptions options_;
  std::vector<int64_t> part_rows_;
  std::vector<int64_t> row_begin_;
  int64_t rows_ = 0;
  int64_t in_;
  TensorView dense_;            // (N + E, K + E), if expanded
  std::vector<Nf4Part> parts_;  // else
};

}  // namespace attune
