#include "worker/model/config_reader.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace attune {
namespace {

using nlohmann::json;

constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxPositions = int64_t{1} << 30;
constexpr int64_t kMaxHeadDim = 512;  // of the kernels

// Fields that may hold something and change nothing here: names and versions, token ids, how the
// weights were drawn, how text is generated elsewhere, heads for other tasks.
constexpr absl::string_view kHarmless[] = {
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cls_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "pretraining_tp",
    "pruned_heads",
    "repetition_penalty",
    "return_dict",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "use_cache",
};

bool SaysNothing(const json& value) {
  return value.is_null() || value == false || value.is_string() ||
         ((value.is_array() || value.is_object()) && value.empty());
}

}  // namespace

const json* ConfigReader::Find(const std::string& name) {
  read_.insert(name);
  const auto found = config_.find(name);
  return found == config_.end() || found->is_null() ? nullptr : &*found;
}

bool ConfigReader::Has(const std::string& name) {
  return Find(name) != nullptr;
}

int64_t ConfigReader::Integer(const std::string& name, int64_t low, int64_t high) {
  const json* found = Find(name);
  if (found == nullptr || !found->is_number_integer()) {
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

int64_t ConfigReader::IntegerOr(const std::string& name, int64_t low, int64_t high,
                                int64_t if_missing) {
  return Has(name) ? Integer(name, low, high) : if_missing;
}

double ConfigReader::Number(const std::string& name, double low, double high) {
  const json* found = Find(name);
  if (found == nullptr || !found->is_number()) {
    Fail(name, "is missing or no number");
    return low;
  }
  const double value = found->get<double>();
  if (!(value >= low && value <= high)) {
    Fail(name, absl::StrCat("is ", value, "; it must be from ", low, " to ", high));
    return low;
  }
  return value;
}

double ConfigReader::NumberOr(const std::string& name, double low, double high, double if_missing) {
  return Has(name) ? Number(name, low, high) : if_missing;
}

std::string ConfigReader::StringOr(const std::string& name, const std::string& if_missing) {
  const json* found = Find(name);
  if (found == nullptr) return if_missing;
  if (!found->is_string()) {
    Fail(name, "is no string");
    return if_missing;
  }
  return found->get<std::string>();
}

bool ConfigReader::BoolOr(const std::string& name, bool if_missing) {
  const json* found = Find(name);
  if (found == nullptr) return if_missing;
  if (!found->is_boolean()) {
    Fail(name, "must be true or false");
    return if_missing;
  }
  return found->get<bool>();
}

std::vector<double> ConfigReader::Numbers(const std::string& name, size_t count) {
  std::vector<double> out(count, 1.0);
  const json* list = List(name, count);
  if (list == nullptr) {
    Fail(name, "is missing");
    return out;
  }
  for (size_t i = 0; i < count; ++i) {
    if (!(*list)[i].is_number()) {
      Fail(name, "must hold numbers only");
      return out;
    }
    out[i] = (*list)[i].get<double>();
  }
  return out;
}

const json& ConfigReader::Object(const std::string& name) {
  static const json* const empty = new json(json::object());
  const json* found = Find(name);
  if (found == nullptr) return *empty;
  if (!found->is_object()) {
    Fail(name, "must be an object");
    return *empty;
  }
  return *found;
}

const json* ConfigReader::List(const std::string& name, size_t count) {
  const json* found = Find(name);
  if (found == nullptr) return nullptr;
  if (!found->is_array() || found->size() != count) {
    Fail(name, absl::StrCat("must be a list of ", count, " elements"));
    return nullptr;
  }
  return found;
}

void ConfigReader::Refuse(const std::string& name, absl::string_view why) {
  if (!ok()) return;
  status_ = absl::UnimplementedError(absl::StrCat("config.json: ", prefix_, name, ": ", why));
}

void ConfigReader::Fail(const std::string& name, absl::string_view what) {
  if (!ok()) return;
  status_ = absl::InvalidArgumentError(absl::StrCat("config.json: ", prefix_, name, ": ", what));
}

void ConfigReader::RefuseTheRest() {
  for (const auto& [name, value] : config_.items()) {
    if (read_.contains(name) || SaysNothing(value) || absl::StartsWith(name, "_")) continue;
    if (std::find(std::begin(kHarmless), std::end(kHarmless), name) != std::end(kHarmless))
      continue;
    Refuse(name,
           "is not known for this model_type, and may change what the model computes; if it does "
           "not, remove it from config.json");
  }
}

Activation ReadActivation(ConfigReader* reader, const std::string& name, Activation if_missing) {
  const std::string text = reader->StringOr(name, "");
  if (text.empty()) return if_missing;
  if (text == "silu" || text == "swish") return Activation::kSilu;
  if (text == "gelu") return Activation::kGeluErf;
  if (text == "gelu_pytorch_tanh" || text == "gelu_new") return Activation::kGeluTanh;
  reader->Refuse(name,
                 absl::StrCat("`", text, "` is not built; known: silu, gelu, gelu_pytorch_tanh"));
  return if_missing;
}

void ReadSizes(ConfigReader* reader, const ConfigDefaults& defaults, ModelConfig* c) {
  c->vocab_size = reader->Integer("vocab_size", 1, kMaxSize);
  c->hidden_size = reader->Integer("hidden_size", 1, kMaxSize);
  c->num_layers = reader->Integer("num_hidden_layers", 1, 4096);
  c->num_heads = reader->Integer("num_attention_heads", 1, 65536);
  c->num_kv_heads = reader->IntegerOr("num_key_value_heads", 1, 65536, c->num_heads);
  c->intermediate_size = reader->Integer("intermediate_size", 1, kMaxSize);
  c->max_positions = reader->Integer("max_position_embeddings", 1, kMaxPositions);
  c->rms_norm_eps = reader->Number("rms_norm_eps", 0, 1);
  c->tied_embeddings = reader->BoolOr("tie_word_embeddings", defaults.tied_embeddings);
  constexpr int64_t kNoId = INT64_MAX;
  const int64_t padding = reader->IntegerOr("pad_token_id", INT32_MIN, INT32_MAX, kNoId);
  c->padding_id = padding < 0 ? padding + c->vocab_size : padding;  // torch counts from the end
  if (c->padding_id >= c->vocab_size || c->padding_id < 0) c->padding_id = -1;
  c->activation = ReadActivation(reader, "hidden_act", Activation::kSilu);
  c->head_dim = reader->IntegerOr("head_dim", 2, kMaxHeadDim, defaults.head_dim);
  if (!reader->ok()) return;
  if (c->head_dim == 0) {
    if (c->hidden_size % c->num_heads != 0) {
      return reader->Fail("num_attention_heads",
                          "must divide hidden_size where head_dim is not given");
    }
    c->head_dim = c->hidden_size / c->num_heads;
  }
  if (c->head_dim > kMaxHeadDim) {
    reader->Refuse("num_attention_heads", "heads of more than 512 elements are not built");
  }
  if (c->head_dim % 2 != 0) reader->Fail("head_dim", "must be even");
  if (c->num_heads % c->num_kv_heads != 0) {
    reader->Fail("num_key_value_heads", "must divide num_attention_heads");
  }
  for (const char* name : {"attention_dropout", "resid_pdrop", "embd_pdrop"}) {
    const double p = reader->NumberOr(name, 0, 1, 0);
    if (p == 0) continue;
    c->warnings.push_back(absl::StrCat("config.json: ", name, ": ", p,
                                       " is not applied: dropout is lora.dropout alone"));
  }
}

namespace {

void ReadYarn(ConfigReader* fields, ModelConfig* c, RopeConfig* rope) {
  rope->scaling = RopeScaling::kYarn;
  const double ratio =
      static_cast<double>(c->max_positions) / static_cast<double>(rope->original_max_position);
  rope->factor = fields->NumberOr("factor", 1, 1e6, ratio);
  rope->beta_fast = fields->NumberOr("beta_fast", 1e-6, 1e6, 32);
  rope->beta_slow = fields->NumberOr("beta_slow", 1e-6, 1e6, 1);
  rope->truncate = fields->BoolOr("truncate", true);
  const auto scale = [&](double m) {
    return rope->factor <= 1 ? 1.0 : 0.1 * m * std::log(rope->factor) + 1.0;
  };
  const double mscale = fields->NumberOr("mscale", 0, 1e6, 0);
  const double mscale_all = fields->NumberOr("mscale_all_dim", 0, 1e6, 0);
  const bool both = mscale != 0 && mscale_all != 0;
  rope->attention_factor = fields->NumberOr("attention_factor", 1e-6, 1e6,
                                            both ? scale(mscale) / scale(mscale_all) : scale(1));
}

void ReadLongRope(ConfigReader* fields, ModelConfig* c, RopeConfig* rope) {
  rope->scaling = RopeScaling::kLongRope;
  const size_t pairs = static_cast<size_t>(rope->RotaryDim(c->head_dim) / 2);
  rope->short_factors = fields->Numbers("short_factor", pairs);
  rope->long_factors = fields->Numbers("long_factor", pairs);
  const auto original = static_cast<double>(rope->original_max_position);
  const double ratio = static_cast<double>(c->max_positions) / original;
  const double factor = fields->NumberOr("factor", 1e-6, 1e6, ratio);
  const double usual = factor <= 1 ? 1.0 : std::sqrt(1 + std::log(factor) / std::log(original));
  rope->attention_factor = fields->NumberOr("attention_factor", 1e-6, 1e6, usual);
}

void ReadRopeType(ConfigReader* fields, const std::string& type, ModelConfig* c, RopeConfig* rope) {
  if (type == "linear") {
    rope->scaling = RopeScaling::kLinear;
    rope->factor = fields->Number("factor", 1, 1e6);
  } else if (type == "llama3") {
    rope->scaling = RopeScaling::kLlama3;
    rope->factor = fields->Number("factor", 1, 1e6);
    rope->low_freq_factor = fields->Number("low_freq_factor", 1e-6, 1e6);
    rope->high_freq_factor = fields->Number("high_freq_factor", 1e-6, 1e6);
    if (fields->ok() && rope->high_freq_factor <= rope->low_freq_factor) {
      fields->Fail("high_freq_factor", "must be larger than low_freq_factor");
    }
  } else if (type == "yarn") {
    ReadYarn(fields, c, rope);
  } else if (type == "longrope") {
    ReadLongRope(fields, c, rope);
  } else if (type != "default") {
    fields->Refuse(
        "rope_type",
        absl::StrCat("`", type, "` is not built; known: default, linear, llama3, yarn, longrope"));
  }
}

}  // namespace

void ReadRopeObject(const json& object, const std::string& prefix, int64_t original, ModelConfig* c,
                    RopeConfig* rope, ConfigReader* reader) {
  if (!reader->ok()) return;
  ConfigReader fields(object, prefix);
  rope->theta = fields.NumberOr("rope_theta", 1, 1e12, rope->theta);
  const double partial = fields.NumberOr("partial_rotary_factor", 0, 1, 1);
  if (partial != 1) {
    rope->rotary_dim = static_cast<int64_t>(static_cast<double>(c->head_dim) * partial);
  }
  if (rope->RotaryDim(c->head_dim) % 2 != 0) {
    fields.Fail("partial_rotary_factor", "leaves an odd number of elements to rotate");
  }
  const int64_t within =
      fields.IntegerOr("original_max_position_embeddings", 1, kMaxPositions, c->max_positions);
  rope->original_max_position = original > 0 ? original : within;
  const std::string old_name = fields.StringOr("type", "default");
  std::string type = fields.StringOr("rope_type", old_name);
  // Names that Phi-3's first checkpoints have for it.
  if (c->family == "phi3" && (type == "su" || type == "yarn")) type = "longrope";
  ReadRopeType(&fields, type, c, rope);
  fields.RefuseTheRest();
  if (!fields.ok()) reader->Forward(fields.status());
}

void ReadRope(ConfigReader* reader, const ConfigDefaults& defaults, ModelConfig* c) {
  if (!reader->ok()) return;
  RopeConfig rope;
  rope.theta = reader->NumberOr("rope_theta", 1, 1e12, defaults.rope_theta);
  const double partial = reader->NumberOr("partial_rotary_factor", 0, 1, 1);
  if (partial != 1) {
    rope.rotary_dim = static_cast<int64_t>(static_cast<double>(c->head_dim) * partial);
  }
  const int64_t original =
      reader->IntegerOr("original_max_position_embeddings", 1, kMaxPositions, 0);
  // transformers 5 writes rope_parameters; before it was rope_theta beside rope_scaling.
  const char* name = reader->Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  reader->Has("rope_scaling");
  const json& object = reader->Object(name);
  ReadRopeObject(object, absl::StrCat(name, "."), original, c, &rope, reader);
  c->ropes = {rope};
}

std::vector<bool> ReadSlidingLayers(ConfigReader* reader, int64_t layers,
                                    const std::function<bool(int64_t)>& if_missing) {
  std::vector<bool> sliding(static_cast<size_t>(layers));
  const json* types = reader->List("layer_types", static_cast<size_t>(layers));
  for (int64_t i = 0; i < layers; ++i) {
    if (types == nullptr) {
      sliding[i] = if_missing(i);
      continue;
    }
    const json& type = (*types)[i];
    sliding[i] = type == "sliding_attention";
    if (!sliding[i] && type != "full_attention") {
      reader->Refuse("layer_types", absl::StrCat(type.dump(), " is not built"));
    }
  }
  return sliding;
}

void SetWindows(const std::vector<bool>& sliding, int64_t window, ModelConfig* c) {
  c->layers.resize(static_cast<size_t>(c->num_layers));
  for (size_t i = 0; i < c->layers.size(); ++i) c->layers[i].window = sliding[i] ? window : 0;
}

namespace {

// Refuses a text that is not in `known`.
void CheckOneOf(ConfigReader* reader, const std::string& name, const std::string& if_missing,
                const std::vector<std::string>& known, absl::string_view what_to_do) {
  const std::string text = reader->StringOr(name, if_missing);
  if (std::find(known.begin(), known.end(), text) != known.end()) return;
  reader->Refuse(
      name,
      absl::StrCat("`", text, "` is not built; known: ", absl::StrJoin(known, ", "), what_to_do));
}

// What Transformers writes of its BitsAndBytesConfig; values that it leaves out are bitsandbytes'
// defaults. Types are checked, and say nothing: weights are expanded to the job's precision.
void ReadQuantization(ConfigReader* reader, ModelConfig* c) {
  if (!reader->Has("quantization_config")) return;
  constexpr char kDense[] =
      ". Or give the bf16, fp16 or fp32 checkpoint, which is quantised while it loads";
  ConfigReader fields(reader->Object("quantization_config"), "quantization_config.");
  CheckOneOf(&fields, "quant_method", "bitsandbytes", {"bitsandbytes"}, kDense);
  if (fields.BoolOr("load_in_8bit", false)) {
    fields.Refuse("load_in_8bit", absl::StrCat("int8 weights are not built, NF4 ones are", kDense));
  }
  if (!fields.BoolOr("load_in_4bit", false)) {
    fields.Fail("load_in_4bit", "is not true: this says of nothing how it is quantised");
  }
  CheckOneOf(&fields, "bnb_4bit_quant_type", "fp4", {"nf4"}, kDense);
  CheckOneOf(&fields, "bnb_4bit_compute_dtype", "float32", {"float32", "bfloat16", "float16"}, "");
  CheckOneOf(&fields, "bnb_4bit_quant_storage", "uint8",
             {"uint8", "float32", "bfloat16", "float16"}, "");
  c->nf4 = Nf4Checkpoint{.double_quantization = fields.BoolOr("bnb_4bit_use_double_quant", false)};
  // Which weights are left out is seen in the checkpoint.
  for (const char* name : {"llm_int8_skip_modules", "llm_int8_threshold", "_load_in_4bit"}) {
    fields.Has(name);
  }
  fields.RefuseTheRest();
  if (!fields.ok()) reader->Forward(fields.status());
}

}  // namespace

absl::StatusOr<ModelConfig> Finish(ConfigReader* reader, ModelConfig config) {
  ReadQuantization(reader, &config);
  reader->RefuseTheRest();
  if (!reader->ok()) return reader->status();
  return config;
}

WeightNames LlamaNames() {
  const auto layer = [](int64_t i) { return absl::StrCat("model.layers.", i, "."); };
  return {
      .embedding = "model.embed_tokens.weight",
      .final_norm = "model.norm.weight",
      .head = "lm_head.weight",
      .norm =
          [layer](int64_t i, BlockNorm norm) {
            static constexpr const char* kNames[] = {
                "input_layernorm",  "post_attention_layernorm", "", "",
                "self_attn.q_norm", "self_attn.k_norm"};
            return absl::StrCat(layer(i), kNames[static_cast<int>(norm)], ".weight");
          },
      .linear =
          [layer](int64_t i, Linear linear) {
            static constexpr const char* kNames[] = {
                "self_attn.q_proj", "self_attn.k_proj",   "self_attn.v_proj",
                "self_attn.o_proj", "mlp.gate_proj",      "mlp.up_proj",
                "mlp.down_proj",    "self_attn.qkv_proj", "mlp.gate_up_proj"};
            return absl::StrCat(layer(i), kNames[static_cast<int>(linear)]);
          },
  };
}

}  // namespace attune
