#include "worker/model/model.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/elementwise/elementwise.h"
#include "kernels/embedding/embedding.h"
#include "kernels/fp8/fp8.h"

namespace attune {
namespace {

// Bytes of the stream of a block that are saved, or else of the rest.
int64_t BytesOf(const TransformerBlock& block, const LayerContext& ctx, int64_t tokens,
                StreamSaved stream_saved, bool saved) {
  int64_t bytes = 0;
  for (SavedGroup group : kStreamGroups) {
    if (IsSaved(stream_saved, group) == saved) bytes += block.SavedBytes(ctx, tokens, group);
  }
  return bytes;
}

// In memory that all layers share, x2 has the same place for each: the next block reads it while
// its own statistics are written. So what may differ (the adapters' shares) is behind it.
constexpr SavedGroup kBackToFront[] = {SavedGroup::kProjections, SavedGroup::kAttention,
                                       SavedGroup::kInput};

// The places of a group in `memory`, from *end on, which moves behind it.
void PlaceGroup(const TransformerBlock& block, const LayerContext& ctx, int64_t tokens,
                SavedGroup group, const TensorView& memory, int64_t* end, SavedBlock* saved) {
  const int64_t begin = *end;
  *end += block.SavedBytes(ctx, tokens, group);
  block.PlaceSaved(ctx, tokens, group, memory.Slice(0, begin, *end), saved);
}

// ---- Keys of what is replayed: all that a pass reads on the host and that may change ----

int64_t AddressOf(const TensorView& view) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data));
}
// Where the arena's bottom stack ends.
TensorView Bottom(const LayerContext& ctx) {
  return ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, 0);
}

void AddView(const TensorView& view, StreamGraph::Key* key) {
  key->push_back(AddressOf(view));
  key->insert(key->end(), view.shape, view.shape + TensorView::kMaxRank);
  key->insert(key->end(), view.strides, view.strides + TensorView::kMaxRank);
}

StreamGraph::Key KeyOf(const LayerContext& ctx) {
  StreamGraph::Key key = {
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(ctx.exec.stream)),
      ctx.exec.deterministic,
      ctx.fused_lora,
      std::bit_cast<int64_t>(ctx.dropout.p),
      static_cast<int64_t>(ctx.dropout.seed),
      ctx.dropout.first_row,
      std::bit_cast<int64_t>(ctx.neftune_noise_alpha),
  };
  AddView(ctx.dropout.step_pack, &key);
  AddView(Bottom(ctx), &key);
  AddView(ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace, 0), &key);
  return key;
}

// Not of labels: the head is not replayed.
StreamGraph::Key KeyOf(const LayerContext& ctx, const PackBatch& batch) {
  StreamGraph::Key key = KeyOf(ctx);
  const AttentionSegments& s = batch.segments;
  key.push_back(batch.tokens);
  key.push_back(s.whole);
  for (const TensorView* view : {&batch.ids, &batch.positions, &s.num_segments, &s.q_begin,
                                 &s.k_begin, &s.k_length, &s.q_offset}) {
    AddView(*view, &key);
  }
  for (const RotaryTable& table : batch.rotary) {
    AddView(table.cos, &key);
    AddView(table.sin, &key);
  }
  return key;
}

}  // namespace

Model::Model(const LayerContext& ctx, const ModelConfig& config, const ModelOptions& options,
             AdapterSet* adapters)
    : config_(config),
      embedding_on_host_(false),
      policy_(options.activations),
      adapters_(adapters),
      can_replay_(!options.prefetch && options.shards == 1 && !options.activations.travels()),
      replay_(can_replay_) {
  const auto dense = [&](std::initializer_list<int64_t> shape) {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, ctx.dtype, shape);
  };
  const int64_t C = config.hidden_size;
  weights_.reserve(config.num_layers);
  blocks_.resize(config.num_layers);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    TransformerBlock& block = blocks_[i];
    block.shape = ShapeOfBlock(i);
    block.mlp_tile = options.activations.mlp_tile;
    block.heads_saved = options.activations.heads_saved;
    for (BlockNorm norm : NormsOf(config)) NormOf(&block, norm) = dense({SizeOf(config, norm)});
    if (adapters != nullptr) Adapt(ctx, *adapters, i);
    const auto frozen = [&](const LoraLinear& linear, int matrix) {
      std::vector<FrozenPart> parts;
      int64_t in = 0;
      for (Linear part : LinearsOf(config)) {
        if (PlaceOf(part).matrix != matrix) continue;
        parts.push_back({.rows = ShapeOf(config, part).out,
                         .dense = config.nf4.has_value() && !config.IsNf4(i, part)});
        in = ShapeOf(config, part).in;
      }
      FrozenMatrixOptions matrix_options{.storage = options.storage,
                                         .resident = options.resident,
                                         .extension = ctx.fused_lora ? linear.extension() : 0,
                                         .fp8 = options.fp8,
                                         .shards = options.shards,
                                         .shard = options.shard};
      if (options.fp8) matrix_options.extension = Fp8Extension(linear.columns());
      return FrozenMatrix(ctx, matrix_options, parts, in);
    };
    weights_.push_back({frozen(block.qkv, 0), frozen(block.o, 1), frozen(block.gate_up, 2),
                        frozen(block.down, 3)});
    BlockWeights& w = weights_.back();
    block.qkv.w = &w.qkv;
    block.o.w = &w.o;
    block.gate_up.w = &w.gate_up;
    block.down.w = &w.down;
    if (config.qkv_bias) block.qkv.bias = dense({w.qkv.rows()});
    if (config.o_bias) block.o.bias = dense({C});
    if (config.mlp_bias) {
      block.gate_up.bias = dense({w.gate_up.rows()});
      block.down.bias = dense({C});
    }
    block.o.output_scale = block.down.output_scale = config.residual_scale;
    for (LoraLinear* linear : block.linears()) {
      if (!options.fp8 || linear->adapters.empty()) continue;
      linear->room = ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kAdapter, DType::kF32, {2});
    }
    if (!options.prefetch) continue;
    for (const FrozenMatrix* matrix : {&w.qkv, &w.o, &w.gate_up, &w.down}) {
      if (matrix->expanded()) continue;
      gather_bytes_ = std::max(gather_bytes_, matrix->GatherBytes());
      for (Direction direction : {Direction::kForward, Direction::kBackward}) {
        prefetch_bytes_ =
            std::max(prefetch_bytes_, AlignedBytes(matrix->ExpansionShape(ctx, direction)));
      }
    }
  }
  head_ = {.norm = dense({C}),
           .rms_norm_eps = config.rms_norm_eps,
           .norm_weight_offset = config.norm_weight_offset,
           .logit_scale = config.logit_scale,
           .logit_softcap = config.logit_softcap,
           .logits_bytes = options.logits_bytes};
  MakeTables(ctx, options);
  MakeRopes(ctx);
}

const ModuleEntry* Model::TrainedTable(bool ModuleEntry::*which) const {
  if (adapters_ == nullptr) return nullptr;
  for (const ModuleEntry& entry : adapters_->layout().modules) {
    if (entry.*which) return &entry;
  }
  return nullptr;
}

void Model::MakeTables(const LayerContext& ctx, const ModelOptions& options) {
  const int64_t V = config_.vocab_size, C = config_.hidden_size;
  const auto frozen = [&] {
    return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, ctx.dtype, {V, C});
  };
  const bool train = adapters_ != nullptr && adapters_->grad_with_tail().defined();
  const ModuleEntry* const embedding = TrainedTable(&ModuleEntry::is_embedding);
  const ModuleEntry* const head = TrainedTable(&ModuleEntry::is_head);
  const bool tied = config_.tied_embeddings;
  embedding_on_host_ = options.embedding_on_host && !tied && embedding == nullptr;
  if (tied && (embedding == nullptr || head == nullptr)) tied_table_ = frozen();
  const auto place = [&](const ModuleEntry* entry, TensorView* table, TensorView* gradient) {
    if (entry != nullptr) {
      *table = adapters_->Module(*entry, adapters_->compute());
      if (train) *gradient = adapters_->Module(*entry, adapters_->grad());
    } else {
      *table = tied ? tied_table_ : frozen();
    }
  };
  if (embedding_on_host_) {
    embedding_ = TensorView(nullptr, ctx.dtype, {V, C});
  } else {
    place(embedding, &embedding_, &dembedding_);
  }
  place(head, &head_.weight, &head_.dweight);
}

BlockShape Model::ShapeOfBlock(int64_t layer) const {
  const ModelConfig& c = config_;
  const LayerConfig of_layer = c.layer(layer);
  const double default_scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  const bool turns = of_layer.rope != LayerConfig::kNoRope;
  const int64_t rotary_dim = turns ? c.ropes[of_layer.rope].RotaryDim(c.head_dim) : 0;
  return {.hidden = c.hidden_size,
          .heads = c.num_heads,
          .kv_heads = c.num_kv_heads,
          .head_dim = c.head_dim,
          .intermediate = c.intermediate_size,
          .rms_norm_eps = c.rms_norm_eps,
          .norm_weight_offset = c.norm_weight_offset,
          .activation = c.activation,
          .attention = {.window = of_layer.window,
                        .scale = c.attention_scale > 0 ? c.attention_scale : default_scale,
                        .softcap = c.attention_softcap},
          .rope = turns ? of_layer.rope : 0,
          .rotary_dim = rotary_dim,
          .qk_norm = c.qk_norm,
          .post_norms = c.post_norms};
}

void Model::MakeRopes(const LayerContext& ctx) {
  CHECK(!config_.ropes.empty() && config_.ropes.size() <= kMaxRopes);
  for (const RopeConfig& rope : config_.ropes) {
    const auto room = [&] {
      return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, DType::kF32,
                            {rope.RotaryDim(config_.head_dim) / 2});
    };
    RotaryEmbedding out{.inverse_frequencies = room(), .attention_factor = rope.attention_factor};
    if (rope.scaling == RopeScaling::kLongRope) {
      out.long_inverse_frequencies = room();
      out.long_after = rope.original_max_position;
    }
    ropes_.push_back(out);
  }
}

// Gives the linears of a block their adapters.
void Model::Adapt(const LayerContext& ctx, const AdapterSet& adapters, int64_t layer) {
  const AdapterLayout& layout = adapters.layout();
  const bool train = adapters.grad_with_tail().defined();
  TransformerBlock& block = blocks_[layer];
  for (const AdapterEntry& entry : layout.entries) {
    if (entry.layer != layer) continue;
    const LinearPlace place = PlaceOf(entry.linear);
    LoraLinear* linear = block.linears()[place.matrix];
    linear->r = layout.r;
    linear->scale = layout.scale();
    LoraPart part = {.part = place.part,
                     .layer = static_cast<uint32_t>(entry.layer),
                     .module = static_cast<uint32_t>(entry.linear),
                     .a = adapters.A(entry, adapters.compute()),
                     .b = adapters.B(entry, adapters.compute())};
    if (layout.use_dora) {
      const auto derived = [&] {
        return ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kAdapter, ctx.accumulator(),
                              {entry.shape.out});
      };
      part.magnitude = adapters.Magnitude(entry, adapters.master());
      if (train) part.dmagnitude = adapters.Magnitude(entry, adapters.grad());
      part.norm = derived();
      part.factor = derived();
    }
    // Of the linear's parts, which lie one behind the other: from the first to this one.
    const auto all = [&](const TensorView& flat) {
      const int64_t before = linear->columns(), rows = before + layout.r, K = entry.shape.in;
      const int64_t begin = entry.a_offset - before * K;
      return flat.Slice(0, begin, begin + rows * K).Reshape({rows, K});
    };
    linear->a = all(adapters.compute());
    if (train) {
      part.da = adapters.A(entry, adapters.grad());
      part.db = adapters.B(entry, adapters.grad());
      linear->da = all(adapters.grad());
    }
    linear->adapters.push_back(part);
  }
}

absl::Status Model::TakeHostMemory(const LayerContext& ctx, int64_t tokens) {
  if (embedding_on_host_ && !ctx.exec.plan) {
    absl::Status status = host_embedding_.Allocate(ctx.exec.device, embedding_.bytes());
    if (!status.ok()) return status;
    embedding_.data = host_embedding_.data();
  }
  const Pieces pieces = TravellingPieces(ctx, tokens);
  Exec copies = ctx.exec;
  if (!copies.plan) copies.stream = NewStream(copies.device);
  absl::Status status = streams_.Prepare(copies, pieces.streams, config_.num_layers);
  if (!status.ok()) return status;
  return gate_ups_.Prepare(copies, pieces.gate_ups, config_.num_layers);
}

int64_t Model::HostBytes(const LayerContext& ctx, int64_t tokens) const {
  const Pieces pieces = TravellingPieces(ctx, tokens);
  return (embedding_on_host_ ? embedding_.bytes() : 0) +
         TravellingBuffers::HostBytes(pieces.streams) +
         TravellingBuffers::HostBytes(pieces.gate_ups);
}

Model::Pieces Model::TravellingPieces(const LayerContext& ctx, int64_t tokens) const {
  Pieces pieces;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const LayerPlaces places = PlacesOf(i);
    if (places.stream_travels) {
      pieces.streams.push_back(BytesOf(blocks_[i], ctx, tokens, places.stream_saved, true));
    }
    if (places.gate_up_place == GateUpPlace::kHost) {
      pieces.gate_ups.push_back(blocks_[i].SavedBytes(ctx, tokens, SavedGroup::kGateUp));
    }
  }
  return pieces;
}

int64_t Model::RebuiltBytes(const LayerContext& ctx, int64_t tokens) const {
  int64_t most = 0;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    most = std::max(most, BytesOf(blocks_[i], ctx, tokens, PlacesOf(i).stream_saved, false));
  }
  return most;
}

int64_t Model::StreamBytes(const LayerContext& ctx, int64_t tokens, StreamSaved saved) const {
  int64_t most = 0;
  for (const TransformerBlock& block : blocks_) {
    most = std::max(most, BytesOf(block, ctx, tokens, saved, true));
  }
  return most;
}

int64_t Model::GateUpBytes(const LayerContext& ctx, int64_t tokens) const {
  int64_t most = 0;
  for (const TransformerBlock& block : blocks_) {
    most = std::max(most, block.SavedBytes(ctx, tokens, SavedGroup::kGateUp));
  }
  return most;
}

// All at once: of one, it would be a short operation for a GPU.
void Model::MakeRooms(const LayerContext& ctx) const {
  std::vector<std::array<LoraExtendPart, kMaxLoraParts>> parts;
  std::vector<Fp8AdapterRoomArgs> all;
  parts.reserve(4 * blocks_.size());  // spans of it stay
  for (const TransformerBlock& block : blocks_) {
    for (const LoraLinear* linear : block.linears()) {
      if (!linear->room.defined()) continue;
      parts.push_back(linear->ExtendParts());
      all.push_back({.parts = {parts.back().data(), linear->adapters.size()},
                     .scale = linear->w->scale(),
                     .factor = linear->scale,
                     .room = linear->room});
    }
  }
  Fp8AdapterRoom(ctx.exec, all);
}

void Model::ExtendAll(const LayerContext& ctx) const {
  std::vector<std::array<LoraExtendPart, kMaxLoraParts>> parts;
  std::vector<LoraExtendArgs> all;
  parts.reserve(4 * blocks_.size());  // spans of it stay
  for (const TransformerBlock& block : blocks_) {
    for (const LoraLinear* linear : block.linears()) {
      if (!linear->Extends(ctx)) continue;
      parts.push_back(linear->ExtendParts());
      all.push_back({.parts = {parts.back().data(), linear->adapters.size()},
                     .w = linear->w->Expand(ctx, Direction::kForward),
                     .scale = linear->scale});
    }
  }
  LoraExtendAll(ctx.exec, {.all = all});
}

void Model::RefreshLinears(const LayerContext& ctx) const {
  if (adapters_ == nullptr || adapters_->version() == refreshed_version_) return;
  const auto enqueue = [&] {
    MakeRooms(ctx);
    ExtendAll(ctx);
    for (const TransformerBlock& block : blocks_) {
      for (const LoraLinear* linear : block.linears()) linear->Refresh(ctx);
    }
  };
  if (replay_) {
    refresh_.Run(ctx.exec, KeyOf(ctx), enqueue);
  } else {
    enqueue();
  }
  refreshed_version_ = adapters_->version();
}

LayerContext Model::BeginPass(const LayerContext& ctx) const {
  LayerContext pass = ctx;
  if (prefetch_bytes_ > 0) {
    prefetcher_.BeginPass(ctx, prefetch_bytes_, gather_bytes_);
    pass.prefetcher = &prefetcher_;
  }
  return pass;
}

// Room for what block `layer` saves, in the order of the layers, and for what is rebuilt.
void Model::PlaceSaved(const LayerContext& ctx, int64_t layer, int64_t tokens,
                       const TensorView& rebuilt, SavedBlock* saved) const {
  const TransformerBlock& block = blocks_[layer];
  const LayerPlaces places = PlacesOf(layer);
  const auto keep = [&](int64_t bytes) {
    return ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, bytes);
  };
  const TensorView stream = places.stream_travels
                                ? streams_.BeginWrite(ctx.exec, places.stream)
                                : keep(BytesOf(block, ctx, tokens, places.stream_saved, true));
  int64_t saved_end = 0, rebuilt_end = 0;
  for (SavedGroup group : kStreamGroups) {
    if (!IsSaved(places.stream_saved, group)) continue;
    PlaceGroup(block, ctx, tokens, group, stream, &saved_end, saved);
  }
  for (SavedGroup group : kBackToFront) {
    if (IsSaved(places.stream_saved, group)) continue;
    PlaceGroup(block, ctx, tokens, group, rebuilt, &rebuilt_end, saved);
  }
  if (places.gate_up_place == GateUpPlace::kRebuilt) return;
  block.PlaceSaved(ctx, tokens, SavedGroup::kGateUp,
                   places.gate_up_place == GateUpPlace::kHost
                       ? gate_ups_.BeginWrite(ctx.exec, places.gate_up)
                       : keep(block.SavedBytes(ctx, tokens, SavedGroup::kGateUp)),
                   saved);
}

// In bf16 the factor is one too, as in Transformers, where Gemma was trained.
double Model::EmbeddingScale(const LayerContext& ctx) const {
  const double scale = config_.embedding_scale;
  return ctx.dtype == DType::kBF16 ? static_cast<float>(BFloat16(static_cast<float>(scale)))
                                   : scale;
}

void Model::Embed(const LayerContext& ctx, const PackBatch& batch, const TensorView& x) const {
  EmbeddingForward(ctx.exec,
                   {.ids = batch.ids, .table = embedding_, .y = x, .scale = EmbeddingScale(ctx)});
}

Model::ReplayedPass* Model::PassOf(const StreamGraph::Key& key) const {
  constexpr size_t kMost = 4;
  auto found = std::find_if(passes_.begin(), passes_.end(),
                            [&](const ReplayedPass& pass) { return pass.forward.key() == key; });
  if (found != passes_.end()) {
    passes_.splice(passes_.begin(), passes_, found);
  } else if (passes_.size() < kMost) {
    passes_.emplace_front();
  } else {
    passes_.splice(passes_.begin(), passes_, std::prev(passes_.end()));
  }
  return &passes_.front();
}

Hidden Model::Forward(const LayerContext& ctx, const PackBatch& batch, SavedModel* saved) const {
  RefreshLinears(ctx);
  pass_ = nullptr;
  if (!replay_) return EnqueueForward(ctx, batch, saved);
  const StreamGraph::Key key = KeyOf(ctx, batch);
  pass_ = PassOf(key);
  const TensorView begin = Bottom(ctx);
  if (pass_->forward.Run(ctx.exec, key,
                         [&] { pass_->hidden = EnqueueForward(ctx, batch, &pass_->saved); })) {
    pass_->kept_bytes = AddressOf(Bottom(ctx)) - AddressOf(begin);
  } else {
    ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, pass_->kept_bytes);
  }
  *saved = pass_->saved;
  return pass_->hidden;
}

Hidden Model::EnqueueForward(const LayerContext& outer, const PackBatch& batch,
                             SavedModel* saved) const {
  const int64_t T = batch.tokens, C = config_.hidden_size;
  const LayerContext ctx = BeginPass(outer);
  streams_.BeginPass(ctx.arena);
  gate_ups_.BeginPass(ctx.arena);
  const TensorView delta_and_room =
      ctx.Saved(ctx.dtype, {T, AlignedColumns(ctx.dtype, dx_columns())});
  const TensorView delta = Columns(delta_and_room, 0, C);
  const TensorView rebuilt =
      ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, RebuiltBytes(ctx, T));
  saved->blocks.assign(blocks_.size(), {});
  TensorView x;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    SavedBlock* block = &saved->blocks[i];
    PlaceSaved(ctx, i, T, rebuilt, block);
    if (i == 0) {
      x = block->x1;
      Embed(ctx, batch, x);
      if (ctx.neftune_noise_alpha > 0) {
        EmbeddingNoise(ctx.exec, {.x = x,
                                  .num_segments = batch.segments.num_segments,
                                  .q_begin = batch.segments.q_begin,
                                  .step_pack = ctx.dropout.step_pack,
                                  .alpha = ctx.neftune_noise_alpha,
                                  .seed = ctx.dropout.seed});
      }
    }
    x = blocks_[i].Forward(ctx, batch, x, i == 0 ? TensorView() : delta, delta, block);
    const LayerPlaces places = PlacesOf(i);
    if (places.stream_travels) streams_.EndWrite(ctx.exec, places.stream);
    if (places.gate_up_place == GateUpPlace::kHost) gate_ups_.EndWrite(ctx.exec, places.gate_up);
    streams_.SendShare();
    gate_ups_.SendShare();
  }
  return {x, delta, delta_and_room};
}

Hidden Model::Infer(const LayerContext& outer, const PackBatch& batch,
                    const std::vector<KvCache>* caches, int64_t cache_begin) const {
  const int64_t T = batch.tokens, C = config_.hidden_size;
  RefreshLinears(outer);
  const LayerContext ctx = BeginPass(outer);
  const TensorView delta = ctx.Saved(ctx.dtype, {T, C});
  // Every block has the same memory.
  const TensorView memory = ctx.arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations,
                                                StreamBytes(ctx, T, StreamSaved::kAll));
  TensorView x;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    SavedBlock saved;
    int64_t end = 0;
    for (SavedGroup group : kBackToFront) {
      PlaceGroup(blocks_[i], ctx, T, group, memory, &end, &saved);
    }
    if (i == 0) {
      x = saved.x1;
      Embed(ctx, batch, x);
    }
    x = blocks_[i].Forward(ctx, batch, x, i == 0 ? TensorView() : delta, delta, &saved,
                           caches == nullptr ? nullptr : &(*caches)[i], cache_begin);
  }
  return {.x = x, .delta = delta};
}

int64_t Model::dx_columns() const {
  int64_t room = 0;
  for (const TransformerBlock& block : blocks_) room = std::max(room, block.dx_extension());
  return config_.hidden_size + room;
}

void Model::Backward(const LayerContext& ctx, const PackBatch& batch, const SavedModel& saved,
                     const TensorView& dx) const {
  if (pass_ == nullptr) return EnqueueBackward(ctx, batch, saved, dx);
  StreamGraph::Key key = KeyOf(ctx, batch);
  AddView(dx, &key);
  // The last block's views stand for all: they are those of Forward, at its key.
  AddView(saved.blocks.back().x2, &key);
  const bool ran =
      pass_->backward.Run(ctx.exec, key, [&] { EnqueueBackward(ctx, batch, saved, dx); });
  if (!ran) ++passes_replayed_;
}

void Model::EnqueueBackward(const LayerContext& outer, const PackBatch& batch,
                            const SavedModel& saved, const TensorView& dx) const {
  LayerContext ctx = outer;  // of the pass that Forward began
  if (prefetch_bytes_ > 0) ctx.prefetcher = &prefetcher_;
  for (int64_t i = config_.num_layers - 1; i >= 0; --i) {
    const LayerPlaces places = PlacesOf(i);
    // The slots are those of the forward pass, so the views still hold.
    if (places.stream_travels) streams_.BeginRead(ctx.exec, places.stream);
    // What the last layer did not save is still there.
    if (i + 1 < config_.num_layers) {
      blocks_[i].Rebuild(ctx, batch, places.stream_saved, saved.blocks[i]);
    }
    if (places.gate_up_place == GateUpPlace::kHost) gate_ups_.BeginRead(ctx.exec, places.gate_up);
    const bool want_dx = i > 0 || dembedding_.defined();
    blocks_[i].Backward(ctx, batch, saved.blocks[i], dx, {.want_dx = want_dx});
    if (places.stream_travels) streams_.EndRead(ctx.exec, places.stream);
    if (places.gate_up_place == GateUpPlace::kHost) gate_ups_.EndRead(ctx.exec, places.gate_up);
  }
  if (!dembedding_.defined()) return;
  EmbeddingBackward(ctx.exec, {.ids = batch.ids,
                               .dy = dx.Slice(1, 0, config_.hidden_size),
                               .dtable = dembedding_,
                               .scale = EmbeddingScale(ctx),
                               .padding_id = config_.padding_id});
}

}  // namespace attune
