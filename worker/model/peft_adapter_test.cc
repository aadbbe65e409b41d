// adapter_config.json as PEFT writes it: what is read of it, and what is refused by its name.
#include "worker/model/peft_adapter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/parity/engine/golden_folder.h"
#include "worker/io/file.h"
#include "worker/io/json.h"

namespace attune {
namespace {

using testing::HasSubstr;

class PeftConfigTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = *CreateTempDirectory(testing::TempDir(), "peft-");
    for (const char* name : {"/adapter_config.json", "/adapter_model.safetensors"}) {
      const std::string bytes = *ReadFile(kGolden + "dense/adapter" + name);
      ASSERT_TRUE(WriteFileAtomic(directory_ + name, bytes).ok());
    }
  }
  void TearDown() override { RemoveTree(directory_).IgnoreError(); }

  // Of the golden adapter (rank 4, alpha 6, on seven linears of two layers) with changes.
  absl::StatusOr<PeftConfig> Read(const Json& changes) {
    Json config = *ReadJsonFile(kGolden + "dense/adapter/adapter_config.json");
    config.update(changes);
    EXPECT_TRUE(WriteFileAtomic(directory_ + "/adapter_config.json", config.dump()).ok());
    return ReadPeftConfig(directory_);
  }
  std::string ErrorOf(const Json& changes) {
    const absl::Status status = Read(changes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << changes;
    return std::string(status.message());
  }
  std::string directory_;
};

TEST_F(PeftConfigTest, PatternsThatGiveAllModulesTheSameAreRead) {
  const PeftConfig plain = Read(Json::object()).value();
  const auto expect = [&](const Json& changes, int64_t r, double alpha) {
    const absl::StatusOr<PeftConfig> config = Read(changes);
    ASSERT_TRUE(config.ok()) << changes << config.status();
    EXPECT_EQ(config->r, r) << changes;
    EXPECT_EQ(config->alpha, alpha) << changes;
  };
  expect({{"rank_pattern", Json::object()}, {"alpha_pattern", nullptr}}, plain.r, plain.alpha);
  // Of modules that are not there; of some, what the others have; of all.
  expect({{"rank_pattern", {{"other_proj", 9}, {"proj", 9}}}}, plain.r, plain.alpha);
  expect({{"rank_pattern", {{"q_proj", plain.r}, {"model.layers.0.self_attn.k_proj", plain.r}}}},
         plain.r, plain.alpha);
  expect({{"r", 64},
          {"lora_alpha", 1},
          {"rank_pattern",
           {{"q_proj", 4},
            {"k_proj", 4},
            {"v_proj", 4},
            {"o_proj", 4},
            {"gate_proj", 4},
            {"up_proj", 4},
            {"down_proj", 4}}},
          {"alpha_pattern",
           {{"q_proj", 2.5},
            {"k_proj", 2.5},
            {"v_proj", 2.5},
            {"o_proj", 2.5},
            {"gate_proj", 2.5},
            {"mlp.up_proj", 2.5},
            {"down_proj", 2.5}}}},
         4, 2.5);
}

TEST_F(PeftConfigTest, PatternsThatDifferAreRefusedWithTheModules) {
  EXPECT_THAT(ErrorOf({{"rank_pattern", {{"q_proj", 9}}}}),
              HasSubstr("rank_pattern gives model.layers.0.mlp.down_proj 4 and "
                        "model.layers.0.self_attn.q_proj 9; one for all modules is built"));
  EXPECT_THAT(ErrorOf({{"alpha_pattern", {{"^model.layers.1.mlp.up_proj", 9}}}}),
              HasSubstr("model.layers.1.mlp.up_proj 9"));
  EXPECT_THAT(ErrorOf({{"rank_pattern", {{"layers.[01].*", 9}}}}),
              HasSubstr("is of a regular expression"));
}

TEST_F(PeftConfigTest, WhatIsNotBuiltIsRefusedByName) {
  const Json changes = {{"bias", "lora_only"},
                        {"lora_bias", true},
                        {"fan_in_fan_out", true},
                        {"layers_to_transform", {0}},
                        {"exclude_modules", {"q_proj"}},
                        {"alora_invocation_tokens", {1, 2}},
                        {"use_qalora", true},
                        {"layer_replication", Json::array({{0, 1}})}};
  for (const auto& [field, value] : changes.items()) {
    EXPECT_THAT(ErrorOf({{field, value}}), HasSubstr("adapter_config.json: " + field + " is "));
  }
}

}  // namespace
}  // namespace attune
