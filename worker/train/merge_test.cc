// Merging against a reference in double, file by file, and against digests of what PEFT merges
// (tests/parity/merge/check_merge.py).
#include "worker/train/merge.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "proto/sha256.h"
#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"
#include "worker/io/file.h"
#include "worker/io/json.h"
#include "worker/io/safetensors.h"
#include "worker/train/generator.h"

namespace attune {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class MergeTest : public testing::Test {
 protected:
  void SetUp() override { root_ = *CreateTempDirectory(testing::TempDir(), "merge-"); }
  void TearDown() override { RemoveTree(root_).IgnoreError(); }

  MergeOptions Options(const std::string& name) {
    return {.model_directory = kGolden + name + "/model",
            .adapter_directory = kGolden + name + "/adapter",
            .output_directory = root_ + "/merged"};
  }
  absl::StatusOr<MergeReport> Merge(const MergeOptions& options) {
    return MergeAdapter(options, [] {});
  }
  std::string root_;
};

std::vector<double> F32(const TensorInfo& info) {
  EXPECT_EQ(info.dtype, DType::kF32);
  std::vector<float> values(static_cast<size_t>(info.num_elements()));
  std::memcpy(values.data(), info.bytes.data(), info.bytes.size());
  return std::vector<double>(values.begin(), values.end());
}

TEST_F(MergeTest, EveryWeightIsBasePlusScaledProduct) {
  const absl::StatusOr<MergeReport> report = Merge(Options("rslora"));
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->merged, 7);
  EXPECT_EQ(report->shards, 1);
  const Checkpoint base = Checkpoint::Open(kGolden + "rslora/model").value();
  const Checkpoint merged = Checkpoint::Open(root_ + "/merged").value();
  const SafetensorsFile adapter =
      SafetensorsFile::Open(kGolden + "rslora/adapter/adapter_model.safetensors").value();
  EXPECT_EQ(merged.names(), base.names());
  const int64_t r = 3;
  const double scale = 5.0 / std::sqrt(3.0);
  int changed = 0;
  for (const std::string& name : base.names()) {
    const std::vector<double> got = F32(merged.Find(name).value());
    std::vector<double> want = F32(base.Find(name).value());
    const std::string module =
        "base_model.model." + name.substr(0, name.size() - std::strlen(".weight"));
    if (adapter.Contains(module + ".lora_A.weight")) {
      const std::vector<double> a = F32(adapter.Find(module + ".lora_A.weight").value());
      const std::vector<double> b = F32(adapter.Find(module + ".lora_B.weight").value());
      const int64_t K = static_cast<int64_t>(a.size()) / r;
      for (size_t i = 0; i < want.size(); ++i) {
        const int64_t row = static_cast<int64_t>(i) / K, column = static_cast<int64_t>(i) % K;
        for (int64_t k = 0; k < r; ++k) want[i] += scale * b[row * r + k] * a[k * K + column];
      }
      ++changed;
    }
    for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-6) << name;
  }
  EXPECT_EQ(changed, 7);
}

TEST_F(MergeTest, ShardsHaveAnIndexAndTheSameTensors) {
  MergeOptions options = Options("rslora");
  options.dtype = DType::kBF16;
  options.max_shard_bytes = 8000;
  const absl::StatusOr<MergeReport> report = Merge(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_GT(report->shards, 2);
  const Checkpoint base = Checkpoint::Open(options.model_directory).value();
  const Checkpoint merged = Checkpoint::Open(options.output_directory).value();
  EXPECT_EQ(merged.names(), base.names());
  EXPECT_EQ(static_cast<int64_t>(merged.files().size()), report->shards);
  int64_t bytes = 0;
  for (const std::string& name : merged.names()) {
    EXPECT_EQ(merged.Find(name)->dtype, DType::kBF16);
    bytes += static_cast<int64_t>(merged.Find(name)->bytes.size());
  }
  const Json index =
      ReadJsonFile(options.output_directory + "/model.safetensors.index.json").value();
  EXPECT_EQ(index["metadata"]["total_size"], bytes);
  const Json config = ReadJsonFile(options.output_directory + "/config.json").value();
  EXPECT_EQ(config["dtype"], "bfloat16");
  EXPECT_EQ(config["hidden_size"], 36);
}

TEST_F(MergeTest, Nf4ChangesTheLinearLayersAndNothingElse) {
  MergeOptions options = Options("nf4");  // its adapter is on q, v and down alone
  options.storage = WeightStorage::kNf4Double;
  ASSERT_TRUE(Merge(options).ok());
  const Checkpoint base = Checkpoint::Open(options.model_directory).value();
  const Checkpoint merged = Checkpoint::Open(options.output_directory).value();
  for (const std::string& name : base.names()) {
    const bool linear = name.find("_proj.") != std::string::npos;
    EXPECT_EQ(F32(merged.Find(name).value()) != F32(base.Find(name).value()), linear) << name;
  }
}

// Relative error of the logits of a model without an adapter, from those of Transformers with one.
double LogitsError(const std::string& model, const GoldenCase& golden) {
  const std::unique_ptr<Generator> generator =
      Generator::Create({.model_directory = model}).value();
  const Pack& pack = golden.steps[0][0];
  const std::vector<float> expected = golden.Expected("logits.0");
  const int64_t V = generator->config().vocab_size;
  double error = 0, norm = 0;
  for (int32_t s = 0; s < pack.num_segments; ++s) {
    const int32_t begin = pack.q_begin[s], end = pack.q_begin[s + 1];
    const std::vector<float> logits =
        generator->NextLogits({pack.ids.data() + begin, static_cast<size_t>(end - begin)}).value();
    for (int64_t v = 0; v < V; ++v) {
      const double want = expected[static_cast<size_t>((end - 1) * V + v)];
      error += std::pow(logits[static_cast<size_t>(v)] - want, 2);
      norm += std::pow(want, 2);
    }
  }
  return std::sqrt(error / norm);
}

// Of a checkpoint that is NF4 already comes a dense one: its values with the adapter's.
TEST_F(MergeTest, AnNf4CheckpointIsExpanded) {
  for (const WeightStorage storage : {WeightStorage::kDense, WeightStorage::kNf4Double}) {
    for (const std::string name : {"nf4_llama", "nf4_qwen2", "nf4_phi3"}) {
      SCOPED_TRACE(name);
      MergeOptions options = Options(name);
      options.output_directory = root_ + "/" + name + std::to_string(static_cast<int>(storage));
      options.storage = storage;
      options.dtype = DType::kF32;
      ASSERT_TRUE(Merge(options).ok());
      const GoldenCase golden = LoadGoldenCase(kGolden + name, DType::kF32);
      EXPECT_LT(LogitsError(options.output_directory, golden), 2e-5);
      const Checkpoint merged = Checkpoint::Open(options.output_directory).value();
      std::vector<std::string> names;
      for (const WeightShape& weight : WeightShapes(golden.options.model, golden.options.names)) {
        names.push_back(weight.name);
      }
      std::sort(names.begin(), names.end());
      EXPECT_EQ(merged.names(), names);
      const Json config = ReadJsonFile(options.output_directory + "/config.json").value();
      EXPECT_FALSE(config.contains("quantization_config"));
    }
  }
}

// Tables trained in full, tied or not, and DoRA: the merged model is the base with the adapter.
TEST_F(MergeTest, WhatIsTrainedBesideAAndBIsMerged) {
  const struct {
    const char* name;
    bool head, tied;
  } cases[] = {{"modules", true, false},
               {"modules_head", true, false},
               {"modules_tied", false, true},
               {"dora", true, false},
               {"drawn_dora", true, false}};
  for (const auto& c : cases) {
    SCOPED_TRACE(c.name);
    MergeOptions options = Options(c.name);
    options.output_directory = root_ + "/" + c.name;
    options.dtype = DType::kF32;
    const GoldenCase golden = LoadGoldenCase(kGolden + c.name, DType::kF32);
    if (golden.json["nf4"].get<bool>()) options.storage = WeightStorage::kNf4Double;
    ASSERT_TRUE(Merge(options).ok());
    EXPECT_LT(LogitsError(options.output_directory, golden), 2e-5);
    const Checkpoint merged = Checkpoint::Open(options.output_directory).value();
    const auto& names = merged.names();
    EXPECT_EQ(std::find(names.begin(), names.end(), "lm_head.weight") != names.end(), c.head);
    const Json config = ReadJsonFile(options.output_directory + "/config.json").value();
    EXPECT_EQ(config.value("tie_word_embeddings", true), c.tied);
  }
}

// The bits of every tensor that is changed, in f32.
TEST_F(MergeTest, ValuesAreThoseOfPeft) {
  const Json golden =
      ReadJsonFile(std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/merge/golden.json").value();
  EXPECT_GE(golden.size(), 13u);
  for (const auto& [name, digests] : golden.items()) {
    MergeOptions options = Options(name);
    options.output_directory = root_ + "/" + name;
    options.dtype = DType::kF32;
    if (LoadGoldenCase(kGolden + name, DType::kF32).json["nf4"].get<bool>()) {
      options.storage = WeightStorage::kNf4Double;
    }
    ASSERT_TRUE(Merge(options).ok());
    const Checkpoint merged = Checkpoint::Open(options.output_directory).value();
    EXPECT_FALSE(digests.empty());
    for (const auto& [tensor, digest] : digests.items()) {
      const absl::Span<const uint8_t> bytes = merged.Find(tensor).value().bytes;
      EXPECT_EQ(Sha256Hex({reinterpret_cast<const char*>(bytes.data()), bytes.size()}), digest)
          << name << " " << tensor;
    }
  }
}

TEST_F(MergeTest, ATableOfAnotherModelIsRefused) {
  MergeOptions options = Options("modules");
  options.adapter_directory = kGolden + "modules_tied/adapter";
  const absl::Status status = Merge(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the adapter is of another model"));
  EXPECT_TRUE(fs::is_empty(root_));
}

TEST_F(MergeTest, AnNf4CheckpointBecomesOfTheTypeThatItHadBefore) {
  ASSERT_TRUE(Merge(Options("nf4_phi3")).ok());
  const Checkpoint merged = Checkpoint::Open(root_ + "/merged").value();
  for (const std::string& name : merged.names()) {
    EXPECT_EQ(merged.Find(name)->dtype, DType::kF16) << name;
  }
}

TEST_F(MergeTest, HalfPrecisionRoundsToNearest) {
  MergeOptions options = Options("rslora");
  options.dtype = DType::kF16;
  ASSERT_TRUE(Merge(options).ok());
  const Checkpoint base = Checkpoint::Open(options.model_directory).value();
  const TensorInfo wide = base.Find("model.embed_tokens.weight").value();
  const Checkpoint merged = Checkpoint::Open(options.output_directory).value();
  const TensorInfo narrow = merged.Find("model.embed_tokens.weight").value();
  ASSERT_EQ(narrow.dtype, DType::kF16);
  const std::vector<double> exact = F32(wide);
  for (size_t i = 0; i < exact.size(); ++i) {
    Float16 half;
    std::memcpy(&half, narrow.bytes.data() + 2 * i, 2);
    const double unit = std::ldexp(1.0, std::max(-24, std::ilogb(exact[i]) - 10));
    ASSERT_LE(std::abs(static_cast<double>(static_cast<float>(half)) - exact[i]), unit / 2) << i;
  }
}

TEST_F(MergeTest, AnAdapterOfAnotherModelIsRefusedAndNothingIsLeft) {
  MergeOptions options = Options("rslora");
  options.adapter_directory = kGolden + "dense/adapter";
  const absl::Status status = Merge(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the adapter is of another model"));
  EXPECT_TRUE(fs::is_empty(root_));
}

TEST_F(MergeTest, WhatIsThereIsNotOverwritten) {
  const MergeOptions options = Options("rslora");
  fs::create_directories(options.output_directory);
  ASSERT_TRUE(WriteFileAtomic(options.output_directory + "/mine", "x").ok());
  EXPECT_EQ(Merge(options).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(*ReadFile(options.output_directory + "/mine"), "x");
}

}  // namespace
}  // namespace attune
