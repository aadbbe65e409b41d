#include "worker/model/qwen.h"

#include "worker/model/config_reader.h"

namespace attune {
namespace {

// Layers from max_window_layers on, where use_sliding_window is true.
void ReadWindows(ConfigReader* reader, ModelConfig* c) {
  const bool use = reader->BoolOr("use_sliding_window", false);
  const int64_t window = reader->IntegerOr("sliding_window", 1, int64_t{1} << 30, 0);
  const int64_t first = reader->IntegerOr("max_window_layers", 0, 1 << 20, 28);
  SetWindows(ReadSlidingLayers(reader, c->num_layers, [&](int64_t i) { return use && i >= first; }),
             use ? window : 0, c);
}

absl::StatusOr<ModelConfig> ParseQwen2(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "qwen2"};
  ReadSizes(&reader, {}, &c);
  ReadRope(&reader, {}, &c);
  ReadWindows(&reader, &c);
  c.qkv_bias = true;
  return Finish(&reader, std::move(c));
}

absl::StatusOr<ModelConfig> ParseQwen3(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "qwen3"};
  ReadSizes(&reader, {.head_dim = 128}, &c);
  ReadRope(&reader, {}, &c);
  ReadWindows(&reader, &c);
  c.qkv_bias = c.o_bias = reader.BoolOr("attention_bias", false);
  c.qk_norm = true;
  return Finish(&reader, std::move(c));
}

}  // namespace

Family Qwen2Family() {
  return {"qwen2", "Qwen2ForCausalLM", ParseQwen2, LlamaNames};
}
Family Qwen3Family() {
  return {"qwen3", "Qwen3ForCausalLM", ParseQwen3, LlamaNames};
}

}  // namespace attune
