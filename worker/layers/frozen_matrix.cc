#include "worker/layers/frozen_matrix.h"

#include <algorithm>

#include "kernels/elementwise/elementwise.h"
#include "kernels/fp8/fp8.h"
#include "kernels/nf4/nf4.h"

namespace attune {

Nf4Weight Nf4Shapes(int64_t elements, bool double_quantization) {
  const int64_t blocks = Nf4Blocks(elements);
  Nf4Weight w{.packed = TensorView(nullptr, DType::kU8, {Nf4PackedBytes(elements)})};
  if (!double_quantization) {
    w.absmax = TensorView(nullptr, DType::kF32, {blocks});
    return w;
  }
  w.codes = TensorView(nullptr, DType::kU8, {blocks});
  w.absmax2 = TensorView(nullptr, DType::kF32, {Nf4Groups(blocks)});
  w.offset = TensorView(nullptr, DType::kF32, {1});
  return w;
}

FrozenMatrix::FrozenMatrix(const LayerContext& ctx, const FrozenMatrixOptions& options,
                           const std::vector<FrozenPart>& parts, int64_t in)
    : options_(options), in_(in) {
  bool all_dense = true;
  for (const FrozenPart& part : parts) {
    const bool dense = part.dense || options_.storage == WeightStorage::kDense;
    parts_.push_back({.rows = part.rows, .row_begin = rows_, .dense = dense});
    rows_ += part.rows;
    all_dense &= dense;
  }
  const auto room = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, dtype, shape);
  };
  if (options_.fp8) scale_ = room(DType::kF32, {std::max(rows_, in_)});
  if (!all_dense && !options_.resident) {
    PlaceParts(ctx, ArenaEnd::kBottom);
    return;
  }
  for (Direction direction : {Direction::kForward, Direction::kBackward}) {
    TensorView& to = lasting_[static_cast<int>(direction)];
    const TensorView shape = ExpansionShape(ctx, direction);
    const bool another = options_.fp8 || direction == Direction::kForward;
    to = another ? room(shape.dtype, {shape.dim(0), shape.dim(1)}) : lasting_[0];
  }
}

void FrozenMatrix::PlaceParts(const LayerContext& ctx, ArenaEnd end) {
  const MemoryClass c = end == ArenaEnd::kBottom ? MemoryClass::kWeights : MemoryClass::kWorkspace;
  for (Part& part : parts_) {
    if (part.dense) {
      part.values = ctx.arena->New(end, c, ctx.dtype, {part.rows, in_});
    } else {
      part.nf4 = NewNf4(ctx, end, ShapesOf(part));
    }
  }
}

Nf4Weight FrozenMatrix::ShapesOf(const Part& part) const {
  return Nf4Shapes(part.rows * in_, options_.storage == WeightStorage::kNf4Double);
}

Nf4Weight FrozenMatrix::NewNf4(const LayerContext& ctx, ArenaEnd end, const Nf4Weight& shapes) {
  const MemoryClass c = end == ArenaEnd::kBottom ? MemoryClass::kWeights : MemoryClass::kWorkspace;
  Nf4Weight out = shapes;
  for (TensorView* view : {&out.packed, &out.absmax, &out.codes, &out.absmax2, &out.offset}) {
    if (view->defined()) *view = ctx.arena->New(end, c, view->dtype, {view->dim(0)});
  }
  return out;
}

TensorView FrozenMatrix::RowsOf(const TensorView& expansion, const Part& part) const {
  return expansion.Slice(0, part.row_begin, part.row_begin + part.rows).Slice(1, 0, in_);
}

void FrozenMatrix::BeginLoad(const LayerContext& ctx) {
  if (options_.fp8 && expanded()) PlaceParts(ctx, ArenaEnd::kTop);
}

void FrozenMatrix::EndLoad(const LayerContext& ctx) {
  if (!options_.fp8) return;
  Fill(ctx.exec, {.x = scale_, .value = 0});
  for (const Part& part : parts_) {
    ArenaScope scope(ctx.arena);
    const TensorView w = part.dense ? part.values : ctx.Scratch({part.rows, in_});
    if (!part.dense) Dequantize(ctx, part.nf4, w);
    Fp8WeightScale(ctx.exec, {.w = w, .scale = scale_});
  }
  if (!expanded()) return;
  for (Direction direction : {Direction::kForward, Direction::kBackward}) {
    EncodeInto(ctx, direction, lasting_[static_cast<int>(direction)]);
  }
  for (Part& part : parts_) part.nf4 = {}, part.values = {};
}

void FrozenMatrix::Load(const LayerContext& ctx, int index, const TensorView& w) {
  const Part& part = parts_[index];
  CHECK(w.dim(0) == part.rows && w.dim(1) == in_);
  const bool to_parts = !expanded() || options_.fp8;
  if (part.dense) {
    return Copy(ctx.exec, {.x = w, .y = to_parts ? part.values : RowsOf(lasting_[0], part)});
  }
  ArenaScope scope(ctx.arena);
  TensorView source = w;
  if (w.dtype != DType::kF32 && w.dtype != DType::kBF16) {
    source = ctx.arena->NewScratch(DType::kF32, {w.dim(0), w.dim(1)});
    Copy(ctx.exec, {.x = w, .y = source});
  }
  if (to_parts) return Quantize(ctx, source, part.nf4);
  const Nf4Weight quantized = NewNf4(ctx, ArenaEnd::kTop, ShapesOf(part));
  Quantize(ctx, source, quantized);
  Dequantize(ctx, quantized, RowsOf(lasting_[0], part));
}

void FrozenMatrix::Load(const LayerContext& ctx, int index, const Nf4Weight& w) {
  const Part& part = parts_[index];
  ArenaScope scope(ctx.arena);
  const bool to_parts = !expanded() || options_.fp8;
  const Nf4Weight to = to_parts ? part.nf4 : NewNf4(ctx, ArenaEnd::kTop, w);
  const auto upload = [&](const TensorView& from, const TensorView& view) {
    CHECK(from.dtype == view.dtype && from.SameShape(view));
    if (from.defined()) CopyToDevice(ctx.exec, from.data, view);
  };
  upload(w.packed, to.packed);
  upload(w.absmax, to.absmax);
  upload(w.codes, to.codes);
  upload(w.absmax2, to.absmax2);
  upload(w.offset, to.offset);
  if (!to_parts) Dequantize(ctx, to, RowsOf(lasting_[0], part));
}

void FrozenMatrix::Quantize(const LayerContext& ctx, const TensorView& w,
                            const Nf4Weight& to) const {
  if (options_.storage == WeightStorage::kNf4) {
    return Nf4Quantize(ctx.exec, {.w = w, .packed = to.packed, .absmax = to.absmax});
  }
  ArenaScope scope(ctx.arena);
  const TensorView absmax = ctx.arena->NewScratch(DType::kF32, {to.codes.dim(0)});
  Nf4Quantize(ctx.exec, {.w = w, .packed = to.packed, .absmax = absmax});
  Nf4DoubleQuantize(
      ctx.exec, {.absmax = absmax, .codes = to.codes, .absmax2 = to.absmax2, .offset = to.offset});
}

void FrozenMatrix::Dequantize(const LayerContext& ctx, const Nf4Weight& from,
                              const TensorView& to) {
  Nf4Dequantize(ctx.exec, {.packed = from.packed,
                           .codes = from.codes,
                           .absmax2 = from.absmax2,
                           .offset = from.offset,
                           .absmax = from.absmax,
                           .out = to});
}

TensorView FrozenMatrix::ExpansionShape(const LayerContext& ctx, Direction direction) const {
  const int64_t E = options_.extension;
  if (!options_.fp8) return TensorView(nullptr, ctx.dtype, {rows_ + E, in_ + E});
  const bool forward = direction == Direction::kForward;
  return TensorView(nullptr, DType::kF8E4M3,
                    {forward ? rows_ : in_, Fp8RowStride((forward ? in_ : rows_) + E)});
}

void FrozenMatrix::ExpandInto(const LayerContext& ctx, Direction direction,
                              const TensorView& expansion) const {
  CHECK(!expanded() && expansion.SameShape(ExpansionShape(ctx, direction)));
  if (options_.fp8) return EncodeInto(ctx, direction, expansion);
  for (const Part& part : parts_) {
    const TensorView rows = RowsOf(expansion, part);
    if (part.dense) {
      Copy(ctx.exec, {.x = part.values, .y = rows});
    } else {
      Dequantize(ctx, part.nf4, rows);
    }
  }
}

void FrozenMatrix::EncodeInto(const LayerContext& ctx, Direction direction,
                              const TensorView& expansion) const {
  const bool transposed = direction == Direction::kBackward;
  for (const Part& part : parts_) {
    const int64_t begin = part.row_begin, end = begin + part.rows;
    const TensorView to = transposed ? expansion.Slice(1, begin, end)
                                     : expansion.Slice(0, begin, end).Slice(1, 0, in_);
    if (part.dense) {
      Fp8QuantizeWeight(ctx.exec,
                        {.w = part.values, .scale = scale_, .q = to, .transposed = transposed});
      continue;
    }
    Nf4ToFp8(ctx.exec, {.packed = part.nf4.packed,
                        .codes = part.nf4.codes,
                        .absmax2 = part.nf4.absmax2,
                        .offset = part.nf4.offset,
                        .absmax = part.nf4.absmax,
                        .scale = scale_,
                        .q = to,
                        .transposed = transposed});
  }
}

TensorView FrozenMatrix::Expand(const LayerContext& ctx, Direction direction) const {
  if (expanded()) return lasting_[static_cast<int>(direction)];
  const TensorView shape = ExpansionShape(ctx, direction);
  const TensorView w = ctx.arena->NewScratch(shape.dtype, {shape.dim(0), shape.dim(1)});
  ExpandInto(ctx, direction, w);
  return w;
}

}  // namespace attune
