#include "worker/model/mistral.h"

#include "worker/model/config_reader.h"

namespace attune {
namespace {

absl::StatusOr<ModelConfig> ParseMistral(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "mistral"};
  ReadSizes(&reader, {}, &c);
  ReadRope(&reader, {}, &c);
  const int64_t window = reader.IntegerOr("sliding_window", 1, int64_t{1} << 30, 0);
  SetWindows(std::vector<bool>(static_cast<size_t>(c.num_layers), true), window, &c);
  return Finish(&reader, std::move(c));
}

}  // namespace

Family MistralFamily() {
  return {"mistral", "MistralForCausalLM", ParseMistral, LlamaNames};
}

}  // namespace attune
