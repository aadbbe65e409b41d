// What the families' files share: fields of config.json, each checked as it is read, and the parts
// of a ModelConfig that most families spell alike.
//
// A field that nobody reads could change the maths, so it is refused by its name, unless it is
// known not to, or says nothing (null, false, text, an empty list or object).
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "worker/model/config.h"

namespace attune {

// Keeps the first error.
class ConfigReader {
 public:
  // `prefix` is put before names in messages: "rope_scaling.".
  explicit ConfigReader(const nlohmann::json& config, std::string prefix = "")
      : config_(config), prefix_(std::move(prefix)) {}

  // There and not null.
  bool Has(const std::string& name);
  int64_t Integer(const std::string& name, int64_t low, int64_t high);
  int64_t IntegerOr(const std::string& name, int64_t low, int64_t high, int64_t if_missing);
  double Number(const std::string& name, double low, double high);
  double NumberOr(const std::string& name, double low, double high, double if_missing);
  std::string StringOr(const std::string& name, const std::string& if_missing);
  bool BoolOr(const std::string& name, bool if_missing);
  std::vector<double> Numbers(const std::string& name, size_t count);
  // An object; an empty one where it is missing.
  const nlohmann::json& Object(const std::string& name);
  // A list of `count` elements, null where it is missing.
  const nlohmann::json* List(const std::string& name, size_t count);

  // A field that changes the maths in a way that is not built.
  void Refuse(const std::string& name, absl::string_view why);
  void Fail(const std::string& name, absl::string_view what);
  // An error that a part of the configuration has.
  void Forward(const absl::Status& status) {
    if (ok()) status_ = status;
  }
  // Refuses every field that was not read, and is not known to be harmless.
  void RefuseTheRest();
  const absl::Status& status() const { return status_; }
  bool ok() const { return status_.ok(); }

 private:
  // Null where it is missing or null. Marks it as read.
  const nlohmann::json* Find(const std::string& name);

  const nlohmann::json& config_;
  std::string prefix_;
  std::set<std::string> read_;
  absl::Status status_;
};

// What families have different where config.json does not say.
struct ConfigDefaults {
  bool tied_embeddings = false;
  double rope_theta = 10000;
  int64_t head_dim = 0;  // 0: hidden_size / num_attention_heads
};

// Sizes, eps, ties, the activation (hidden_act) and what every family has and nobody applies.
void ReadSizes(ConfigReader* reader, const ConfigDefaults& defaults, ModelConfig* config);

// One rope for all layers: rope_theta with rope_scaling, or transformers 5's rope_parameters.
void ReadRope(ConfigReader* reader, const ConfigDefaults& defaults, ModelConfig* config);

// The rope that `object` describes; rope->theta and rope->rotary_dim are what holds where it does
// not say. `original`: the original context, where it stands outside of it, or 0.
void ReadRopeObject(const nlohmann::json& object, const std::string& prefix, int64_t original,
                    ModelConfig* config, RopeConfig* rope, ConfigReader* reader);

// "silu", "gelu", ... of one of two fields.
Activation ReadActivation(ConfigReader* reader, const std::string& name, Activation if_missing);

// For each layer whether layer_types calls it sliding; `if_missing` says what holds without it.
std::vector<bool> ReadSlidingLayers(ConfigReader* reader, int64_t layers,
                                    const std::function<bool(int64_t)>& if_missing);
// The window for those layers.
void SetWindows(const std::vector<bool>& sliding, int64_t window, ModelConfig* config);

// RefuseTheRest, and what holds between fields. The family's last call.
absl::StatusOr<ModelConfig> Finish(ConfigReader* reader, ModelConfig config);

// The names that Llama gave and most families took over.
WeightNames LlamaNames();

}  // namespace attune
