#include "worker/model/granite.h"

#include "worker/model/config_reader.h"

namespace attune {
namespace {

absl::StatusOr<ModelConfig> ParseGranite(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "granite"};
  ReadSizes(&reader, {}, &c);
  ReadRope(&reader, {}, &c);
  c.qkv_bias = c.o_bias = reader.BoolOr("attention_bias", false);
  c.mlp_bias = reader.BoolOr("mlp_bias", false);
  c.embedding_scale = reader.NumberOr("embedding_multiplier", 1e-9, 1e9, 1);
  c.residual_scale = reader.NumberOr("residual_multiplier", 1e-9, 1e9, 1);
  c.attention_scale = reader.NumberOr("attention_multiplier", 1e-9, 1e9, 1);
  c.logit_scale = 1 / reader.NumberOr("logits_scaling", 1e-9, 1e9, 1);
  return Finish(&reader, std::move(c));
}

}  // namespace

Family GraniteFamily() {
  return {"granite", "GraniteForCausalLM", ParseGranite, LlamaNames};
}

}  // namespace attune
