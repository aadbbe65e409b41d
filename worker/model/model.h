// Model: a decoder language model with frozen weights and trained adapters.
//
// Made in two steps, the same on every device: the constructor takes room for everything from the
// arena, Load fills it. On the plan device Load only runs through the sizes.
#pragma once

#include <functional>
#include <list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/layers/block.h"
#include "worker/layers/lm_head.h"
#include "worker/layers/weight_prefetcher.h"
#include "worker/memory/stream_graph.h"
#include "worker/memory/travel.h"
#include "worker/model/activation_policy.h"
#include "worker/model/adapter_set.h"
#include "worker/model/config.h"

namespace attune {

// Weights by name, in host memory: a checkpoint, or what a test makes. Bytes of the views that it
// gives can also be Read, from many threads at once, and then a file that is cut is an error.
class WeightSource : public HostReader {
 public:
  // A contiguous view of any floating dtype, valid as long as the source. NOT_FOUND if there is
  // no such tensor.
  virtual absl::StatusOr<TensorView> Find(const std::string& name) const = 0;
  // The weight `name` (N, K) of a source that has it as NF4 (ModelConfig::nf4), in host memory;
  // valid until the next call.
  virtual absl::StatusOr<Nf4Weight> FindNf4(const std::string& name, const LinearShape& shape,
                                            bool double_quantization) const;
};

// What Forward leaves for Backward.
struct SavedModel {
  std::vector<SavedBlock> blocks;
};

// The hidden state after the last block is x + delta, (T, C) each.
struct Hidden {
  TensorView x;
  TensorView delta;
  // [delta|.] (T, dx_columns()): the memory of delta, in which Backward finds dx.
  TensorView delta_and_room;
};

// The angles of one rotary embedding, before positions are known.
struct RotaryEmbedding {
  TensorView inverse_frequencies;       // (R/2) f32
  TensorView long_inverse_frequencies;  // of documents longer than long_after; undefined: none
  int64_t long_after = 0;
  double attention_factor = 1;
};

struct ModelOptions {
  WeightStorage storage = WeightStorage::kDense;
  bool resident = false;  // see FrozenMatrixOptions
  bool prefetch = false;  // expand NF4 weights one ahead, in two buffers
  bool fp8 = false;       // products of 8-bit floats with the frozen linear weights
  int shards = 1;         // ranks that share the NF4 weights (see FrozenMatrixOptions)
  int shard = 0;
  // Keep the table of token embeddings in pinned host memory: the device reads the rows of a pack
  // from there. Not where the head is the same table.
  bool embedding_on_host = false;
  ActivationPolicy activations;
  int64_t logits_bytes = LmHead::kLogitsBytes;
};

class Model {
 public:
  // `adapters` may be null: the base model alone. Both outlive the model.
  Model(const LayerContext& ctx, const ModelConfig& config, const ModelOptions& options,
        AdapterSet* adapters);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Reads every weight. Shapes are checked, and on the plan device, where every job goes first,
  // finiteness too. INVALID_ARGUMENT names the tensor. What the adapters train in full, and DoRA's
  // magnitudes, start as they are in the checkpoint.
  // `progress` is called after every tensor.
  absl::Status Load(const LayerContext& ctx, const WeightNames& names, const WeightSource& source,
                    const std::function<void()>& progress);

  // Takes the host memory that the options want for packs of `tokens` tokens, once, before Load.
  absl::Status TakeHostMemory(const LayerContext& ctx, int64_t tokens);
  int64_t HostBytes(const LayerContext& ctx, int64_t tokens) const;

  // Bytes that a layer of T tokens saves of its stream and of gate and up; of different layers the
  // largest.
  int64_t StreamBytes(const LayerContext& ctx, int64_t tokens, StreamSaved saved) const;
  int64_t GateUpBytes(const LayerContext& ctx, int64_t tokens) const;

  // Keeps activations on the arena's bottom for Backward; the caller releases them.
  Hidden Forward(const LayerContext& ctx, const PackBatch& batch, SavedModel* saved) const;
  // The same without keeping more than one block's activations. With `caches` (one per block)
  // the chunk is put behind what they hold.
  Hidden Infer(const LayerContext& ctx, const PackBatch& batch, const std::vector<KvCache>* caches,
               int64_t cache_begin) const;
  // C, and the room that Backward needs behind it.
  int64_t dx_columns() const;
  // [dx|.] (T, dx_columns()): gradient of Forward's x + delta; overwritten. May be the memory of
  // Forward's delta. Gradients of what is trained accumulate.
  void Backward(const LayerContext& ctx, const PackBatch& batch, const SavedModel& saved,
                const TensorView& dx) const;

  // Whether passes are replayed as CUDA graphs, all but the head, whose work hangs on the labels of
  // a pack: from the start they are, if no second stream takes part (prefetch, activations on the
  // host) and no other rank (shards). Off, every op is launched. The bits are the same.
  void SetReplay(bool on) { replay_ = on && can_replay_; }
  // Training passes that were replayed so far, from end to end.
  int64_t passes_replayed() const { return passes_replayed_; }

  const ModelConfig& config() const { return config_; }
  const LmHead& head() const { return head_; }
  const std::vector<RotaryEmbedding>& ropes() const { return ropes_; }

 private:
  struct BlockWeights {
    FrozenMatrix qkv, o, gate_up, down;
  };

  BlockShape ShapeOfBlock(int64_t layer) const;
  void MakeRopes(const LayerContext& ctx);
  void MakeTables(const LayerContext& ctx, const ModelOptions& options);
  static TensorView& NormOf(TransformerBlock* block, BlockNorm norm);
  absl::Status LoadTables(const LayerContext& ctx, const WeightNames& names,
                          const WeightSource& source);
  // The table that is trained as the embeddings (or the head), null if it is frozen.
  const ModuleEntry* TrainedTable(bool ModuleEntry::*which) const;
  void Adapt(const LayerContext& ctx, const AdapterSet& adapters, int64_t layer);
  double EmbeddingScale(const LayerContext& ctx) const;
  void Embed(const LayerContext& ctx, const PackBatch& batch, const TensorView& x) const;
  void MakeRooms(const LayerContext& ctx) const;
  // The adapters' shares of lasting expansions, all at once.
  void ExtendAll(const LayerContext& ctx) const;
  void RefreshLinears(const LayerContext& ctx) const;
  // The context of a pass, with what lasts as long as it does.
  LayerContext BeginPass(const LayerContext& ctx) const;
  Hidden EnqueueForward(const LayerContext& ctx, const PackBatch& batch, SavedModel* saved) const;
  void EnqueueBackward(const LayerContext& ctx, const PackBatch& batch, const SavedModel& saved,
                       const TensorView& dx) const;
  // A training pass as it is replayed, and what its Forward gives.
  struct ReplayedPass {
    StreamGraph forward, backward;
    Hidden hidden;
    SavedModel saved;
    int64_t kept_bytes = 0;  // on the arena's bottom
  };
  // Of this key, or the one that has not been used for the longest time.
  ReplayedPass* PassOf(const StreamGraph::Key& key) const;
  LayerPlaces PlacesOf(int64_t layer) const {
    return attune::PlacesOf(policy_, config_.num_layers, layer);
  }
  // `rebuilt`: room for RebuiltBytes, the same for all layers.
  void PlaceSaved(const LayerContext& ctx, int64_t layer, int64_t tokens, const TensorView& rebuilt,
                  SavedBlock* saved) const;
  // What of the streams is not saved, of the layer that has the most.
  int64_t RebuiltBytes(const LayerContext& ctx, int64_t tokens) const;
  // Sizes of the pieces that travel, in the order of the layers.
  struct Pieces {
    std::vector<int64_t> streams, gate_ups;
  };
  Pieces TravellingPieces(const LayerContext& ctx, int64_t tokens) const;
  absl::Status LoadBlock(const LayerContext& ctx, const WeightNames& names,
                         const WeightSource& source, int64_t layer);
  // One of the matrices that a frozen matrix stacks, and its bias.
  struct PartName {
    int64_t layer;
    Linear linear;
  };
  absl::Status LoadPart(const LayerContext& ctx, const WeightNames& names,
                        const WeightSource& source, const PartName& part_name, FrozenMatrix* matrix,
                        const TensorView& bias) const;

  ModelConfig config_;
  // The tables (V, C): the base's, if a tied one is not trained in both its places; that of the
  // embeddings, which may be the adapters'. The head has its own view.
  TensorView tied_table_;
  TensorView embedding_;
  TensorView dembedding_;        // gradient of a trained one
  PinnedMemory host_embedding_;  // behind embedding_, if that is on the host
  bool embedding_on_host_;
  std::vector<BlockWeights> weights_;
  std::vector<TransformerBlock> blocks_;
  LmHead head_;
  std::vector<RotaryEmbedding> ropes_;
  ActivationPolicy policy_;
  AdapterSet* adapters_;
  // State of a pass and caches, not of the model.
  mutable TravellingBuffers streams_, gate_ups_;
  mutable WeightPrefetcher prefetcher_;
  int64_t gather_bytes_ = 0;    // of a prefetch
  int64_t prefetch_bytes_ = 0;  // of a buffer; 0: weights are expanded when they are used
  mutable int64_t refreshed_version_ = -1;
  bool can_replay_, replay_;
  mutable StreamGraph refresh_;
  // The last used first: packs have few capacities (PackBuffers), so few keys.
  mutable std::list<ReplayedPass> passes_;
  mutable int64_t passes_replayed_ = 0;
  mutable ReplayedPass* pass_ = nullptr;  // that Forward began, if it is one of them
};

}  // namespace attune
