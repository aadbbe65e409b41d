#include "worker/model/gemma.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "worker/model/config_reader.h"

namespace attune {
namespace {

constexpr int64_t kMaxWindow = int64_t{1} << 30;
const ConfigDefaults kGemmaDefaults = {.tied_embeddings = true, .head_dim = 256};

// What all have.
void ReadShared(ConfigReader* reader, ModelConfig* c) {
  ReadSizes(reader, kGemmaDefaults, c);
  c->norm_weight_offset = 1;
  c->embedding_scale = std::sqrt(static_cast<double>(c->hidden_size));
  c->qkv_bias = c->o_bias = reader->BoolOr("attention_bias", false);
  if (reader->BoolOr("use_bidirectional_attention", false)) {
    reader->Refuse("use_bidirectional_attention", "a model that sees what comes next is not built");
  }
  if (reader->Has("hidden_act") && c->activation == Activation::kSilu) {
    reader->Refuse("hidden_act", "a Gemma whose gate is not GELU is not built");
  }
  // "gelu" in the first checkpoints is a slip: the models were trained with its tanh form.
  c->activation = ReadActivation(reader, "hidden_activation", Activation::kGeluTanh);
  if (c->activation == Activation::kGeluErf) c->activation = Activation::kGeluTanh;
}

WeightNames NamesWithPostNorms() {
  WeightNames names = LlamaNames();
  names.norm = [llama = names.norm](int64_t i, BlockNorm norm) -> std::string {
    const char* name = nullptr;
    switch (norm) {
      case BlockNorm::kPostAttention:
        name = "post_attention_layernorm";
        break;
      case BlockNorm::kMlp:
        name = "pre_feedforward_layernorm";
        break;
      case BlockNorm::kPostMlp:
        name = "post_feedforward_layernorm";
        break;
      default:
        return llama(i, norm);
    }
    return absl::StrCat("model.layers.", i, ".", name, ".weight");
  };
  return names;
}

// What Gemma 2 and 3 share beyond Gemma.
void ReadLater(ConfigReader* reader, ModelConfig* c) {
  c->post_norms = true;
  c->attention_scale = 1 / std::sqrt(reader->NumberOr("query_pre_attn_scalar", 1e-6, 1e9, 256));
}

// The rope of the layers with a window, and that of the others: 1 and 0 of ropes.
void ReadTwoRopes(ConfigReader* reader, ModelConfig* c) {
  RopeConfig wide, local;
  wide.theta = reader->NumberOr("rope_theta", 1, 1e12, 1e6);
  local.theta = reader->NumberOr("rope_local_base_freq", 1, 1e12, 1e4);
  if (reader->Has("rope_parameters")) {
    reader->Has("rope_scaling");
    ConfigReader both(reader->Object("rope_parameters"), "rope_parameters.");
    ReadRopeObject(both.Object("full_attention"), "rope_parameters.full_attention.", 0, c, &wide,
                   reader);
    ReadRopeObject(both.Object("sliding_attention"), "rope_parameters.sliding_attention.", 0, c,
                   &local, reader);
    both.RefuseTheRest();
    reader->Forward(both.status());
  } else {
    ReadRopeObject(reader->Object("rope_scaling"), "rope_scaling.", 0, c, &wide, reader);
  }
  c->ropes = {wide, local};
  for (LayerConfig& layer : c->layers) layer.rope = layer.window > 0 ? 1 : 0;
}

absl::StatusOr<ModelConfig> ParseGemma(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "gemma"};
  ReadShared(&reader, &c);
  ReadRope(&reader, kGemmaDefaults, &c);
  return Finish(&reader, std::move(c));
}

absl::StatusOr<ModelConfig> ParseGemma2(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "gemma2"};
  ReadShared(&reader, &c);
  ReadRope(&reader, kGemmaDefaults, &c);
  ReadLater(&reader, &c);
  c.attention_softcap = reader.NumberOr("attn_logit_softcapping", 1e-6, 1e9, 0);
  c.logit_softcap = reader.NumberOr("final_logit_softcapping", 1e-6, 1e9, 0);
  SetWindows(ReadSlidingLayers(&reader, c.num_layers, [](int64_t i) { return i % 2 == 0; }),
             reader.IntegerOr("sliding_window", 1, kMaxWindow, 4096), &c);
  return Finish(&reader, std::move(c));
}

absl::StatusOr<ModelConfig> ParseGemma3Text(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "gemma3_text"};
  ReadShared(&reader, &c);
  ReadLater(&reader, &c);
  c.qk_norm = true;
  c.logit_softcap = reader.NumberOr("final_logit_softcapping", 1e-6, 1e9, 0);
  const int64_t pattern = reader.IntegerOr("sliding_window_pattern", 1, 4096, 6);
  SetWindows(
      ReadSlidingLayers(&reader, c.num_layers, [&](int64_t i) { return (i + 1) % pattern != 0; }),
      reader.IntegerOr("sliding_window", 1, kMaxWindow, 4096), &c);
  ReadTwoRopes(&reader, &c);
  return Finish(&reader, std::move(c));
}

}  // namespace

Family GemmaFamily() {
  return {"gemma", "GemmaForCausalLM", ParseGemma, LlamaNames};
}
Family Gemma2Family() {
  return {"gemma2", "Gemma2ForCausalLM", ParseGemma2, NamesWithPostNorms};
}
Family Gemma3TextFamily() {
  return {"gemma3_text", "Gemma3ForCausalLM", ParseGemma3Text, NamesWithPostNorms};
}

}  // namespace attune
