// How a model's weights come from a source: checked, and quantised as they come.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/parallel.h"
#include "kernels/elementwise/elementwise.h"
#include "worker/model/model.h"

namespace attune {
namespace {

std::string ShapeText(const TensorView& view) {
  std::vector<int64_t> shape(view.shape, view.shape + view.rank);
  return absl::StrCat("(", absl::StrJoin(shape, ", "), ")");
}

// All of `n` words finite, of a floating dtype: an exponent of all ones is not.
template <typename Word>
bool AllFinite(const Word* words, int64_t n, Word exponent) {
  Word bad = 0;  // as wide as the words: the loop is a vector one
  for (int64_t i = 0; i < n; ++i) bad |= (words[i] & exponent) == exponent;
  return bad == 0;
}

bool AllFinite(const void* values, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kF64:
      return AllFinite(static_cast<const uint64_t*>(values), n, uint64_t{0x7ff0000000000000});
    case DType::kF32:
      return AllFinite(static_cast<const uint32_t*>(values), n, uint32_t{0x7f800000});
    case DType::kBF16:
      return AllFinite(static_cast<const uint16_t*>(values), n, uint16_t{0x7f80});
    case DType::kF16:
      return AllFinite(static_cast<const uint16_t*>(values), n, uint16_t{0x7c00});
    default:
      return true;
  }
}

// Reads all of w, each thread pieces that stay in its cache.
absl::StatusOr<bool> AllFinite(const WeightSource& source, const TensorView& w) {
  constexpr int64_t kPieceBytes = int64_t{256} << 10;
  const int64_t bytes = w.bytes(), pieces = (bytes + kPieceBytes - 1) / kPieceBytes;
  bool finite = true;
  absl::Status status;
#pragma omp parallel if (WorthThreads(w.size()))
  {
    std::vector<uint64_t> piece(kPieceBytes / sizeof(uint64_t));
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = i * kPieceBytes, size = std::min(kPieceBytes, bytes - begin);
      absl::Status read = source.Read(static_cast<const char*>(w.data) + begin, size, piece.data());
      const bool good = read.ok() && AllFinite(piece.data(), w.dtype, size / DTypeBytes(w.dtype));
      if (good) continue;
#pragma omp critical(attune_all_finite)
      status.Update(std::move(read)), finite = false;
    }
  }
  if (!status.ok()) return status;
  return finite;
}

// A contiguous view of the source as scratch on the device; itself on the CPU.
absl::StatusOr<TensorView> ToDevice(const LayerContext& ctx, const WeightSource& source,
                                    const TensorView& w) {
  if (ctx.exec.device == DeviceKind::kCpu) return w;
  TensorView out = w.rank == 1 ? ctx.arena->NewScratch(w.dtype, {w.dim(0)})
                               : ctx.arena->NewScratch(w.dtype, {w.dim(0), w.dim(1)});
  absl::Status status = CopyToDevice(ctx.exec, source, w.data, out);
  if (!status.ok()) return status;
  return out;
}

// The weight `name` with the expected shape, finite, floating.
absl::StatusOr<TensorView> Get(const LayerContext& ctx, const WeightSource& source,
                               const std::string& name, std::initializer_list<int64_t> shape) {
  absl::StatusOr<TensorView> w = source.Find(name);
  if (!w.ok()) return w.status();
  if (w->dtype == DType::kU8 || w->dtype == DType::kI8) {
    return absl::UnimplementedError(absl::StrCat(
        "tensor ", name, " has the type ", DTypeName(w->dtype),
        ", as quantised weights have. They are read as bitsandbytes' NF4, in the linear layers of "
        "the blocks alone, and where config.json has its quantization_config; give a checkpoint "
        "with this tensor in BF16, F16 or F32"));
  }
  const TensorView expected(nullptr, w->dtype, shape);
  if (!w->SameShape(expected)) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has the shape ",
                                                   ShapeText(*w), "; config.json says ",
                                                   ShapeText(expected)));
  }
  if (w->dtype != DType::kF64 && w->dtype != DType::kF32 && w->dtype != DType::kBF16 &&
      w->dtype != DType::kF16) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", name, " has the type ", DTypeName(w->dtype), "; weights are F32, BF16 or F16"));
  }
  // Every job is planned before it loads, so one look is enough.
  if (ctx.exec.plan && w->data != nullptr) {
    absl::StatusOr<bool> finite = AllFinite(source, *w);
    if (!finite.ok()) return finite.status();
    if (*finite) return w;
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " holds NaN or infinity: the checkpoint is damaged"));
  }
  return w;
}

// w of the source into `to` on the device, of any floating dtypes. In pieces, so that the scratch
// of a conversion stays small.
absl::Status CopyWeight(const LayerContext& ctx, const WeightSource& source, const TensorView& w,
                        const TensorView& to) {
  if (ctx.exec.device == DeviceKind::kCpu) {
    Copy(ctx.exec, {.x = w, .y = to});
    return absl::OkStatus();
  }
  if (w.dtype == to.dtype && to.contiguous()) return CopyToDevice(ctx.exec, source, w.data, to);
  constexpr int64_t kPieceBytes = int64_t{32} << 20;
  const int64_t rows = w.dim(0), row_bytes = w.bytes() / std::max<int64_t>(rows, 1);
  const int64_t piece = std::clamp<int64_t>(kPieceBytes / row_bytes, 1, rows);
  for (int64_t begin = 0; begin < rows; begin += piece) {
    const int64_t end = std::min(begin + piece, rows);
    ArenaScope scope(ctx.arena);
    const absl::StatusOr<TensorView> from = ToDevice(ctx, source, w.Slice(0, begin, end));
    if (!from.ok()) return from.status();
    Copy(ctx.exec, {.x = *from, .y = to.Slice(0, begin, end)});
  }
  return absl::OkStatus();
}

absl::Status LoadDense(const LayerContext& ctx, const WeightSource& source, const std::string& name,
                       const TensorView& to) {
  absl::StatusOr<TensorView> w = to.rank == 1 ? Get(ctx, source, name, {to.dim(0)})
                                              : Get(ctx, source, name, {to.dim(0), to.dim(1)});
  if (!w.ok()) return w.status();
  return CopyWeight(ctx, source, *w, to);
}

absl::Status LoadLinear(const LayerContext& ctx, const WeightSource& source,
                        const std::string& name, const LinearShape& shape, int part,
                        FrozenMatrix* matrix) {
  absl::StatusOr<TensorView> w = Get(ctx, source, name, {shape.out, shape.in});
  if (!w.ok()) return w.status();
  ArenaScope scope(ctx.arena);
  const absl::StatusOr<TensorView> on_device = ToDevice(ctx, source, *w);
  if (!on_device.ok()) return on_device.status();
  matrix->Load(ctx, part, *on_device);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Nf4Weight> WeightSource::FindNf4(const std::string& name, const LinearShape& shape,
                                                bool double_quantization) const {
  return absl::NotFoundError(absl::StrCat("there is no NF4 weight ", name));
}

TensorView& Model::NormOf(TransformerBlock* block, BlockNorm norm) {
  switch (norm) {
    case BlockNorm::kAttention:
      return block->attention_norm;
    case BlockNorm::kMlp:
      return block->mlp_norm;
    case BlockNorm::kPostAttention:
      return block->post_attention_norm;
    case BlockNorm::kPostMlp:
      return block->post_mlp_norm;
    case BlockNorm::kQ:
      return block->q_norm;
    case BlockNorm::kK:
      return block->k_norm;
  }
  return block->attention_norm;
}

absl::Status Model::Load(const LayerContext& ctx, const WeightNames& names,
                         const WeightSource& source, const std::function<void()>& progress) {
  absl::Status status = LoadTables(ctx, names, source);
  if (!status.ok()) return status;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (status = LoadBlock(ctx, names, source, layer); !status.ok()) return status;
    progress();
  }
  if (status = LoadDense(ctx, source, names.final_norm, head_.norm); !status.ok()) return status;
  for (size_t i = 0; i < ropes_.size(); ++i) {
    for (const bool is_long : {false, true}) {
      const TensorView to =
          is_long ? ropes_[i].long_inverse_frequencies : ropes_[i].inverse_frequencies;
      if (!to.defined()) continue;
      const std::vector<float> frequencies =
          config_.ropes[i].InverseFrequencies(config_.head_dim, is_long);
      CopyToDevice(ctx.exec, frequencies.data(), to);
    }
  }
  return absl::OkStatus();
}

// A table that is trained goes into the master weights.
absl::Status Model::LoadTables(const LayerContext& ctx, const WeightNames& names,
                               const WeightSource& source) {
  LayerContext embedding_ctx = ctx;
  if (embedding_on_host_) embedding_ctx.exec.device = DeviceKind::kCpu;
  const ModuleEntry* const embedding = TrainedTable(&ModuleEntry::is_embedding);
  const ModuleEntry* const head = TrainedTable(&ModuleEntry::is_head);
  const auto place = [&](const ModuleEntry* entry, const TensorView& frozen) {
    return entry != nullptr ? adapters_->Module(*entry, adapters_->master()) : frozen;
  };
  const std::string& head_name = config_.tied_embeddings ? names.embedding : names.head;
  absl::Status status =
      LoadDense(embedding_ctx, source, names.embedding, place(embedding, embedding_));
  const bool one_table = config_.tied_embeddings && head == embedding;
  if (status.ok() && !one_table) {
    status = LoadDense(ctx, source, head_name, place(head, head_.weight));
  }
  if (status.ok() && (embedding != nullptr || head != nullptr)) adapters_->RefreshCompute(ctx);
  return status;
}

absl::Status Model::LoadBlock(const LayerContext& ctx, const WeightNames& names,
                              const WeightSource& source, int64_t layer) {
  TransformerBlock& block = blocks_[layer];
  for (BlockNorm norm : NormsOf(config_)) {
    absl::Status status = LoadDense(ctx, source, names.norm(layer, norm), NormOf(&block, norm));
    if (!status.ok()) return status;
  }
  BlockWeights& weights = weights_[layer];
  FrozenMatrix* const matrices[] = {&weights.qkv, &weights.o, &weights.gate_up, &weights.down};
  const auto linears = block.linears();
  for (int i = 0; i < 4; ++i) {
    ArenaScope scope(ctx.arena);
    matrices[i]->BeginLoad(ctx);
    for (Linear linear : LinearsOf(config_)) {
      if (PlaceOf(linear).matrix != i) continue;
      absl::Status status =
          LoadPart(ctx, names, source, {layer, linear}, matrices[i], linears[i]->bias);
      if (!status.ok()) return status;
    }
    matrices[i]->EndLoad(ctx);
  }
  for (const LoraLinear* linear : linears) linear->ResetMagnitudes(ctx);
  return absl::OkStatus();
}

absl::Status Model::LoadPart(const LayerContext& ctx, const WeightNames& names,
                             const WeightSource& source, const PartName& part_name,
                             FrozenMatrix* matrix, const TensorView& bias) const {
  const auto [layer, linear] = part_name;
  const LinearShape shape = ShapeOf(config_, linear);
  const int part = PlaceOf(linear).part;
  const std::string module = names.linear(layer, linear);
  const std::string name = absl::StrCat(module, ".weight");
  if (config_.IsNf4(layer, linear)) {
    absl::StatusOr<Nf4Weight> w = source.FindNf4(name, shape, config_.nf4->double_quantization);
    if (!w.ok()) return w.status();
    absl::Status status = matrix->Load(ctx, source, part, *w);
    if (!status.ok()) return status;
  } else {
    absl::Status status = LoadLinear(ctx, source, name, shape, part, matrix);
    if (!status.ok()) return status;
  }
  if (!HasBias(config_, linear)) return absl::OkStatus();
  const int64_t begin = matrix->row_begin(part);
  return LoadDense(ctx, source, absl::StrCat(module, ".bias"),
                   bias.Slice(0, begin, begin + shape.out));
}

}  // namespace attune
