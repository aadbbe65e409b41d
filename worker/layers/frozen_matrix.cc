#include "worker/layers/frozen_matrix.h"

#include "kernels/elementwise/elementwise.h"
#include "kernels/nf4/nf4.h"

namespace attune {

FrozenMatrix::FrozenMatrix(const LayerContext& ctx, WeightStorage storage,
                           std::vector<int64_t> part_rows, int64_t in)
    : storage_(storage), part_rows_(std::move(part_rows)), in_(in) {
  const auto weights = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, dtype, shape);
  };
  for (int64_t rows : part_rows_) {
    row_begin_.push_back(rows_);
    rows_ += rows;
    if (storage_ == WeightStorage::kDense) continue;
    const int64_t elements = rows * in_;
    const int64_t blocks = Nf4Blocks(elements);
    Nf4Part part;
    part.packed = weights(DType::kU8, {Nf4PackedBytes(elements)});
    if (storage_ == WeightStorage::kNf4) {
      part.absmax = weights(DType::kF32, {blocks});
    } else {
      part.codes = weights(DType::kU8, {blocks});
      part.absmax2 = weights(DType::kF32, {Nf4Groups(blocks)});
      part.offset = weights(DType::kF32, {1});
    }
    parts_.push_back(part);
  }
  if (storage_ == WeightStorage::kDense) dense_ = weights(ctx.dtype, {rows_, in_});
}

void FrozenMatrix::Load(const LayerContext& ctx, int part, const TensorView& w) {
  CHECK(w.dim(0) == part_rows_[part] && w.dim(1) == in_);
  if (storage_ == WeightStorage::kDense) {
    const int64_t begin = row_begin_[part];
    Copy(ctx.exec, {.x = w, .y = dense_.Slice(0, begin, begin + part_rows_[part])});
    return;
  }
  ArenaScope scope(ctx.arena);
  TensorView source = w;
  if (w.dtype != DType::kF32 && w.dtype != DType::kBF16) {
    source = ctx.arena->NewScratch(DType::kF32, {w.dim(0), w.dim(1)});
    Copy(ctx.exec, {.x = w, .y = source});
  }
  const Nf4Part& q = parts_[part];
  if (storage_ == WeightStorage::kNf4) {
    Nf4Quantize(ctx.exec, {.w = source, .packed = q.packed, .absmax = q.absmax});
    return;
  }
  const TensorView absmax = ctx.arena->NewScratch(DType::kF32, {q.codes.dim(0)});
  Nf4Quantize(ctx.exec, {.w = source, .packed = q.packed, .absmax = absmax});
  Nf4DoubleQuantize(ctx.exec,
                    {.absmax = absmax, .codes = q.codes, .absmax2 = q.absmax2, .offset = q.offset});
}

TensorView FrozenMatrix::Expand(const LayerContext& ctx) const {
  if (storage_ == WeightStorage::kDense) return dense_;
  const TensorView w = ctx.Scratch({rows_, in_});
  for (int i = 0; i < parts(); ++i) {
    Nf4Dequantize(ctx.exec, {.packed = parts_[i].packed,
                             .codes = parts_[i].codes,
                             .absmax2 = parts_[i].absmax2,
                             .offset = parts_[i].offset,
                             .absmax = parts_[i].absmax,
                             .out = w.Slice(0, row_begin_[i], row_begin_[i] + part_rows_[i])});
  }
  return w;
}

}  // namespace attune
