#include "worker/model/llama.h"

#include <limits>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

using nlohmann::json;

absl::Status FieldError(absl::string_view field, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("config.json: ", field, ": ", what));
}

// Fields of config.json, each checked as it is read. The first error is kept.
class Fields {
 public:
  explicit Fields(const json& config, std::string prefix = "")
      : config_(config), prefix_(std::move(prefix)) {}

  bool Has(const char* name) const {
    const auto found = config_.find(name);
    return found != config_.end() && !found->is_null();
  }
  int64_t Integer(const char* name, int64_t low, int64_t high) {
    const auto found = config_.find(name);
    if (found == config_.end() || !found->is_number_integer()) {
      Fail(name, "is missing or no whole number");
      return low;
    }
    // Compared as doubles first: an unsigned value beyond int64 would wrap.
    const double value = found->get<double>();
    if (!(value >= static_cast<double>(low) && value <= static_cast<double>(high))) {
      Fail(name, absl::StrCat("is ", found->dump(), "; it must be from ", low, " to ", high));
      return low;
    }
    return found->get<int64_t>();
  }
  double Number(const char* name, double low, double high) {
    const auto found = config_.find(name);
    if (found == config_.end() || !found->is_number()) {
      Fail(name, "is missing or no number");
      return low;
    }
    const double value = found->get<double>();
    if (!(value >= low && value <= high)) {
      Fail(name, absl::StrCat("is ", value, "; it must be from ", low, " to ", high));
    }
    return value;
  }
  std::string String(const char* name) {
    const auto found = config_.find(name);
    if (found == config_.end() || !found->is_string()) {
      Fail(name, "is missing or no string");
      return "";
    }
    return found->get<std::string>();
  }
  bool Bool(const char* name, bool if_missing) {
    if (!Has(name)) return if_missing;
    if (!config_[name].is_boolean()) {
      Fail(name, "must be true or false");
      return if_missing;
    }
    return config_[name].get<bool>();
  }
  // A field that changes the maths in a way that is not built.
  void Refuse(const char* name, absl::string_view why) {
    if (status_.ok()) {
      status_ = absl::UnimplementedError(absl::StrCat("config.json: ", prefix_, name, ": ", why));
    }
  }
  void Fail(const char* name, absl::string_view what) {
    if (status_.ok()) status_ = FieldError(absl::StrCat(prefix_, name), what);
  }
  const absl::Status& status() const { return status_; }

 private:
  const json& config_;
  std::string prefix_;
  absl::Status status_;
};

constexpr int64_t kMaxSize = int64_t{1} << 24;

// transformers 5 writes rope_parameters; before it was rope_theta beside rope_scaling.
absl::Status ParseRope(const json& config, RopeConfig* rope) {
  const bool parameters =
      config.contains("rope_parameters") && !config["rope_parameters"].is_null();
  const char* name = parameters ? "rope_parameters" : "rope_scaling";
  const json scaling =
      config.contains(name) && !config[name].is_null() ? config[name] : json::object();
  if (!scaling.is_object()) return FieldError(name, "must be an object");
  Fields top(config);
  Fields fields(scaling, absl::StrCat(name, "."));
  if (fields.Has("rope_theta")) {
    rope->theta = fields.Number("rope_theta", 1, 1e12);
  } else if (top.Has("rope_theta")) {
    rope->theta = top.Number("rope_theta", 1, 1e12);
  }
  std::string type = "default";
  if (fields.Has("rope_type")) {
    type = fields.String("rope_type");
  } else if (fields.Has("type")) {
    type = fields.String("type");
  }
  if (type == "linear") {
    rope->scaling = RopeScaling::kLinear;
    rope->factor = fields.Number("factor", 1, 1e6);
  } else if (type == "llama3") {
    rope->scaling = RopeScaling::kLlama3;
    rope->factor = fields.Number("factor", 1, 1e6);
    rope->low_freq_factor = fields.Number("low_freq_factor", 1e-6, 1e6);
    rope->high_freq_factor = fields.Number("high_freq_factor", 1e-6, 1e6);
    rope->original_max_position =
        static_cast<double>(fields.Integer("original_max_position_embeddings", 1, 1 << 30));
    if (fields.status().ok() && rope->high_freq_factor <= rope->low_freq_factor) {
      fields.Fail("high_freq_factor", "must be larger than low_freq_factor");
    }
  } else if (type != "default") {
    fields.Refuse("rope_type", absl::StrCat("`", type,
                                            "` is not built; known: default, linear, "
                                            "llama3"));
  }
  return top.status().ok() ? fields.status() : top.status();
}

void RefuseWhatIsNotBuilt(const json& config, Fields* fields) {
  if (fields->Has("hidden_act") && fields->String("hidden_act") != "silu") {
    fields->Refuse("hidden_act", "only silu is built for llama");
  }
  for (const char* bias : {"attention_bias", "mlp_bias"}) {
    if (fields->Bool(bias, false)) fields->Refuse(bias, "biases are not built for llama");
  }
  if (fields->Has("sliding_window")) {
    fields->Refuse("sliding_window", "sliding windows are not built for llama");
  }
  if (fields->Has("partial_rotary_factor") && config["partial_rotary_factor"] != 1.0) {
    fields->Refuse("partial_rotary_factor", "partial rotary embeddings are not built for llama");
  }
  if (fields->Has("quantization_config")) {
    fields->Refuse("quantization_config",
                   "pre-quantised checkpoints are not read yet; give the bf16, fp16 or fp32 "
                   "checkpoint, which is quantised while it loads");
  }
}

absl::StatusOr<ModelConfig> ParseLlama(const json& config) {
  Fields fields(config);
  ModelConfig c;
  c.family = "llama";
  c.vocab_size = fields.Integer("vocab_size", 1, kMaxSize);
  c.hidden_size = fields.Integer("hidden_size", 1, kMaxSize);
  c.num_layers = fields.Integer("num_hidden_layers", 1, 4096);
  c.num_heads = fields.Integer("num_attention_heads", 1, 65536);
  c.num_kv_heads = fields.Has("num_key_value_heads")
                       ? fields.Integer("num_key_value_heads", 1, 65536)
                       : c.num_heads;
  c.intermediate_size = fields.Integer("intermediate_size", 1, kMaxSize);
  c.max_positions = fields.Integer("max_position_embeddings", 1, int64_t{1} << 30);
  c.rms_norm_eps = fields.Number("rms_norm_eps", 0, 1);
  c.tied_embeddings = fields.Bool("tie_word_embeddings", false);
  RefuseWhatIsNotBuilt(config, &fields);
  if (!fields.status().ok()) return fields.status();
  if (fields.Has("head_dim")) {
    c.head_dim = fields.Integer("head_dim", 2, 4096);
  } else if (c.hidden_size % c.num_heads != 0) {
    return FieldError("num_attention_heads", "must divide hidden_size where head_dim is not given");
  } else {
    c.head_dim = c.hidden_size / c.num_heads;
  }
  if (!fields.status().ok()) return fields.status();
  if (c.head_dim % 2 != 0) return FieldError("head_dim", "must be even");
  if (c.num_heads % c.num_kv_heads != 0) {
    return FieldError("num_key_value_heads", "must divide num_attention_heads");
  }
  if (absl::Status s = ParseRope(config, &c.rope); !s.ok()) return s;
  return c;
}

WeightNames LlamaNames() {
  static constexpr const char* kModules[kLinears] = {
      "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
      "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  const auto layer = [](int64_t i) { return absl::StrCat("model.layers.", i, "."); };
  return {
      .embedding = "model.embed_tokens.weight",
      .final_norm = "model.norm.weight",
      .head = "lm_head.weight",
      .attention_norm =
          [layer](int64_t i) { return absl::StrCat(layer(i), "input_layernorm.weight"); },
      .mlp_norm =
          [layer](int64_t i) { return absl::StrCat(layer(i), "post_attention_layernorm.weight"); },
      .linear =
          [layer](int64_t i, Linear linear) {
            return absl::StrCat(layer(i), kModules[static_cast<int>(linear)]);
          },
  };
}

}  // namespace

Family LlamaFamily() {
  return {"llama", "LlamaForCausalLM", ParseLlama, LlamaNames};
}

}  // namespace attune
