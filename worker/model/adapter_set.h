// AdapterSet: what a job trains, apart from the frozen weights: the LoRA adapters and, if it says
// so, the embeddings and the head themselves (PEFT's modules_to_save). Every parameter lives in one
// flat buffer per purpose (master, gradient; an optimiser's states are alike), so that zeroing,
// the global norm, the all-reduce and the optimiser are one call each.
//
// Order inside a buffer: layer by layer; in a layer the linears that are one product (q, k, v; o;
// gate, up; down) together, first each one's A (r, K), then each one's B (N, r), then with
// DoRA each one's magnitudes (N). Behind the layers the modules that are trained in full.
// The gradient buffer has kTail extra elements for the scalars that are summed over ranks with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/layers/context.h"
#include "worker/model/config.h"

namespace attune {

struct AdapterEntry {
  int64_t layer = 0;
  Linear linear = Linear::kQ;
  LinearShape shape;
  std::string module;    // "model.layers.0.self_attn.q_proj"
  int64_t a_offset = 0;  // in elements
  int64_t b_offset = 0;
  int64_t magnitude_offset = 0;  // with DoRA
};

// A table (V, C) that is trained in full. Where embeddings and head stay tied it is both.
struct ModuleEntry {
  bool is_embedding = false;
  bool is_head = false;
  std::vector<std::string> modules;  // "model.embed_tokens", "lm_head": one for each that it is
  LinearShape shape;
  int64_t offset = 0;  // in elements
};

// What of a model is trained, in PEFT's words.
struct AdapterOptions {
  int64_t r = 0;
  double alpha = 0;
  std::vector<std::string> target_modules;  // as the user gave them
  bool use_rslora = false;
  bool use_dora = false;
  std::vector<std::string> modules_to_save;
  bool ensure_weight_tying = false;  // of a model whose embeddings are not tied it says nothing
};

struct AdapterLayout : AdapterOptions {
  std::vector<AdapterEntry> entries;
  std::vector<ModuleEntry> modules;
  int64_t elements = 0;

  // alpha / r, or alpha / sqrt(r) of rsLoRA.
  double scale() const {
    const double rank = static_cast<double>(r);
    return alpha / (use_rslora ? std::sqrt(rank) : rank);
  }
};

// The layers that `target_modules` names by suffix, as PEFT matches them: a module whose name is
// the target or ends with "." and the target; "all-linear" is every linear layer of the blocks. And
// the tables that `modules_to_save` names in the same way. Of a model that ties them, each that is
// named becomes a matrix of its own, unless ensure_weight_tying keeps them one.
// INVALID_ARGUMENT if a name matches nothing, with the modules that there are.
absl::StatusOr<AdapterLayout> SelectAdapters(const ModelConfig& config, const WeightNames& names,
                                             const AdapterOptions& options);

class AdapterSet {
 public:
  static constexpr int64_t kTail = 8;

  // Takes room from the arena's bottom; `train` also for gradients.
  AdapterSet(const LayerContext& ctx, AdapterLayout layout, bool train);

  const AdapterLayout& layout() const { return layout_; }
  TensorView master() const { return master_; }  // (elements) f32 (f64)
  TensorView grad() const { return grad_with_tail_.Slice(0, 0, layout_.elements); }
  TensorView grad_with_tail() const { return grad_with_tail_; }  // (elements + kTail)
  TensorView tail() const {
    return grad_with_tail_.Slice(0, layout_.elements, layout_.elements + kTail);
  }

  // A (r, K) and B (N, r) of an entry, in the dtype of products, and their gradients.
  TensorView A(const AdapterEntry& entry, const TensorView& flat) const;
  TensorView B(const AdapterEntry& entry, const TensorView& flat) const;
  // DoRA's magnitudes (N).
  TensorView Magnitude(const AdapterEntry& entry, const TensorView& flat) const;
  // A table (V, C) that is trained in full.
  TensorView Module(const ModuleEntry& entry, const TensorView& flat) const;
  TensorView compute() const { return compute_; }

  // A uniform in +-1/sqrt(K) (kaiming_uniform with a = sqrt(5), as PEFT), B zero; a function of
  // the seed alone. Magnitudes and modules are as the model has them, once it is loaded.
  void Initialise(const LayerContext& ctx, uint64_t seed);
  // Copies the master weights into the dtype of products. After every change of the master.
  void RefreshCompute(const LayerContext& ctx);
  // Counts the calls of RefreshCompute: what is derived from the adapters is old when it has moved.
  int64_t version() const { return version_; }

 private:
  AdapterLayout layout_;
  TensorView master_, grad_with_tail_;
  TensorView compute_;  // the master itself where the dtypes are the same
  int64_t version_ = 0;
};

}  // namespace attune
