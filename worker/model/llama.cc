#include "worker/model/llama.h"

#include "worker/model/config_reader.h"

namespace attune {
namespace {

absl::StatusOr<ModelConfig> ParseLlama(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "llama"};
  ReadSizes(&reader, {}, &c);
  ReadRope(&reader, {}, &c);
  c.qkv_bias = c.o_bias = reader.BoolOr("attention_bias", false);
  c.mlp_bias = reader.BoolOr("mlp_bias", false);
  return Finish(&reader, std::move(c));
}

}  // namespace

Family LlamaFamily() {
  return {"llama", "LlamaForCausalLM", ParseLlama, LlamaNames};
}

}  // namespace attune
