#include "worker/model/config.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/model/gemma.h"
#include "worker/model/granite.h"
#include "worker/model/llama.h"
#include "worker/model/mistral.h"
#include "worker/model/phi3.h"
#include "worker/model/qwen.h"
#include "worker/model/smollm3.h"

namespace attune {
namespace {

// Long wavelengths are stretched by `factor`, short ones kept, those between blended.
float ScaleLlama3(const RopeConfig& rope, float f) {
  const float wavelength = static_cast<float>(2 * M_PI) / f;
  const auto original = static_cast<double>(rope.original_max_position);
  if (wavelength > original / rope.low_freq_factor) return f / static_cast<float>(rope.factor);
  if (wavelength < original / rope.high_freq_factor) return f;
  const float smooth =
      (static_cast<float>(original) / wavelength - static_cast<float>(rope.low_freq_factor)) /
      static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * f / static_cast<float>(rope.factor) + smooth * f;
}

// YaRN (Peng et al., 2023): pairs that turn often over the original context are kept, those that
// turn seldom are stretched, with a ramp between.
float YarnFrequency(const RopeConfig& rope, int64_t R, int64_t i, float power) {
  const auto dim = static_cast<double>(R);
  const auto pair_of = [&](double turns) {  // the pair that turns so often
    return dim * std::log(static_cast<double>(rope.original_max_position) / (turns * 2 * M_PI)) /
           (2 * std::log(rope.theta));
  };
  double low = pair_of(rope.beta_fast), high = pair_of(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  const auto ramp =
      static_cast<float>(std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0));
  return 1.0f / (static_cast<float>(rope.factor) * power) * ramp + 1.0f / power * (1 - ramp);
}

}  // namespace

std::vector<float> RopeConfig::InverseFrequencies(int64_t head_dim, bool is_long) const {
  const int64_t R = RotaryDim(head_dim);
  std::vector<float> frequencies(R / 2);
  for (int64_t i = 0; i < R / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(R);
    const float power = std::pow(static_cast<float>(theta), exponent);
    float f = 1.0f / power;
    switch (scaling) {
      case RopeScaling::kNone:
        break;
      case RopeScaling::kLinear:
        f /= static_cast<float>(factor);
        break;
      case RopeScaling::kLlama3:
        f = ScaleLlama3(*this, f);
        break;
      case RopeScaling::kYarn:
        f = YarnFrequency(*this, R, i, power);
        break;
      case RopeScaling::kLongRope:
        f = 1.0f / (static_cast<float>((is_long ? long_factors : short_factors)[i]) * power);
        break;
    }
    frequencies[i] = f;
  }
  return frequencies;
}

absl::Span<const Linear> LinearsOf(const ModelConfig& config) {
  static constexpr Linear kApart[] = {Linear::kQ,    Linear::kK,  Linear::kV,   Linear::kO,
                                      Linear::kGate, Linear::kUp, Linear::kDown};
  static constexpr Linear kFused[] = {Linear::kQkv, Linear::kO, Linear::kGateUp, Linear::kDown};
  if (config.fused_modules) return kFused;
  return kApart;
}

LinearPlace PlaceOf(Linear linear) {
  switch (linear) {
    case Linear::kQ:
    case Linear::kQkv:
      return {0, 0};
    case Linear::kK:
      return {0, 1};
    case Linear::kV:
      return {0, 2};
    case Linear::kO:
      return {1, 0};
    case Linear::kGate:
    case Linear::kGateUp:
      return {2, 0};
    case Linear::kUp:
      return {2, 1};
    case Linear::kDown:
      return {3, 0};
  }
  return {};
}

std::vector<BlockNorm> NormsOf(const ModelConfig& config) {
  std::vector<BlockNorm> norms = {BlockNorm::kAttention, BlockNorm::kMlp};
  if (config.post_norms) {
    norms.insert(norms.end(), {BlockNorm::kPostAttention, BlockNorm::kPostMlp});
  }
  if (config.qk_norm) norms.insert(norms.end(), {BlockNorm::kQ, BlockNorm::kK});
  return norms;
}

LinearShape ShapeOf(const ModelConfig& c, Linear linear) {
  switch (linear) {
    case Linear::kQ:
      return {c.q_size(), c.hidden_size};
    case Linear::kK:
    case Linear::kV:
      return {c.kv_size(), c.hidden_size};
    case Linear::kQkv:
      return {c.q_size() + 2 * c.kv_size(), c.hidden_size};
    case Linear::kO:
      return {c.hidden_size, c.q_size()};
    case Linear::kGate:
    case Linear::kUp:
      return {c.intermediate_size, c.hidden_size};
    case Linear::kGateUp:
      return {2 * c.intermediate_size, c.hidden_size};
    case Linear::kDown:
      return {c.hidden_size, c.intermediate_size};
  }
  return {};
}

int64_t SizeOf(const ModelConfig& c, BlockNorm norm) {
  return norm == BlockNorm::kQ || norm == BlockNorm::kK ? c.head_dim : c.hidden_size;
}

bool HasBias(const ModelConfig& c, Linear linear) {
  switch (PlaceOf(linear).matrix) {
    case 0:
      return c.qkv_bias;
    case 1:
      return c.o_bias;
    default:
      return c.mlp_bias;
  }
}

std::vector<WeightShape> WeightShapes(const ModelConfig& c, const WeightNames& names) {
  std::vector<WeightShape> shapes = {{names.embedding, {c.vocab_size, c.hidden_size}},
                                     {names.final_norm, {c.hidden_size}}};
  if (!c.tied_embeddings) shapes.push_back({names.head, {c.vocab_size, c.hidden_size}});
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    for (BlockNorm norm : NormsOf(c))
      shapes.push_back({names.norm(layer, norm), {SizeOf(c, norm)}});
    for (Linear linear : LinearsOf(c)) {
      const LinearShape shape = ShapeOf(c, linear);
      const std::string module = names.linear(layer, linear);
      shapes.push_back({absl::StrCat(module, ".weight"), {shape.out, shape.in}});
      if (HasBias(c, linear)) shapes.push_back({absl::StrCat(module, ".bias"), {shape.out}});
    }
  }
  return shapes;
}

int64_t CountParameters(const ModelConfig& config, const WeightNames& names) {
  int64_t count = 0;
  for (const WeightShape& weight : WeightShapes(config, names)) {
    int64_t elements = 1;
    for (int64_t extent : weight.shape) elements *= extent;
    count += elements;
  }
  return count;
}

const std::vector<Family>& Families() {
  static const auto* const families = new std::vector<Family>{
      LlamaFamily(), Qwen2Family(),  Qwen3Family(),      MistralFamily(), Phi3Family(),
      GemmaFamily(), Gemma2Family(), Gemma3TextFamily(), GraniteFamily(), SmolLm3Family()};
  return *families;
}

absl::StatusOr<const Family*> FindFamily(const nlohmann::json& config) {
  const auto type = config.find("model_type");
  if (type == config.end() || !type->is_string()) {
    return absl::InvalidArgumentError("config.json: model_type: is missing or no string");
  }
  std::vector<std::string> known;
  for (const Family& family : Families()) {
    known.push_back(family.model_type);
    if (*type != family.model_type) continue;
    const auto found = config.find("architectures");
    if (found == config.end() || !found->is_array() || found->empty()) return &family;
    for (const auto& name : *found) {
      if (name.is_string() &&
          absl::EqualsIgnoreCase(name.get<std::string>(), family.architecture)) {
        return &family;
      }
    }
    return absl::UnimplementedError(absl::StrCat("config.json: architectures: ", found->dump(),
                                                 " is not built; of `", family.model_type,
                                                 "`, attune trains ", family.architecture));
  }
  return absl::UnimplementedError(
      absl::StrCat("config.json: model_type: `", type->get<std::string>(),
                   "` is no model family that attune trains; known: ", absl::StrJoin(known, ", ")));
}

}  // namespace attune
