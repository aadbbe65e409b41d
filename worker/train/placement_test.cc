// The placement of Llama-3.1-8B on GPUs of many sizes: it fits, more memory is never slower, and
// what cannot fit is refused with what would.
#include "worker/train/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/job_spec.h"
#include "tests/parity/engine/golden_case.h"

namespace attune {
namespace {

using testing::HasSubstr;

EngineOptions Llama8B(int64_t micro_batch_tokens) {
  v1::JobSpec spec;
  spec.mutable_batch()->set_micro_batch_tokens(micro_batch_tokens);
  spec.mutable_lora()->set_dropout(0);
  ApplyDefaults("test", &spec);
  EngineOptions options{.device = DeviceKind::kCuda,
                        .dtype = DType::kBF16,
                        .deterministic = false,
                        .fused_lora = true,
                        .spec = spec};
  ModelConfig& c = options.model;
  c.vocab_size = 128256;
  c.hidden_size = 4096;
  c.num_layers = 32;
  c.num_heads = 32;
  c.num_kv_heads = 8;
  c.head_dim = 128;
  c.intermediate_size = 14336;
  WeightNames& names = options.names;
  names = {.embedding = "embedding", .final_norm = "norm", .head = "head"};
  names.norm = [](int64_t, BlockNorm) { return "norm"; };
  names.linear = [](int64_t layer, Linear linear) {
    return "layers." + std::to_string(layer) + ".linear" + std::to_string(static_cast<int>(linear));
  };
  options.adapters =
      SelectAdapters(c, names, {.r = 16, .alpha = 16, .target_modules = {"all-linear"}}).value();
  return options;
}

constexpr int64_t kGib = int64_t{1} << 30;
const DeviceRates kRates = RatesOf("NVIDIA H100");

// Every family's model is planned for a GPU: its shapes hold in every op, and its weights are known
// by their names.
class FamilyPlacementTest : public testing::TestWithParam<const char*> {};

TEST_P(FamilyPlacementTest, IsPlannedForAGpu) {
  GoldenCase golden = LoadGoldenCase(
      std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/engine/golden/" + GetParam(), DType::kBF16);
  golden.options.device = DeviceKind::kCuda;
  for (const bool fused : {false, true}) {
    EngineOptions options = golden.options;
    options.fused_lora = fused;
    const absl::StatusOr<v1::MemoryEstimate> memory = ChoosePlacement(
        {.device_bytes = kGib, .host_bytes = kGib}, kRates, /*mean_context=*/20, &options);
    ASSERT_TRUE(memory.ok()) << memory.status();
    const absl::StatusOr<v1::MemoryEstimate> read = Engine::Plan(options, *golden.weights);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(read->peak_bytes(), memory->peak_bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Families, FamilyPlacementTest, testing::ValuesIn(kFamilyCases));

TEST(PlacementTest, FitsAndIsNeverSlowerWithMoreMemory) {
  double before = 1e9;
  for (const int64_t gib : {9, 10, 12, 16, 24, 40, 78}) {
    EngineOptions options = Llama8B(2048);
    const absl::StatusOr<v1::MemoryEstimate> memory = ChoosePlacement(
        {.device_bytes = gib * kGib, .host_bytes = 64 * kGib}, kRates, 2048, &options);
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_LE(memory->peak_bytes(), gib * kGib);
    const double seconds = PredictMicroBatchSeconds(options, kRates, 2048);
    EXPECT_LE(seconds, before) << gib;
    before = seconds;
  }
}

TEST(PlacementTest, KeepsEverythingWhereThereIsRoom) {
  EngineOptions options = Llama8B(16384);
  ASSERT_TRUE(
      ChoosePlacement({.device_bytes = 78 * kGib, .host_bytes = 64 * kGib}, kRates, 2048, &options)
          .ok());
  EXPECT_TRUE(options.resident);
  EXPECT_EQ(options.activations.streams_on_host, 0);
  EXPECT_EQ(options.activations.gate_ups_rebuilt, 0);
}

TEST(PlacementTest, TakesNoMoreHostMemoryThanThereIs) {
  EngineOptions options = Llama8B(2048);
  const absl::StatusOr<v1::MemoryEstimate> memory =
      ChoosePlacement({.device_bytes = 10 * kGib, .host_bytes = 0}, kRates, 2048, &options);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->host_bytes(), 0);
  EXPECT_EQ(options.activations.streams_on_host, 0);
}

TEST(PlacementTest, TrainsInSixGibWithTheEmbeddingsOnTheHost) {
  EngineOptions options = Llama8B(2048);
  const absl::StatusOr<v1::MemoryEstimate> memory =
      ChoosePlacement({.device_bytes = 6 * kGib, .host_bytes = 64 * kGib}, kRates, 2048, &options);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_LE(memory->peak_bytes(), 6 * kGib);
  EXPECT_TRUE(options.embedding_on_host);
  EXPECT_THAT(memory->placement(), HasSubstr("embeddings in host memory"));
}

TEST(PlacementTest, RefusesWithWhatWouldFit) {
  EngineOptions options = Llama8B(65536);
  const absl::Status status =
      ChoosePlacement({.device_bytes = 12 * kGib, .host_bytes = 0}, kRates, 2048, &options)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("12.00 are there"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("batch.micro_batch_tokens: "));
}

}  // namespace
}  // namespace attune
