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

#include "absl/status/status.h"
#include "worker/layers/context.h"
#include "worker/memory/staging_ring.h"

namespace attune {

enum class WeightStorage : uint8_t { kDense, kNf4, kNf4Double };

struct FrozenMatrixOptions {
  WeightStorage storage = WeightStorage::kDense;
  // NF4 only: quantise while loading, but keep the values expanded. The same numbers, four times
  // the memory, no work per step.
  bool resident = false;
  int64_t extension = 0;  // E, or with fp8 Fp8Extension of the adapter's columns
  bool fp8 = false;       // products of 8-bit floats
  // NF4 that is not kept expanded: this rank has the `shard`-th of `shards` equal pieces of each
  // matrix's nibbles (block statistics, 3 % of the bytes, are everywhere); the others' come through
  // LayerContext::weight_ranks with each expansion.
  int shards = 1;
  int shard = 0;
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

  // Around the Loads of all parts, in an ArenaScope of their own: a matrix whose lasting form is
  // made from all of them takes room for them meanwhile.
  void BeginLoad(const LayerContext& ctx);
  void EndLoad(const LayerContext& ctx);
  // Fills part `part` from w (part_rows, K), f64, f32 or bf16 on the device; quantises.
  void Load(const LayerContext& ctx, int part, const TensorView& w);
  // Fills it from NF4 in host memory, which `reader` reads, of the quantisation of the storage, and
  // keeps every bit; of a matrix that is expanded, of either quantisation.
  absl::Status Load(const LayerContext& ctx, const HostReader& reader, int part,
                    const Nf4Weight& w);

  // True if the expansions last, and with them the adapter's share.
  bool expanded() const { return lasting_[0].defined(); }
  // (N + E, K + E) in AlignedRows, with fp8 (N, Fp8RowStride(K + E)) or backward (K, Fp8RowStride(N
  // + E)): the lasting one, else in scratch, which lives as long as the caller's ArenaScope and
  // whose share of the adapter is not filled.
  TensorView Expand(const LayerContext& ctx, Direction direction) const;
  // W into `expansion`, where there is no lasting one.
  void ExpandInto(const LayerContext& ctx, Direction direction, const TensorView& expansion) const;
  TensorView ExpansionShape(const LayerContext& ctx, Direction direction) const;  // without memory

  // Of the memory in which an expansion gathers its shards; 0 without.
  int64_t GatherBytes() const;

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

  // Part p's NF4 when it is whole, and of its nibbles the bytes of a shard.
  Nf4Weight ShapesOf(const Part& part) const;
  int64_t ShardBytes(const Part& part) const;
  // Whole, out of all shards.
  Nf4Weight Gather(const LayerContext& ctx, const Part& part) const;
  // Where a part's NF4 is put while it is loaded: its own room, if that is for all of it, or
  // scratch.
  Nf4Weight RoomToLoad(const LayerContext& ctx, const Part& part, const Nf4Weight& shapes) const;
  // Puts it where it belongs.
  void Keep(const LayerContext& ctx, const Part& part, const Nf4Weight& whole) const;
  // The lasting form is made from the parts, not they from it.
  bool FromParts() const { return !expanded() || options_.fp8; }
  bool Sharded() const { return options_.shards > 1 && !expanded(); }
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
