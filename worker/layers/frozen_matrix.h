// FrozenMatrix: weights (N, K) that are not trained, dense or as NF4, possibly several matrices
// with the same input stacked by rows (q, k, v; gate, up). Each keeps its own quantisation
// statistics, so the bits are those of the single matrices; some may be NF4 and others dense.
//
// Products read the expansion (N + E, K + E) in the dtype of products: W, and room for the adapter
// beside and below it (kernels/lora). It is the memory of the matrix itself where that is dense or
// kept expanded, else scratch that is filled for each use.
//
// Products of 8-bit floats read Fp8Codes instead: W, and W^T for the other direction, each with
// room for the adapter beside it (kernels/fp8).
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
  int64_t extension = 0;  // E, or with fp8 Fp8Extension of the adapter's columns
  bool fp8 = false;       // products of 8-bit floats
};

// What an expansion is for: y = x W^T, or dx = dy W.
enum class Direction : uint8_t { kForward, kBackward };

// One of the stacked matrices.
struct FrozenPart {
  int64_t rows = 0;
  bool dense = false;  // whatever the storage is
};

// A matrix (N, K) as kernels/nf4 has it. With single quantisation absmax stands for the last three.
struct Nf4Weight {
  TensorView packed;   // (Nf4PackedBytes(N * K)) u8
  TensorView absmax;   // (blocks) f32
  TensorView codes;    // (blocks) u8
  TensorView absmax2;  // (groups) f32
  TensorView offset;   // (1) f32
};
// The views of so many elements, without memory.
Nf4Weight Nf4Shapes(int64_t elements, bool double_quantization);

class FrozenMatrix {
 public:
  // Takes room for the matrices from the arena's bottom; contents come with Load.
  FrozenMatrix(const LayerContext& ctx, const FrozenMatrixOptions& options,
               const std::vector<FrozenPart>& parts, int64_t in);

  int64_t rows() const { return rows_; }
  int64_t in() const { return in_; }
  int parts() const { return static_cast<int>(parts_.size()); }
  int64_t row_begin(int part) const { return parts_[part].row_begin; }
  int64_t part_rows(int part) const { return parts_[part].rows; }

  // Around the Loads of all parts, in an ArenaScope of their own: a matrix that is kept in another
  // form takes room for what it is made from, and is made from it.
  void BeginLoad(const LayerContext& ctx);
  void EndLoad(const LayerContext& ctx);
  // Fills part `part` from w (part_rows, K), f64, f32 or bf16 on the device; quantises.
  void Load(const LayerContext& ctx, int part, const TensorView& w);
  // Fills it from NF4 in host memory, of the quantisation of the storage, and keeps every bit; of a
  // matrix that is expanded, of either quantisation.
  void Load(const LayerContext& ctx, int part, const Nf4Weight& w);

  // True if the expansions last, and with them the adapter's share.
  bool expanded() const { return lasting_[0].defined(); }
  // (N + E, K + E), with fp8 (N, Fp8RowStride(K + E)) or backward (K, Fp8RowStride(N + E)): the
  // lasting one, else in scratch, which lives as long as the caller's ArenaScope and whose share of
  // the adapter is not filled.
  TensorView Expand(const LayerContext& ctx, Direction direction) const;
  // W into `expansion`, where there is no lasting one.
  void ExpandInto(const LayerContext& ctx, Direction direction, const TensorView& expansion) const;
  TensorView ExpansionShape(const LayerContext& ctx, Direction direction) const;  // without memory

  bool fp8() const { return options_.fp8; }
  const TensorView& scale() const { return scale_; }  // of codes: (max(N, K)) f32, all the same

 private:
  struct Part {
    int64_t rows = 0;
    int64_t row_begin = 0;
    bool dense = false;
    // What the expansions are made from, where it is kept: one of the two.
    Nf4Weight nf4;
    TensorView values;  // (rows, K)
  };

  Nf4Weight ShapesOf(const Part& part) const;
  static Nf4Weight NewNf4(const LayerContext& ctx, ArenaEnd end, const Nf4Weight& shapes);
  void Quantize(const LayerContext& ctx, const TensorView& w, const Nf4Weight& to) const;
  // Room for what the expansions are made from.
  void PlaceParts(const LayerContext& ctx, ArenaEnd end);
  // W's rows of a part in an expansion that is not of codes.
  TensorView RowsOf(const TensorView& expansion, const Part& part) const;
  void EncodeInto(const LayerContext& ctx, Direction direction, const TensorView& expansion) const;
  static void Dequantize(const LayerContext& ctx, const Nf4Weight& from, const TensorView& to);

  FrozenMatrixOptions options_;
  std::vector<Part> parts_;
  int64_t rows_ = 0;
  int64_t in_;
  TensorView lasting_[2];  // of each direction, if expanded; the same one without fp8
  TensorView scale_;
};

}  // namespace attune
