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

EngineOptions Llama8B(int64_t micro_batch_tokens, int64_t r = 16) {
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
      SelectAdapters(c, names,
                     {.r = r, .alpha = static_cast<double>(r), .target_modules = {"all-linear"}})
          .value();
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

// Room for gate and up of one layer more (0.22 GiB) saves the time to compute them again, whatever
// the steps of the search.
TEST(PlacementTest, UsesTheMemoryOfEachLayer) {
  double before = 1e9;
  for (int64_t mib = 7 * 1024; mib <= 11 * 1024; mib += 256) {
    EngineOptions options = Llama8B(4096);
    ASSERT_TRUE(ChoosePlacement({.device_bytes = mib << 20, .host_bytes = 64 * kGib}, kRates, 2048,
                                &options)
                    .ok());
    const double seconds = PredictMicroBatchSeconds(options, kRates, 2048);
    EXPECT_LT(seconds, before - 0.8e-3) << mib << " MiB";
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

// One document of so many tokens, with r 32.
struct LongContext {
  int64_t tokens, device_bytes;
};
class LongContextTest : public testing::TestWithParam<LongContext> {};

TEST_P(LongContextTest, Fits) {
  const auto [tokens, device_bytes] = GetParam();
  constexpr int64_t kHostBytes = 100 * kGib;
  EngineOptions options = Llama8B(tokens, /*r=*/32);
  const absl::StatusOr<v1::MemoryEstimate> memory =
      ChoosePlacement({.device_bytes = device_bytes, .host_bytes = kHostBytes}, kRates,
                      static_cast<double>(tokens), &options);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_LE(memory->peak_bytes(), device_bytes);
  EXPECT_LE(memory->host_bytes(), kHostBytes);
  EXPECT_GT(memory->tokens_per_s(), 0);
  std::printf("%lld tokens: peak %.2f GiB, host %.2f GiB, %.0f tok/s: %s\n",
              static_cast<long long>(tokens), static_cast<double>(memory->peak_bytes()) / kGib,
              static_cast<double>(memory->host_bytes()) / kGib, memory->tokens_per_s(),
              memory->placement().c_str());
}

INSTANTIATE_TEST_SUITE_P(Sizes, LongContextTest,
                         testing::Values(LongContext{65536, kGib * 231 / 10},
                                         LongContext{78592, 24'000'000'000},
                                         LongContext{342784, 80'000'000'000}));

// Attention's own backward is slower for long documents, and needs less memory.
TEST(PlacementTest, EqualBitsCostTimeAndNoMemory) {
  EngineOptions options = Llama8B(16384);
  const PlacementLimits limits{.device_bytes = 78 * kGib, .host_bytes = 64 * kGib};
  const absl::StatusOr<v1::MemoryEstimate> any = ChoosePlacement(limits, kRates, 16384, &options);
  options.deterministic = true;
  const absl::StatusOr<v1::MemoryEstimate> equal = ChoosePlacement(limits, kRates, 16384, &options);
  ASSERT_TRUE(any.ok() && equal.ok());
  EXPECT_LT(equal->tokens_per_s(), any->tokens_per_s());
  EXPECT_GT(equal->tokens_per_s(), 0.8 * any->tokens_per_s());
  EXPECT_LE(equal->peak_bytes(), any->peak_bytes());
}

// What was measured on an H100 (docs/benchmarks.md), within 10 %.
struct MeasuredRow {
  int64_t tokens, context;
  bool resident;
  ActivationPolicy activations;
  bool embedding_on_host;
  double tokens_per_s;
  bool fp8 = false;
};
class SpeedModelTest : public testing::TestWithParam<MeasuredRow> {};

TEST_P(SpeedModelTest, IsWithinTenPercentOfWhatWasMeasured) {
  const MeasuredRow& row = GetParam();
  EngineOptions options = Llama8B(row.tokens);
  options.resident = row.resident;
  options.activations = row.activations;
  options.embedding_on_host = row.embedding_on_host;
  options.logits_bytes = int64_t{128} << 20;
  options.spec.mutable_quantization()->set_fp8_products(row.fp8);
  const double predicted =
      static_cast<double>(row.tokens) /
      PredictMicroBatchSeconds(options, kRates, static_cast<double>(row.context));
  EXPECT_NEAR(predicted, row.tokens_per_s, 0.1 * row.tokens_per_s);
}

INSTANTIATE_TEST_SUITE_P(H100, SpeedModelTest,
                         testing::Values(MeasuredRow{16384, 2048, true, {}, false, 17881},
                                         MeasuredRow{16384, 8192, true, {}, false, 14901},
                                         MeasuredRow{4096, 2048, true, {}, false, 16801},
                                         MeasuredRow{4096, 2048, false, {}, false, 15716},
                                         MeasuredRow{2048, 2048, false, {}, false, 14536},
                                         MeasuredRow{2048, 2048, false, {0, 24, 0}, false, 14170},
                                         MeasuredRow{2048, 2048, false, {20, 12, 20}, true, 12735},
                                         MeasuredRow{2048, 2048, false, {32, 4, 28}, true, 12083},
                                         MeasuredRow{32768, 32768, false, {32, 0, 32}, false, 8089},
                                         MeasuredRow{8192, 8192, false, {29, 8, 24}, true, 12359},
                                         MeasuredRow{4096, 2048, false, {21, 12, 10}, true, 14730},
                                         MeasuredRow{4096, 2048, false, {32, 5, 24}, true, 13810},
                                         MeasuredRow{2048, 2048, false, {32, 7, 14}, true, 13713},
                                         MeasuredRow{16384, 2048, true, {}, false, 26292, true},
                                         MeasuredRow{
                                             2048, 2048, false, {12, 8, 0}, true, 21438, true}));

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
