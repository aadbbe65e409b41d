#include "worker/model/phi3.h"

#include "worker/model/config_reader.h"

namespace attune {
namespace {

absl::StatusOr<ModelConfig> ParsePhi3(const nlohmann::json& json) {
  ConfigReader reader(json);
  ModelConfig c{.family = "phi3"};
  ReadSizes(&reader, {}, &c);
  ReadRope(&reader, {}, &c);
  const int64_t window = reader.IntegerOr("sliding_window", 1, int64_t{1} << 30, 0);
  SetWindows(std::vector<bool>(static_cast<size_t>(c.num_layers), true), window, &c);
  c.fused_modules = true;
  // Fields of Phi-4-mini's config.json that speak of models of the same name with other parts.
  for (const char* name : {"full_attn_mod", "interpolate_factor"}) {
    if (reader.NumberOr(name, 0, 1e9, 1) != 1) reader.Refuse(name, "only 1 is built");
  }
  return Finish(&reader, std::move(c));
}

}  // namespace

Family Phi3Family() {
  return {"phi3", "Phi3ForCausalLM", ParsePhi3, LlamaNames};
}

}  // namespace attune
