// ModelConfig: everything that the one transformer block needs to know about a checkpoint.
// A family (llama.cc, ...) turns its config.json into this and names its weights.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/gated_activation/gated_activation.h"

namespace attune {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3, kYarn, kLongRope };

// Rotary position embedding (Su et al., 2021) with the frequency scalings of Hugging Face.
struct RopeConfig {
  double theta = 10000;
  int64_t rotary_dim = 0;  // R, even; 0: the whole head
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1;
  double low_freq_factor = 1;            // kLlama3
  double high_freq_factor = 4;           // kLlama3
  double beta_fast = 32, beta_slow = 1;  // kYarn
  bool truncate = true;                  // kYarn
  std::vector<double> short_factors;     // kLongRope, R / 2 of each
  std::vector<double> long_factors;      // kLongRope: of documents > original_max_position
  int64_t original_max_position = 8192;  // kLlama3, kYarn, kLongRope
  double attention_factor = 1;           // of cos and sin

  int64_t RotaryDim(int64_t head_dim) const { return rotary_dim > 0 ? rotary_dim : head_dim; }
  // (R / 2) inverse frequencies, in the arithmetic of transformers' ROPE_INIT_FUNCTIONS.
  // `is_long`: those of long documents (kLongRope).
  std::vector<float> InverseFrequencies(int64_t head_dim, bool is_long = false) const;
};

// What may be different from layer to layer.
struct LayerConfig {
  static constexpr int kNoRope = -1;
  int rope = 0;        // of ModelConfig::ropes, or kNoRope
  int64_t window = 0;  // keys that a query sees, itself included; 0: all before it
};

// The linear layers of a block that there may be. Their numbers are in the seeds of adapters.
enum class Linear : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown, kQkv, kGateUp };

// What bitsandbytes has quantised to NF4 in a checkpoint: the linears of the blocks, but for some.
struct Nf4Checkpoint {
  bool double_quantization = false;
  std::set<std::pair<int64_t, Linear>> dense;  // layers and linears of which it keeps the values
};

// Defaults are those of Llama.
struct ModelConfig {
  std::string family;       // as config.json's model_type
  int64_t vocab_size = 0;   // V
  int64_t hidden_size = 0;  // C
  int64_t num_layers = 0;
  int64_t num_heads = 0;          // Hq
  int64_t num_kv_heads = 0;       // Hk, divides Hq
  int64_t head_dim = 0;           // D, even
  int64_t intermediate_size = 0;  // F
  int64_t max_positions = 0;
  double rms_norm_eps = 1e-6;
  double norm_weight_offset = 0;  // RMSNorm multiplies with weight + offset
  Activation activation = Activation::kSilu;
  bool tied_embeddings = false;  // the head is the embedding table
  // pad_token_id: the token whose row of the table training leaves alone, as torch's Embedding does
  // with it. -1: none
  int64_t padding_id = -1;

  bool fused_modules = false;  // q, k, v are one module and one weight; gate and up too
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;     // RMSNorm of every head of q and k, before rope
  bool post_norms = false;  // RMSNorm of what attention and MLP add to the stream

  double attention_scale = 0;    // 0: 1 / sqrt(D)
  double attention_softcap = 0;  // 0: none
  double embedding_scale = 1;
  double residual_scale = 1;  // of what attention and MLP add to the stream
  double logit_scale = 1;
  double logit_softcap = 0;  // 0: none

  std::vector<RopeConfig> ropes = {RopeConfig()};  // at most kMaxRopes
  std::vector<LayerConfig> layers;                 // num_layers; empty: all LayerConfig()

  std::optional<Nf4Checkpoint> nf4;  // none: every weight of the checkpoint is dense

  // What config.json asks for and training leaves out, in words for the user.
  std::vector<std::string> warnings;

  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
  LayerConfig layer(int64_t i) const { return layers.empty() ? LayerConfig() : layers[i]; }
  // Whether the checkpoint has this linear as NF4.
  bool IsNf4(int64_t layer, Linear linear) const {
    return nf4.has_value() && !nf4->dense.contains({layer, linear});
  }
};

// The linears of a model's blocks, in the order in which adapters are stored.
absl::Span<const Linear> LinearsOf(const ModelConfig& config);

// Where a Linear sits: which product of the block, and which part of its stacked rows.
struct LinearPlace {
  int matrix;  // 0 qkv, 1 o, 2 gate_up, 3 down
  int part;
};
LinearPlace PlaceOf(Linear linear);

// The norms of a block that there may be.
enum class BlockNorm : uint8_t { kAttention, kMlp, kPostAttention, kPostMlp, kQ, kK };

// Those of a model's blocks.
std::vector<BlockNorm> NormsOf(const ModelConfig& config);

// Names of a family's weights in its checkpoints.
struct WeightNames {
  std::string embedding;
  std::string final_norm;
  std::string head;
  // Of layer i.
  std::function<std::string(int64_t, BlockNorm)> norm;
  std::function<std::string(int64_t, Linear)> linear;  // the module: without ".weight", ".bias"
};

struct LinearShape {
  int64_t out = 0;  // N
  int64_t in = 0;   // K
};
LinearShape ShapeOf(const ModelConfig& config, Linear linear);
int64_t SizeOf(const ModelConfig& config, BlockNorm norm);
bool HasBias(const ModelConfig& config, Linear linear);

// Every tensor of a checkpoint that the model reads.
struct WeightShape {
  std::string name;
  std::vector<int64_t> shape;  // (N, K) or (N)
};
std::vector<WeightShape> WeightShapes(const ModelConfig& config, const WeightNames& names);

// Parameters of the model in all, a tied head counted once.
int64_t CountParameters(const ModelConfig& config, const WeightNames& names);

// One model family.
struct Family {
  std::string model_type;    // as config.json has it
  std::string architecture;  // "LlamaForCausalLM"
  absl::StatusOr<ModelConfig> (*parse)(const nlohmann::json& config);
  WeightNames (*names)();
};

// Every family that attune trains. An explicit list: no registration at load time.
const std::vector<Family>& Families();

// The family of a config.json; UNIMPLEMENTED naming the architecture and the known ones.
absl::StatusOr<const Family*> FindFamily(const nlohmann::json& config);

}  // namespace attune
