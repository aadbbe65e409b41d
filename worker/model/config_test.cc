// What config.json of each family becomes, and what of it is refused by name.
#include "worker/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace attune {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json Base(const std::string& model_type) {
  return {{"model_type", model_type},  {"vocab_size", 100},
          {"hidden_size", 64},         {"intermediate_size", 96},
          {"num_hidden_layers", 4},    {"num_attention_heads", 4},
          {"num_key_value_heads", 2},  {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-6},      {"transformers_version", "4.51.0"},
          {"torch_dtype", "bfloat16"}, {"use_cache", true},
          {"bos_token_id", 1}};
}

absl::StatusOr<ModelConfig> Parse(const json& config) {
  absl::StatusOr<const Family*> family = FindFamily(config);
  if (!family.ok()) return family.status();
  return (*family)->parse(config);
}

ModelConfig Parsed(const json& config) {
  absl::StatusOr<ModelConfig> parsed = Parse(config);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? *parsed : ModelConfig();
}

std::vector<int64_t> Windows(const ModelConfig& c) {
  std::vector<int64_t> windows;
  for (int64_t i = 0; i < c.num_layers; ++i) windows.push_back(c.layer(i).window);
  return windows;
}

using Numbers = std::vector<int64_t>;

TEST(ConfigTest, FieldsThatNobodyReadsAreRefusedByName) {
  for (const Family& family : Families()) {
    SCOPED_TRACE(family.model_type);
    json config = Base(family.model_type);
    EXPECT_TRUE(Parse(config).ok()) << Parse(config).status();
    for (const json& value : {json(2), json(0.5), json(true), json::array({1}), json({{"a", 1}})}) {
      config["some_new_trick"] = value;
      const absl::Status status = Parse(config).status();
      EXPECT_TRUE(absl::IsUnimplemented(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("some_new_trick"));
    }
    for (const json& value : {json(), json(false), json("text"), json::array(), json::object()}) {
      config["some_new_trick"] = value;
      EXPECT_TRUE(Parse(config).ok()) << Parse(config).status();
    }
    config["quantization_config"] = {{"quant_method", "gptq"}};
    EXPECT_THAT(std::string(Parse(config).status().message()), HasSubstr("quantization_config"));
  }
}

TEST(ConfigTest, OfQuantisedCheckpointsThoseInNf4AreRead) {
  json config = Base("llama");
  EXPECT_FALSE(Parsed(config).nf4.has_value());
  config["quantization_config"] = {{"_load_in_4bit", true},
                                   {"_load_in_8bit", false},
                                   {"bnb_4bit_compute_dtype", "bfloat16"},
                                   {"bnb_4bit_quant_storage", "uint8"},
                                   {"bnb_4bit_quant_type", "nf4"},
                                   {"bnb_4bit_use_double_quant", true},
                                   {"llm_int8_enable_fp32_cpu_offload", false},
                                   {"llm_int8_has_fp16_weight", false},
                                   {"llm_int8_skip_modules", {"lm_head", "mlp"}},
                                   {"llm_int8_threshold", 6.0},
                                   {"load_in_4bit", true},
                                   {"load_in_8bit", false},
                                   {"quant_method", "bitsandbytes"}};
  const ModelConfig c = Parsed(config);
  ASSERT_TRUE(c.nf4.has_value());
  EXPECT_TRUE(c.nf4->double_quantization && c.IsNf4(3, Linear::kDown));
  config["quantization_config"].erase("bnb_4bit_use_double_quant");
  EXPECT_FALSE(Parsed(config).nf4->double_quantization);

  const auto error = [&](const char* name, const json& value) {
    json other = config;
    other["quantization_config"][name] = value;
    const absl::Status status = Parse(other).status();
    EXPECT_FALSE(status.ok()) << name;
    return std::string(status.message());
  };
  for (const char* method : {"gptq", "awq", "compressed-tensors", "fp8"}) {
    EXPECT_THAT(error("quant_method", method),
                HasSubstr(std::string("quant_method: `") + method + "` is not built"));
  }
  EXPECT_THAT(error("load_in_8bit", true), HasSubstr("load_in_8bit: int8"));
  EXPECT_THAT(error("load_in_4bit", false), HasSubstr("load_in_4bit: is not true"));
  EXPECT_THAT(error("bnb_4bit_quant_type", "fp4"), HasSubstr("`fp4` is not built; known: nf4"));
  EXPECT_THAT(error("bnb_4bit_compute_dtype", "int8"), HasSubstr("bnb_4bit_compute_dtype: `int8`"));
  EXPECT_THAT(error("bnb_4bit_quant_storage", "q"), HasSubstr("bnb_4bit_quant_storage: `q`"));
  EXPECT_THAT(error("bnb_4bit_use_double_quant", 2), HasSubstr("bnb_4bit_use_double_quant"));
  EXPECT_THAT(error("group_size", 128), HasSubstr("quantization_config.group_size"));
  config["quantization_config"].erase("bnb_4bit_quant_type");  // bitsandbytes' default
  EXPECT_THAT(std::string(Parse(config).status().message()), HasSubstr("`fp4` is not built"));
}

TEST(ConfigTest, UnknownNamesAreRefused) {
  json config = Base("mamba");
  EXPECT_THAT(std::string(Parse(config).status().message()),
              testing::AllOf(HasSubstr("`mamba`"), HasSubstr("known: "), HasSubstr("llama")));
  config = Base("llama");
  config["architectures"] = {"LlamaForSequenceClassification"};
  EXPECT_THAT(std::string(Parse(config).status().message()),
              HasSubstr("LlamaForSequenceClassification"));
  config["architectures"] = {"LLaMAForCausalLM"};
  EXPECT_TRUE(Parse(config).ok());
  config["hidden_act"] = "relu2";
  EXPECT_THAT(std::string(Parse(config).status().message()), HasSubstr("hidden_act: `relu2`"));
  config = Base("llama");
  config["rope_scaling"] = {{"type", "dynamic"}, {"factor", 2.0}};
  EXPECT_THAT(std::string(Parse(config).status().message()),
              HasSubstr("rope_scaling.rope_type: `dynamic`"));
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}, {"twist", 3}};
  EXPECT_THAT(std::string(Parse(config).status().message()), HasSubstr("rope_scaling.twist"));
}

TEST(ConfigTest, SizesThatDoNotFitAreRefused) {
  const auto error = [](const char* name, const json& value) {
    json config = Base("llama");
    config[name] = value;
    const absl::Status status = Parse(config).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(error("vocab_size", 0), HasSubstr("vocab_size: is 0"));
  EXPECT_THAT(error("hidden_size", "64"), HasSubstr("hidden_size"));
  EXPECT_THAT(error("hidden_size", 66), HasSubstr("num_attention_heads"));
  EXPECT_THAT(error("head_dim", 7), HasSubstr("head_dim"));
  EXPECT_THAT(error("num_key_value_heads", 3), HasSubstr("num_key_value_heads"));
  EXPECT_THAT(error("attention_bias", 1), HasSubstr("attention_bias"));
  EXPECT_THAT(error("head_dim", 514), HasSubstr("head_dim: is 514"));
}

TEST(ConfigTest, DropoutOfPretrainingIsSaidNotToBeApplied) {
  json config = Base("llama");
  EXPECT_TRUE(Parsed(config).warnings.empty());
  config["attention_dropout"] = 0.1;
  ASSERT_EQ(Parsed(config).warnings.size(), 1u);
  EXPECT_THAT(Parsed(config).warnings[0], HasSubstr("attention_dropout: 0.1"));
}

TEST(ConfigTest, RopeAsOldAndNewCheckpointsSpellIt) {
  json old_way = Base("llama"), new_way = Base("llama");
  old_way["rope_theta"] = 5e5;
  old_way["rope_scaling"] = {{"rope_type", "llama3"},
                             {"factor", 8.0},
                             {"low_freq_factor", 1.0},
                             {"high_freq_factor", 4.0},
                             {"original_max_position_embeddings", 1024}};
  new_way["rope_parameters"] = old_way["rope_scaling"];
  new_way["rope_parameters"]["rope_theta"] = 5e5;
  const ModelConfig a = Parsed(old_way), b = Parsed(new_way);
  EXPECT_EQ(a.ropes[0].scaling, RopeScaling::kLlama3);
  EXPECT_EQ(a.ropes[0].InverseFrequencies(16), b.ropes[0].InverseFrequencies(16));
  // Without it, the frequencies are others.
  old_way["rope_scaling"] = nullptr;
  EXPECT_NE(a.ropes[0].InverseFrequencies(16), Parsed(old_way).ropes[0].InverseFrequencies(16));
  new_way["rope_parameters"]["partial_rotary_factor"] = 0.5;
  EXPECT_EQ(Parsed(new_way).ropes[0].InverseFrequencies(16).size(), 4u);
}

TEST(ConfigTest, LlamaHasBiasesIfAsked) {
  json config = Base("llama");
  EXPECT_FALSE(Parsed(config).qkv_bias);
  config["attention_bias"] = true;
  EXPECT_TRUE(Parsed(config).qkv_bias && Parsed(config).o_bias && !Parsed(config).mlp_bias);
  config["mlp_bias"] = true;
  EXPECT_TRUE(Parsed(config).mlp_bias);
}

TEST(ConfigTest, Qwen2HasWindowsOnlyWhereTheyAreSwitchedOn) {
  json config = Base("qwen2");
  config["sliding_window"] = 7;
  config["max_window_layers"] = 3;
  config["use_sliding_window"] = false;
  EXPECT_EQ(Windows(Parsed(config)), (Numbers{0, 0, 0, 0}));
  EXPECT_TRUE(Parsed(config).qkv_bias && !Parsed(config).o_bias);
  config["use_sliding_window"] = true;
  EXPECT_EQ(Windows(Parsed(config)), (Numbers{0, 0, 0, 7}));
  config["layer_types"] = {"sliding_attention", "full_attention", "full_attention",
                           "full_attention"};
  EXPECT_EQ(Windows(Parsed(config)), (Numbers{7, 0, 0, 0}));
  config["layer_types"][2] = "linear_attention";
  EXPECT_THAT(std::string(Parse(config).status().message()),
              HasSubstr("layer_types: \"linear_attention\""));
}

TEST(ConfigTest, Qwen3HasNormsOfHeadsAndAHeadOf128) {
  const ModelConfig c = Parsed(Base("qwen3"));
  EXPECT_TRUE(c.qk_norm && !c.qkv_bias);
  EXPECT_EQ(c.head_dim, 128);
}

TEST(ConfigTest, MistralAndPhi3HaveTheirWindowInEveryLayer) {
  for (const char* type : {"mistral", "phi3"}) {
    json config = Base(type);
    config["sliding_window"] = nullptr;
    EXPECT_EQ(Windows(Parsed(config)), (Numbers{0, 0, 0, 0}));
    config["sliding_window"] = 9;
    EXPECT_EQ(Windows(Parsed(config)), (Numbers{9, 9, 9, 9}));
  }
  // Transformers ignores it for Mistral, whatever it says.
  json config = Base("mistral");
  config["layer_types"] = {"sliding_attention"};
  EXPECT_THAT(std::string(Parse(config).status().message()), HasSubstr("layer_types"));
}

TEST(ConfigTest, Phi3HasFusedModulesAndLongRope) {
  json config = Base("phi3");
  config["partial_rotary_factor"] = 0.75;
  config["original_max_position_embeddings"] = 1024;
  config["rope_scaling"] = {{"type", "su"},
                            {"short_factor", json::array({1, 1, 1, 1, 1, 2})},
                            {"long_factor", json::array({1, 2, 3, 4, 5, 6})}};
  const ModelConfig c = Parsed(config);
  EXPECT_TRUE(c.fused_modules);
  EXPECT_EQ(LinearsOf(c).size(), 4u);
  EXPECT_EQ(ShapeOf(c, Linear::kQkv).out, (4 + 2 * 2) * 16);
  const RopeConfig& rope = c.ropes[0];
  EXPECT_EQ(rope.RotaryDim(16), 12);
  EXPECT_EQ(rope.original_max_position, 1024);
  EXPECT_NEAR(rope.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(1024.0)), 1e-12);
  const std::vector<float> at_short = rope.InverseFrequencies(16),
                           at_long = rope.InverseFrequencies(16, /*is_long=*/true);
  EXPECT_FLOAT_EQ(at_short[5], 3 * at_long[5]);
  config["rope_scaling"]["long_factor"].push_back(7);
  EXPECT_THAT(std::string(Parse(config).status().message()),
              HasSubstr("rope_scaling.long_factor: must be a list of 6"));
}

TEST(ConfigTest, GemmasHaveTheirScalesAndTiedEmbeddings) {
  json config = Base("gemma");
  config["hidden_act"] = "gelu";
  ModelConfig c = Parsed(config);
  EXPECT_EQ(c.activation, Activation::kGeluTanh);
  EXPECT_TRUE(c.tied_embeddings && c.norm_weight_offset == 1 && c.embedding_scale == 8);
  config["hidden_act"] = "silu";
  EXPECT_THAT(std::string(Parse(config).status().message()), HasSubstr("hidden_act"));
  config["hidden_act"] = "gelu";
  config["use_bidirectional_attention"] = true;
  EXPECT_THAT(std::string(Parse(config).status().message()),
              HasSubstr("use_bidirectional_attention"));

  config = Base("gemma2");
  config["query_pre_attn_scalar"] = 144;
  config["attn_logit_softcapping"] = 50.0;
  config["final_logit_softcapping"] = 30.0;
  config["sliding_window"] = 5;
  c = Parsed(config);
  EXPECT_TRUE(c.post_norms && !c.qk_norm);
  EXPECT_EQ(c.attention_scale, 1.0 / 12);
  EXPECT_EQ(c.attention_softcap, 50);
  EXPECT_EQ(c.logit_softcap, 30);
  EXPECT_EQ(Windows(c), (Numbers{5, 0, 5, 0}));
}

TEST(ConfigTest, Gemma3HasTwoRopesAsOldAndNewCheckpointsSpellThem) {
  json old_way = Base("gemma3_text"), new_way = Base("gemma3_text");
  for (json* config : {&old_way, &new_way}) {
    (*config)["sliding_window"] = 5;
    (*config)["sliding_window_pattern"] = 3;
  }
  old_way["rope_theta"] = 1e6;
  old_way["rope_local_base_freq"] = 2e4;
  old_way["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  new_way["rope_parameters"] = {
      {"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 1e6}}},
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 2e4}}}};
  for (const json& config : {old_way, new_way}) {
    const ModelConfig c = Parsed(config);
    EXPECT_TRUE(c.post_norms && c.qk_norm);
    EXPECT_EQ(Windows(c), (Numbers{5, 5, 0, 5}));
    ASSERT_EQ(c.ropes.size(), 2u);
    EXPECT_EQ(c.layer(0).rope, 1);
    EXPECT_EQ(c.layer(2).rope, 0);
    EXPECT_EQ(c.ropes[0].theta, 1e6);
    EXPECT_EQ(c.ropes[0].factor, 8);
    EXPECT_EQ(c.ropes[1].theta, 2e4);
    EXPECT_EQ(c.ropes[1].scaling, RopeScaling::kNone);
  }
  // Transformers keeps the field and does nothing with it.
  old_way["attn_logit_softcapping"] = 50.0;
  EXPECT_THAT(std::string(Parse(old_way).status().message()), HasSubstr("attn_logit_softcapping"));
}

TEST(ConfigTest, GraniteHasItsMultipliers) {
  json config = Base("granite");
  config["embedding_multiplier"] = 12.0;
  config["residual_multiplier"] = 0.22;
  config["attention_multiplier"] = 0.015625;
  config["logits_scaling"] = 8.0;
  const ModelConfig c = Parsed(config);
  EXPECT_EQ(c.embedding_scale, 12);
  EXPECT_EQ(c.residual_scale, 0.22);
  EXPECT_EQ(c.attention_scale, 0.015625);
  EXPECT_EQ(c.logit_scale, 0.125);
  // Without it, scores are not scaled at all.
  EXPECT_EQ(Parsed(Base("granite")).attention_scale, 1);
}

TEST(ConfigTest, SmolLm3HasLayersWithoutRope) {
  json config = Base("smollm3");
  const auto ropes = [&] {
    const ModelConfig c = Parsed(config);
    Numbers out;
    for (int64_t i = 0; i < c.num_layers; ++i) out.push_back(c.layer(i).rope);
    return out;
  };
  EXPECT_EQ(ropes(), (Numbers{0, 0, 0, -1}));
  config["no_rope_layer_interval"] = 2;
  EXPECT_EQ(ropes(), (Numbers{0, -1, 0, -1}));
  config["no_rope_layers"] = {0, 1, 1, 1};
  EXPECT_EQ(ropes(), (Numbers{-1, 0, 0, 0}));
  config["use_sliding_window"] = true;
  config["sliding_window"] = 6;
  EXPECT_EQ(Windows(Parsed(config)), (Numbers{6, 0, 0, 0}));
}

}  // namespace
}  // namespace attune
