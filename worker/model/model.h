// Model: a decoder language model with frozen weights and trained adapters.
//
// Made in two steps, the same on every device: the constructor takes room for everything from the
// arena, Load fills it. On the plan device Load only runs through the sizes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/layers/block.h"
#include "worker/layers/lm_head.h"
#include "worker/model/adapter_set.h"
#include "worker/model/config.h"

namespace attune {

// Weights by name, in host memory: a checkpoint, or what a test makes.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // A contiguous view of any floating dtype, valid as long as the source. NOT_FOUND if there is
  // no such tensor.
  virtual absl::StatusOr<TensorView> Find(const std::string& name) const = 0;
};

// What Forward leaves for Backward.
struct SavedModel {
  std::vector<SavedBlock> blocks;
};

// The hidden state after the last block is x + delta, (T, C) each.
struct Hidden {
  TensorView x;
  TensorView delta;
};

class Model {
 public:
  // `adapters` may be null: the base model alone. Both outlive the model.
  Model(const LayerContext& ctx, const ModelConfig& config, WeightStorage storage,
        const AdapterSet* adapters);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Reads every weight: shape and finiteness are checked. INVALID_ARGUMENT names the tensor.
  // `progress` is called after every tensor.
  absl::Status Load(const LayerContext& ctx, const WeightNames& names, const WeightSource& source,
                    const std::function<void()>& progress);

  // Keeps activations on the arena's bottom for Backward; the caller releases them.
  Hidden Forward(const LayerContext& ctx, const PackBatch& batch, SavedModel* saved) const;
  // The same without keeping more than one block's activations. With `caches` (one per block)
  // the chunk is put behind what they hold.
  Hidden Infer(const LayerContext& ctx, const PackBatch& batch, const std::vector<KvCache>* caches,
               int64_t cache_begin) const;
  // dx (T, C): gradient of Forward's x + delta; overwritten. Gradients of adapters accumulate.
  void Backward(const LayerContext& ctx, const PackBatch& batch, const SavedModel& saved,
                const TensorView& dx) const;

  const ModelConfig& config() const { return config_; }
  const LmHead& head() const { return head_; }
  TensorView inverse_frequencies() const { return inverse_frequencies_; }

 private:
  struct BlockWeights {
    FrozenMatrix qkv, o, gate_up, down;
  };

  void Adapt(const AdapterSet& adapters);
  absl::Status LoadBlock(const LayerContext& ctx, const WeightNames& names,
                         const WeightSource& source, int64_t layer);

  ModelConfig config_;
  TensorView embedding_;  // (V, C)
  std::vector<BlockWeights> weights_;
  std::vector<TransformerBlock> blocks_;
  LmHead head_;
  TensorView inverse_frequencies_;  // (D/2) f32
};

}  // namespace attune
