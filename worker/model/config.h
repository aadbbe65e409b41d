// ModelConfig: everything that the one transformer block needs to know about a checkpoint.
// A family (llama.cc, ...) turns its config.json into this and names its weights.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace attune {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3 };

// Rotary position embedding (Su et al., 2021) with the frequency scalings of Hugging Face.
struct RopeConfig {
  double theta = 10000;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1;
  double low_freq_factor = 1;           // kLlama3
  double high_freq_factor = 4;          // kLlama3
  double original_max_position = 8192;  // kLlama3

  // (head_dim / 2) inverse frequencies, in the arithmetic of transformers' ROPE_INIT_FUNCTIONS.
  std::vector<float> InverseFrequencies(int64_t head_dim) const;
};

struct ModelConfig {
  std::string family;       // "llama"
  int64_t vocab_size = 0;   // V
  int64_t hidden_size = 0;  // C
  int64_t num_layers = 0;
  int64_t num_heads = 0;          // Hq
  int64_t num_kv_heads = 0;       // Hk, divides Hq
  int64_t head_dim = 0;           // D, even
  int64_t intermediate_size = 0;  // F
  int64_t max_positions = 0;
  double rms_norm_eps = 1e-6;
  bool tied_embeddings = false;  // the head is the embedding table
  RopeConfig rope;

  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
};

// The linear layers of a block, in the order in which adapters are stored.
enum class Linear : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
constexpr int kLinears = 7;

// Where a Linear sits: which product of the block, and which part of its stacked rows.
struct LinearPlace {
  int matrix;  // 0 qkv, 1 o, 2 gate_up, 3 down
  int part;
};
LinearPlace PlaceOf(Linear linear);

// Names of a family's weights in its checkpoints.
struct WeightNames {
  std::string embedding;
  std::string final_norm;
  std::string head;
  // Of layer i.
  std::function<std::string(int64_t)> attention_norm;
  std::function<std::string(int64_t)> mlp_norm;
  std::function<std::string(int64_t, Linear)> linear;  // module name, without ".weight"
};

struct LinearShape {
  int64_t out = 0;  // N
  int64_t in = 0;   // K
};
LinearShape ShapeOf(const ModelConfig& config, Linear linear);

// Parameters of the model in all, a tied head counted once.
int64_t CountParameters(const ModelConfig& config);

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
