#include "worker/model/config.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/model/llama.h"

namespace attune {

std::vector<float> RopeConfig::InverseFrequencies(int64_t head_dim) const {
  std::vector<float> frequencies(head_dim / 2);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    float f = 1.0f / std::pow(static_cast<float>(theta), exponent);
    if (scaling == RopeScaling::kLinear) f /= static_cast<float>(factor);
    if (scaling == RopeScaling::kLlama3) {
      // Long wavelengths are stretched by `factor`, short ones kept, those between blended.
      const float wavelength = static_cast<float>(2 * M_PI) / f;
      const double low = original_max_position / low_freq_factor;
      const double high = original_max_position / high_freq_factor;
      if (wavelength > low) {
        f /= static_cast<float>(factor);
      } else if (wavelength >= high) {
        const float smooth = (static_cast<float>(original_max_position) / wavelength -
                              static_cast<float>(low_freq_factor)) /
                             static_cast<float>(high_freq_factor - low_freq_factor);
        f = (1 - smooth) * f / static_cast<float>(factor) + smooth * f;
      }
    }
    frequencies[i] = f;
  }
  return frequencies;
}

LinearPlace PlaceOf(Linear linear) {
  switch (linear) {
    case Linear::kQ:
      return {0, 0};
    case Linear::kK:
      return {0, 1};
    case Linear::kV:
      return {0, 2};
    case Linear::kO:
      return {1, 0};
    case Linear::kGate:
      return {2, 0};
    case Linear::kUp:
      return {2, 1};
    case Linear::kDown:
      return {3, 0};
  }
  return {};
}

LinearShape ShapeOf(const ModelConfig& c, Linear linear) {
  switch (linear) {
    case Linear::kQ:
      return {c.q_size(), c.hidden_size};
    case Linear::kK:
    case Linear::kV:
      return {c.kv_size(), c.hidden_size};
    case Linear::kO:
      return {c.hidden_size, c.q_size()};
    case Linear::kGate:
    case Linear::kUp:
      return {c.intermediate_size, c.hidden_size};
    case Linear::kDown:
      return {c.hidden_size, c.intermediate_size};
  }
  return {};
}

int64_t CountParameters(const ModelConfig& c) {
  int64_t block = 2 * c.hidden_size;
  for (int i = 0; i < kLinears; ++i) {
    const LinearShape shape = ShapeOf(c, static_cast<Linear>(i));
    block += shape.in * shape.out;
  }
  const int64_t table = c.vocab_size * c.hidden_size;
  return block * c.num_layers + c.hidden_size + table * (c.tied_embeddings ? 1 : 2);
}

const std::vector<Family>& Families() {
  static const auto* const families = new std::vector<Family>{LlamaFamily()};
  return *families;
}

absl::StatusOr<const Family*> FindFamily(const nlohmann::json& config) {
  const auto type = config.find("model_type");
  if (type == config.end() || !type->is_string()) {
    return absl::InvalidArgumentError("config.json: model_type: is missing or no string");
  }
  std::vector<std::string> known;
  for (const Family& family : Families()) {
    if (*type == family.model_type) return &family;
    known.push_back(family.model_type);
  }
  return absl::UnimplementedError(
      absl::StrCat("config.json: model_type: `", type->get<std::string>(),
                   "` is no model family that attune trains; known: ", absl::StrJoin(known, ", ")));
}

}  // namespace attune
