#include "worker/model/smollm3.h"

#include "worker/model/config_reader.h"

namespace attune {
namespace {

constexpr ConfigDefaults kSmolLm3Defaults = {.tied_embeddings = true, .rope_theta = 2e6};

// no_rope_layers: 1 where there is rope.
std::vector<bool> ReadRopeLayers(ConfigReader* reader, int64_t layers) {
  const int64_t interval = reader->IntegerOr("no_rope_layer_interval", 1, 4096, 4);
  std::vector<bool> rope(static_cast<size_t>(layers));
  const nlohmann::json* list = reader->List("no_rope_layers", static_cast<size_t>(layers));
  for (int64_t i = 0; i < layers; ++i) {
    rope[i] = list == nullptr ? (i + 1) % interval != 0 : (*list)[i] == 1;
  }
  return rope;
}

absl::StatusOr<ModelConfig> ParseSmolLm3(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "smollm3"};
  ReadSizes(&reader, kSmolLm3Defaults, &c);
  ReadRope(&reader, kSmolLm3Defaults, &c);
  c.qkv_bias = c.o_bias = reader.BoolOr("attention_bias", false);
  c.mlp_bias = reader.BoolOr("mlp_bias", false);
  const std::vector<bool> rope = ReadRopeLayers(&reader, c.num_layers);
  reader.Has("max_window_layers");  // of Qwen, where the file comes from
  const bool use_window = reader.BoolOr("use_sliding_window", false);
  const int64_t window = reader.IntegerOr("sliding_window", 1, int64_t{1} << 30, 0);
  SetWindows(ReadSlidingLayers(&reader, c.num_layers,
                               [&](int64_t i) { return use_window && window > 0 && !rope[i]; }),
             use_window ? window : 0, &c);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (!rope[i]) c.layers[i].rope = LayerConfig::kNoRope;
  }
  return Finish(&reader, std::move(c));
}

}  // namespace

Family SmolLm3Family() {
  return {"smollm3", "SmolLM3ForCausalLM", ParseSmolLm3, LlamaNames};
}

}  // namespace attune
