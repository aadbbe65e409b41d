#include "worker/layers/frozen_matrix.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "kernels/elementwise/elementwise.h"
#include "kernels/fp8/fp8.h"
#include "kernels/nf4/nf4.h"
#include "worker/shard/communicator.h"
#include "worker/shard/peer_memory.h"

namespace attune {
namespace {

Nf4DequantizeArgs DequantizationOf(const Nf4Weight& from, const TensorView& to) {
  return {.packed = from.packed,
          .codes = from.codes,
          .absmax2 = from.absmax2,
          .offset = from.offset,
          .absmax = from.absmax,
          .out = to};
}

constexpr size_t kTogether = 4;  // parts that are expanded at once

}  // namespace

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
    to = another ? room(shape.dtype, {shape.dim(0), shape.stride(0)}).Slice(1, 0, shape.dim(1))
                 : lasting_[0];
  }
}

void FrozenMatrix::PlaceParts(const LayerContext& ctx, ArenaEnd end) {
  const MemoryClass c = end == ArenaEnd::kBottom ? MemoryClass::kWeights : MemoryClass::kWorkspace;
  for (Part& part : parts_) {
    if (part.dense) {
      part.values = ctx.arena->New(end, c, ctx.dtype, {part.rows, in_});
    } else {
      Nf4Weight shapes = ShapesOf(part);
      if (Sharded()) shapes.packed = TensorView(nullptr, DType::kU8, {ShardBytes(part)});
      part.nf4 = NewNf4(ctx, end, shapes);
    }
  }
}

int64_t FrozenMatrix::ShardBytes(const Part& part) const {
  constexpr int64_t kAlignment = 256;
  const int64_t bytes = Nf4PackedBytes(part.rows * in_), n = options_.shards * kAlignment;
  return (bytes + n - 1) / n * kAlignment;
}

int64_t FrozenMatrix::GatherBytes() const {
  int64_t bytes = 0;
  for (const Part& part : parts_) {
    if (Sharded() && !part.dense) bytes = std::max(bytes, options_.shards * ShardBytes(part));
  }
  return bytes;
}

Nf4Weight FrozenMatrix::Gather(const LayerContext& ctx, const Part& part) const {
  if (!Sharded()) return part.nf4;
  const int64_t bytes = options_.shards * ShardBytes(part);
  const TensorView memory = ctx.gather_memory.defined()
                                ? ctx.gather_memory.Slice(0, 0, bytes)
                                : ctx.arena->NewScratch(DType::kU8, {bytes});
  Nf4Weight whole = part.nf4;
  whole.packed = memory;
  if (ctx.exec.plan) return whole;
  if (ctx.weight_memory != nullptr) {
    ctx.weight_memory->Gather(ctx.exec, part.nf4.packed, memory);
    return whole;
  }
  CHECK(ctx.weight_ranks != nullptr);
  // A peer that is lost leaves rubbish here; the step's own reduction then fails, and says so.
  ctx.weight_ranks->AllGather(ctx.exec, part.nf4.packed, memory).IgnoreError();
  return whole;
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
  if (!options_.fp8) return;
  Fill(ctx.exec, {.x = scale_, .value = 0});
  if (expanded()) PlaceParts(ctx, ArenaEnd::kTop);
}

void FrozenMatrix::EndLoad(const LayerContext& ctx) {
  if (!options_.fp8 || !expanded()) return;
  for (Direction direction : {Direction::kForward, Direction::kBackward}) {
    EncodeInto(ctx, direction, lasting_[static_cast<int>(direction)]);
  }
  for (Part& part : parts_) part.nf4 = {}, part.values = {};
}

void FrozenMatrix::Load(const LayerContext& ctx, int index, const TensorView& w) {
  const Part& part = parts_[index];
  CHECK(w.dim(0) == part.rows && w.dim(1) == in_);
  if (part.dense) {
    const TensorView to = FromParts() ? part.values : RowsOf(lasting_[0], part);
    Copy(ctx.exec, {.x = w, .y = to});
    if (options_.fp8) Fp8WeightScale(ctx.exec, {.w = to, .scale = scale_});
    return;
  }
  ArenaScope scope(ctx.arena);
  const Nf4Weight whole = RoomToLoad(ctx, part, ShapesOf(part));
  {
    ArenaScope source_scope(ctx.arena);
    TensorView source = w;
    if (w.dtype != DType::kF32 && w.dtype != DType::kBF16) {
      source = ctx.arena->NewScratch(DType::kF32, {w.dim(0), w.dim(1)});
      Copy(ctx.exec, {.x = w, .y = source});
    }
    Quantize(ctx, source, whole);
  }
  Keep(ctx, part, whole);
}

absl::Status FrozenMatrix::Load(const LayerContext& ctx, const HostReader& reader, int index,
                                const Nf4Weight& w) {
  const Part& part = parts_[index];
  ArenaScope scope(ctx.arena);
  const Nf4Weight whole = RoomToLoad(ctx, part, w);
  absl::Status status;
  const auto upload = [&](const TensorView& from, const TensorView& view) {
    CHECK(from.dtype == view.dtype && from.SameShape(view));
    if (from.defined()) status.Update(CopyToDevice(ctx.exec, reader, from.data, view));
  };
  upload(w.packed, whole.packed);
  upload(w.absmax, whole.absmax);
  upload(w.codes, whole.codes);
  upload(w.absmax2, whole.absmax2);
  upload(w.offset, whole.offset);
  if (status.ok()) Keep(ctx, part, whole);
  return status;
}

Nf4Weight FrozenMatrix::RoomToLoad(const LayerContext& ctx, const Part& part,
                                   const Nf4Weight& shapes) const {
  return FromParts() && !Sharded() ? part.nf4 : NewNf4(ctx, ArenaEnd::kTop, shapes);
}

void FrozenMatrix::Keep(const LayerContext& ctx, const Part& part, const Nf4Weight& whole) const {
  if (!FromParts()) return Dequantize(ctx, whole, RowsOf(lasting_[0], part));
  if (options_.fp8) {
    ArenaScope scope(ctx.arena);
    const TensorView w = ctx.Scratch({part.rows, in_});
    Dequantize(ctx, whole, w);
    Fp8WeightScale(ctx.exec, {.w = w, .scale = scale_});
  }
  if (!Sharded()) return;
  const int64_t bytes = ShardBytes(part), size = whole.packed.dim(0);
  const int64_t begin = std::min(options_.shard * bytes, size), end = std::min(begin + bytes, size);
  Copy(ctx.exec,
       {.x = whole.packed.Slice(0, begin, end), .y = part.nf4.packed.Slice(0, 0, end - begin)});
  const auto keep = [&](const TensorView& from, const TensorView& to) {
    if (from.defined()) Copy(ctx.exec, {.x = from, .y = to});
  };
  keep(whole.absmax, part.nf4.absmax);
  keep(whole.codes, part.nf4.codes);
  keep(whole.absmax2, part.nf4.absmax2);
  keep(whole.offset, part.nf4.offset);
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
  Nf4Dequantize(ctx.exec, DequantizationOf(from, to));
}

TensorView FrozenMatrix::ExpansionShape(const LayerContext& ctx, Direction direction) const {
  const int64_t E = options_.extension;
  if (!options_.fp8) return AlignedRows(ctx.dtype, rows_ + E, in_ + E);
  const bool forward = direction == Direction::kForward;
  return TensorView(nullptr, DType::kF8E4M3,
                    {forward ? rows_ : in_, Fp8RowStride((forward ? in_ : rows_) + E)});
}

void FrozenMatrix::ExpandInto(const LayerContext& ctx, Direction direction,
                              const TensorView& expansion) const {
  CHECK(!expanded() && expansion.SameShape(ExpansionShape(ctx, direction)));
  if (options_.fp8) return EncodeInto(ctx, direction, expansion);
  std::array<Nf4DequantizeArgs, kTogether> parts;
  size_t count = 0;
  const auto run = [&] {
    Nf4Dequantize(ctx.exec, std::span(parts.data(), std::exchange(count, 0)));
  };
  for (const Part& part : parts_) {
    const TensorView rows = RowsOf(expansion, part);
    if (part.dense) {
      Copy(ctx.exec, {.x = part.values, .y = rows});
      continue;
    }
    ArenaScope scope(ctx.arena);
    parts[count++] = DequantizationOf(Gather(ctx, part), rows);
    if (Sharded() || count == kTogether) run();  // the next is gathered into the same memory
  }
  run();
}

void FrozenMatrix::EncodeInto(const LayerContext& ctx, Direction direction,
                              const TensorView& expansion) const {
  const bool transposed = direction == Direction::kBackward;
  std::array<Nf4ToFp8Args, kTogether> parts;
  size_t count = 0;
  const auto run = [&] { Nf4ToFp8(ctx.exec, std::span(parts.data(), std::exchange(count, 0))); };
  for (const Part& part : parts_) {
    const int64_t begin = part.row_begin, end = begin + part.rows;
    const TensorView to = transposed ? expansion.Slice(1, begin, end) : RowsOf(expansion, part);
    if (part.dense) {
      Fp8QuantizeWeight(ctx.exec,
                        {.w = part.values, .scale = scale_, .q = to, .transposed = transposed});
      continue;
    }
    ArenaScope scope(ctx.arena);
    const Nf4Weight w = Gather(ctx, part);
    parts[count++] = {.packed = w.packed,
                      .codes = w.codes,
                      .absmax2 = w.absmax2,
                      .offset = w.offset,
                      .absmax = w.absmax,
                      .scale = scale_,
                      .q = to,
                      .transposed = transposed};
    if (Sharded() || count == kTogether) run();
  }
  run();
}

TensorView FrozenMatrix::Expand(const LayerContext& ctx, Direction direction) const {
  if (expanded()) return lasting_[static_cast<int>(direction)];
  const TensorView shape = ExpansionShape(ctx, direction);
  const TensorView w =
      ctx.arena->NewScratch(shape.dtype, {shape.dim(0), shape.stride(0)}).Slice(1, 0, shape.dim(1));
  ExpandInto(ctx, direction, w);
  return w;
}

}  // namespace attune
