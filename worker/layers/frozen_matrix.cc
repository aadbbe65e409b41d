#include "worker/layers/frozen_matrix.h"

#include "kernels/elementwise/elementwise.h"
#include "kernels/nf4/nf4.h"

namespace attune {

FrozenMatrix::FrozenMatrix(const LayerContext& ctx, const FrozenMatrixOptions& options,
                           std::vector<int64_t> part_rows, int64_t in)
    : options_(options), part_rows_(std::move(part_rows)), in_(in) {
  const bool expanded = options_.storage == WeightStorage::kDense || options_.resident;
  for (int64_t rows : part_rows_) {
    row_begin_.push_back(rows_);
    rows_ += rows;
    if (!expanded) parts_.push_back(NewPart(ctx, ArenaEnd::kBottom, rows * in_));
  }
  if (!expanded) return;
  const int64_t E = options_.extension;
  dense_ =
      ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, ctx.dtype, {rows_ + E, in_ + E});
}

FrozenMatrix::Nf4Part FrozenMatrix::NewPart(const LayerContext& ctx, ArenaEnd end,
                                            int64_t elements) const {
  const MemoryClass c = end == ArenaEnd::kBottom ? MemoryClass::kWeights : MemoryClass::kWorkspace;
  const auto room = [&](DType dtype, int64_t n) { return ctx.arena->New(end, c, dtype, {n}); };
  const int64_t blocks = Nf4Blocks(elements);
  Nf4Part part;
  part.packed = room(DType::kU8, Nf4PackedBytes(elements));
  if (options_.storage == WeightStorage::kNf4) {
    part.absmax = room(DType::kF32, blocks);
  } else {
    part.codes = room(DType::kU8, blocks);
    part.absmax2 = room(DType::kF32, Nf4Groups(blocks));
    part.offset = room(DType::kF32, 1);
  }
  return part;
}

TensorView FrozenMatrix::RowsOf(const TensorView& expansion, int part) const {
  const int64_t begin = row_begin_[part];
  return expansion.Slice(0, begin, begin + part_rows_[part]).Slice(1, 0, in_);
}

void FrozenMatrix::Load(const LayerContext& ctx, int part, const TensorView& w) {
  CHECK(w.dim(0) == part_rows_[part] && w.dim(1) == in_);
  if (options_.storage == WeightStorage::kDense) {
    return Copy(ctx.exec, {.x = w, .y = RowsOf(dense_, part)});
  }
  ArenaScope scope(ctx.arena);
  TensorView source = w;
  if (w.dtype != DType::kF32 && w.dtype != DType::kBF16) {
    source = ctx.arena->NewScratch(DType::kF32, {w.dim(0), w.dim(1)});
    Copy(ctx.exec, {.x = w, .y = source});
  }
  if (!options_.resident) return Quantize(ctx, source, parts_[part]);
  const Nf4Part quantized = NewPart(ctx, ArenaEnd::kTop, w.size());
  Quantize(ctx, source, quantized);
  Dequantize(ctx, quantized, RowsOf(dense_, part));
}

void FrozenMatrix::Quantize(const LayerContext& ctx, const TensorView& w, const Nf4Part& to) const {
  if (options_.storage == WeightStorage::kNf4) {
    return Nf4Quantize(ctx.exec, {.w = w, .packed = to.packed, .absmax = to.absmax});
  }
  ArenaScope scope(ctx.arena);
  const TensorView absmax = ctx.arena->NewScratch(DType::kF32, {to.codes.dim(0)});
  Nf4Quantize(ctx.exec, {.w = w, .packed = to.packed, .absmax = absmax});
  Nf4DoubleQuantize(
      ctx.exec, {.absmax = absmax, .codes = to.codes, .absmax2 = to.absmax2, .offset = to.offset});
}

void FrozenMatrix::Dequantize(const LayerContext& ctx, const Nf4Part& from, const TensorView& to) {
  Nf4Dequantize(ctx.exec, {.packed = from.packed,
                           .codes = from.codes,
                           .absmax2 = from.absmax2,
                           .offset = from.offset,
                           .absmax = from.absmax,
                           .out = to});
}

TensorView FrozenMatrix::ExpansionShape(const LayerContext& ctx) const {
  const int64_t E = options_.extension;
  return TensorView(nullptr, ctx.dtype, {rows_ + E, in_ + E});
}

void FrozenMatrix::ExpandInto(const LayerContext& ctx, const TensorView& expansion) const {
  CHECK(!expanded() && expansion.SameShape(ExpansionShape(ctx)));
  for (int i = 0; i < parts(); ++i) Dequantize(ctx, parts_[i], RowsOf(expansion, i));
}

TensorView FrozenMatrix::Expand(const LayerContext& ctx) const {
  if (expanded()) return dense_;
  const TensorView shape = ExpansionShape(ctx);
  const TensorView w = ctx.Scratch({shape.dim(0), shape.dim(1)});
  ExpandInto(ctx, w);
  return w;
}

}  // namespace attune
