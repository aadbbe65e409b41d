#include "worker/model/model.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/embedding/embedding.h"

namespace attune {
namespace {

// Where a Linear sits: which fused matrix of the block, which part of it.
struct Place {
  int matrix;  // 0 qkv, 1 o, 2 gate_up, 3 down
  int part;
};

Place PlaceOf(Linear linear) {
  switch (linear) {
    case Linear::kQ:
      return {0, 0};
    case Linear::kK:
      return {0, 1};
    case Linear::kV:
      return {0, 2};
    case Linear::kO:
      return {1, 0};
    case Linear::kGate:
      return {2, 0};
    case Linear::kUp:
      return {2, 1};
    case Linear::kDown:
      return {3, 0};
  }
  return {};
}

std::string ShapeText(const TensorView& view) {
  std::vector<int64_t> shape(view.shape, view.shape + view.rank);
  return absl::StrCat("(", absl::StrJoin(shape, ", "), ")");
}

// All values finite, for the floating dtypes of checkpoints: an exponent of all ones is not.
bool AllFinite(const TensorView& w) {
  const int64_t n = w.size();
  const auto any = [&]<typename Word>(Word exponent) {
    const Word* words = static_cast<const Word*>(w.data);
    bool bad = false;
    for (int64_t i = 0; i < n; ++i) bad |= (words[i] & exponent) == exponent;
    return bad;
  };
  switch (w.dtype) {
    case DType::kF64:
      return !any(uint64_t{0x7ff0000000000000});
    case DType::kF32:
      return !any(uint32_t{0x7f800000});
    case DType::kBF16:
      return !any(uint16_t{0x7f80});
    case DType::kF16:
      return !any(uint16_t{0x7c00});
    default:
      return true;
  }
}

// The weight `name` with the expected shape, finite, floating.
absl::StatusOr<TensorView> Get(const LayerContext& ctx, const WeightSource& source,
                               const std::string& name, std::initializer_list<int64_t> shape) {
  absl::StatusOr<TensorView> w = source.Find(name);
  if (!w.ok()) return w.status();
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
  if (!ctx.exec.plan && !AllFinite(*w)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " holds NaN or infinity: the checkpoint is damaged"));
  }
  return w;
}

absl::Status LoadDense(const LayerContext& ctx, const WeightSource& source, const std::string& name,
                       const TensorView& to) {
  absl::StatusOr<TensorView> w = to.rank == 1 ? Get(ctx, source, name, {to.dim(0)})
                                              : Get(ctx, source, name, {to.dim(0), to.dim(1)});
  if (!w.ok()) return w.status();
  Copy(ctx.exec, {.x = *w, .y = to});
  return absl::OkStatus();
}

}  // namespace

Model::Model(const LayerContext& ctx, const ModelConfig& config, WeightStorage storage,
             const AdapterSet* adapters)
    : config_(config) {
  const auto dense = [&](std::initializer_list<int64_t> shape) {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, ctx.dtype, shape);
  };
  const int64_t C = config.hidden_size;
  embedding_ = dense({config.vocab_size, C});
  weights_.reserve(config.num_layers);
  blocks_.resize(config.num_layers);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    TransformerBlock& block = blocks_[i];
    block.shape = {.hidden = C,
                   .heads = config.num_heads,
                   .kv_heads = config.num_kv_heads,
                   .head_dim = config.head_dim,
                   .intermediate = config.intermediate_size,
                   .rms_norm_eps = config.rms_norm_eps};
    block.attention_norm = dense({C});
    block.mlp_norm = dense({C});
    const int64_t q = config.q_size(), kv = config.kv_size(), F = config.intermediate_size;
    weights_.push_back({FrozenMatrix(ctx, storage, {q, kv, kv}, C),
                        FrozenMatrix(ctx, storage, {C}, q), FrozenMatrix(ctx, storage, {F, F}, C),
                        FrozenMatrix(ctx, storage, {C}, F)});
    BlockWeights& w = weights_.back();
    block.qkv.w = &w.qkv;
    block.o.w = &w.o;
    block.gate_up.w = &w.gate_up;
    block.down.w = &w.down;
  }
  head_ = {.norm = dense({C}),
           .weight = config.tied_embeddings ? embedding_ : dense({config.vocab_size, C}),
           .rms_norm_eps = config.rms_norm_eps};
  inverse_frequencies_ =
      ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, DType::kF32, {config.head_dim / 2});
  if (adapters != nullptr) Adapt(*adapters);
}

void Model::Adapt(const AdapterSet& adapters) {
  const AdapterLayout& layout = adapters.layout();
  for (const AdapterEntry& entry : layout.entries) {
    TransformerBlock& block = blocks_[entry.layer];
    const Place place = PlaceOf(entry.linear);
    LoraLinear* const matrices[] = {&block.qkv, &block.o, &block.gate_up, &block.down};
    LoraLinear* linear = matrices[place.matrix];
    linear->r = layout.r;
    linear->scale = layout.scale();
    LoraPart part = {.part = place.part,
                     .layer = static_cast<uint32_t>(entry.layer),
                     .module = static_cast<uint32_t>(entry.linear),
                     .a = adapters.A(entry, adapters.compute()),
                     .b = adapters.B(entry, adapters.compute())};
    if (adapters.grad_with_tail().defined()) {
      part.da = adapters.A(entry, adapters.grad());
      part.db = adapters.B(entry, adapters.grad());
    }
    linear->adapters.push_back(part);
  }
}

absl::Status Model::Load(const LayerContext& ctx, const WeightNames& names,
                         const WeightSource& source, const std::function<void()>& progress) {
  absl::Status status = LoadDense(ctx, source, names.embedding, embedding_);
  if (!status.ok()) return status;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (status = LoadBlock(ctx, names, source, layer); !status.ok()) return status;
    progress();
  }
  if (status = LoadDense(ctx, source, names.final_norm, head_.norm); !status.ok()) return status;
  if (!config_.tied_embeddings) {
    if (status = LoadDense(ctx, source, names.head, head_.weight); !status.ok()) return status;
  }
  const std::vector<float> frequencies = config_.rope.InverseFrequencies(config_.head_dim);
  CopyToDevice(ctx.exec, frequencies.data(), inverse_frequencies_);
  return absl::OkStatus();
}

absl::Status Model::LoadBlock(const LayerContext& ctx, const WeightNames& names,
                              const WeightSource& source, int64_t layer) {
  const TransformerBlock& block = blocks_[layer];
  absl::Status status = LoadDense(ctx, source, names.attention_norm(layer), block.attention_norm);
  if (!status.ok()) return status;
  status = LoadDense(ctx, source, names.mlp_norm(layer), block.mlp_norm);
  if (!status.ok()) return status;
  for (int i = 0; i < kLinears; ++i) {
    const Linear linear = static_cast<Linear>(i);
    const LinearShape shape = ShapeOf(config_, linear);
    const std::string name = absl::StrCat(names.linear(layer, linear), ".weight");
    absl::StatusOr<TensorView> w = Get(ctx, source, name, {shape.out, shape.in});
    if (!w.ok()) return w.status();
    BlockWeights& weights = weights_[layer];
    FrozenMatrix* const matrices[] = {&weights.qkv, &weights.o, &weights.gate_up, &weights.down};
    const Place place = PlaceOf(linear);
    matrices[place.matrix]->Load(ctx, place.part, *w);
  }
  return absl::OkStatus();
}

Hidden Model::Forward(const LayerContext& ctx, const PackBatch& batch, SavedModel* saved) const {
  const int64_t T = batch.tokens, C = config_.hidden_size;
  TensorView x = ctx.Saved(ctx.dtype, {T, C});
  const TensorView delta = ctx.Saved(ctx.dtype, {T, C});
  EmbeddingForward(ctx.exec, {.ids = batch.ids, .table = embedding_, .y = x});
  saved->blocks.resize(blocks_.size());
  for (size_t i = 0; i < blocks_.size(); ++i) {
    x = blocks_[i].Forward(ctx, batch, x, i == 0 ? TensorView() : delta, delta, &saved->blocks[i]);
  }
  return {x, delta};
}

Hidden Model::Infer(const LayerContext& ctx, const PackBatch& batch,
                    const std::vector<KvCache>* caches, int64_t cache_begin) const {
  const int64_t T = batch.tokens, C = config_.hidden_size;
  const TensorView x = ctx.Saved(ctx.dtype, {T, C});
  const TensorView delta = ctx.Saved(ctx.dtype, {T, C});
  EmbeddingForward(ctx.exec, {.ids = batch.ids, .table = embedding_, .y = x});
  for (size_t i = 0; i < blocks_.size(); ++i) {
    ArenaScope scope(ctx.arena, ArenaEnd::kBottom);
    SavedBlock saved;
    const TensorView x2 =
        blocks_[i].Forward(ctx, batch, x, i == 0 ? TensorView() : delta, delta, &saved,
                           caches == nullptr ? nullptr : &(*caches)[i], cache_begin);
    Copy(ctx.exec, {.x = x2, .y = x});
  }
  return {x, delta};
}

void Model::Backward(const LayerContext& ctx, const PackBatch& batch, const SavedModel& saved,
                     const TensorView& dx) const {
  for (int64_t i = static_cast<int64_t>(blocks_.size()) - 1; i >= 0; --i) {
    blocks_[i].Backward(ctx, batch, saved.blocks[i], dx, {.want_dx = i > 0});
  }
}

}  // namespace attune
