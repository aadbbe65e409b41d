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
  const auto room_of = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, dtype, shape);
  };
  const auto room = [&](std::initializer_list<int64_t> shape) { return room_of(ctx.dtype, shape); };
  const int64_t E = options_.extension;
  if (options_.fp8) {
    codes_ = {.w = room_of(DType::kF8E4M3, {rows_, in_ + E}),
              .w_t = room_of(DType::kF8E4M3, {in_, rows_ + E}),
              .scale = room_of(DType::kF32, {std::max(rows_, in_)})};
    return;
  }
  if (all_dense || options_.resident) {
    dense_ = room({rows_ + E, in_ + E});
    return;
  }
  for (Part& part : parts_) {
    if (part.dense) {
      part.values = room({part.rows, in_});
      continue;
    }
    part.nf4 = NewNf4(ctx, ArenaEnd::kBottom, ShapesOf(part));
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
  if (options_.fp8) dense_ = ctx.Scratch({rows_, in_});
}

void FrozenMatrix::EndLoad(const LayerContext& ctx) {
  if (!options_.fp8) return;
  Fill(ctx.exec, {.x = codes_.scale, .value = 0});
  Fp8WeightScale(ctx.exec, {.w = dense_, .scale = codes_.scale});
  Fp8QuantizeWeight(ctx.exec, {.w = dense_,
                               .scale = codes_.scale,
                               .q = codes_.w.Slice(1, 0, in_),
                               .q_t = codes_.w_t.Slice(1, 0, rows_)});
  dense_ = TensorView();
}

void FrozenMatrix::Load(const LayerContext& ctx, int index, const TensorView& w) {
  const Part& part = parts_[index];
  CHECK(w.dim(0) == part.rows && w.dim(1) == in_);
  if (part.dense) {
    return Copy(ctx.exec, {.x = w, .y = expanded() ? RowsOf(dense_, part) : part.values});
  }
  ArenaScope scope(ctx.arena);
  TensorView source = w;
  if (w.dtype != DType::kF32 && w.dtype != DType::kBF16) {
    source = ctx.arena->NewScratch(DType::kF32, {w.dim(0), w.dim(1)});
    Copy(ctx.exec, {.x = w, .y = source});
  }
  if (!expanded()) return Quantize(ctx, source, part.nf4);
  const Nf4Weight quantized = NewNf4(ctx, ArenaEnd::kTop, ShapesOf(part));
  Quantize(ctx, source, quantized);
  Dequantize(ctx, quantized, RowsOf(dense_, part));
}

void FrozenMatrix::Load(const LayerContext& ctx, int index, const Nf4Weight& w) {
  const Part& part = parts_[index];
  ArenaScope scope(ctx.arena);
  const Nf4Weight to = expanded() ? NewNf4(ctx, ArenaEnd::kTop, w) : part.nf4;
  const auto upload = [&](const TensorView& from, const TensorView& view) {
    CHECK(from.dtype == view.dtype && from.SameShape(view));
    if (from.defined()) CopyToDevice(ctx.exec, from.data, view);
  };
  upload(w.packed, to.packed);
  upload(w.absmax, to.absmax);
  upload(w.codes, to.codes);
  upload(w.absmax2, to.absmax2);
  upload(w.offset, to.offset);
  if (expanded()) Dequantize(ctx, to, RowsOf(dense_, part));
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

TensorView FrozenMatrix::ExpansionShape(const LayerContext& ctx) const {
  const int64_t E = options_.extension;
  return TensorView(nullptr, ctx.dtype, {rows_ + E, in_ + E});
}

void FrozenMatrix::ExpandInto(const LayerContext& ctx, const TensorView& expansion) const {
  CHECK(!expanded() && expansion.SameShape(ExpansionShape(ctx)));
  for (const Part& part : parts_) {
    const TensorView rows = RowsOf(expansion, part);
    if (part.dense) {
      Copy(ctx.exec, {.x = part.values, .y = rows});
    } else {
      Dequantize(ctx, part.nf4, rows);
    }
  }
}

TensorView FrozenMatrix::Expand(const LayerContext& ctx) const {
  CHECK(!options_.fp8);
  if (expanded()) return dense_;
  const TensorView shape = ExpansionShape(ctx);
  const TensorView w = ctx.Scratch({shape.dim(0), shape.dim(1)});
  ExpandInto(ctx, w);
  return w;
}

}  // namespace attune
