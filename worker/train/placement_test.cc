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

EngineOptions JobOf(const ModelConfig& model, int64_t micro_batch_tokens, int64_t r) {
  v1::JobSpec spec;
  spec.mutable_batch()->set_micro_batch_tokens(micro_batch_tokens);
  spec.mutable_lora()->set_dropout(0);
  ApplyDefaults("test", &spec);
  EngineOptions options{.device = DeviceKind::kCuda,
                        .dtype = DType::kBF16,
                        .deterministic = false,
                        .fused_lora = true,
                        .model = model,
                        .spec = spec};
  WeightNames& names = options.names;
  names = {.embedding = "embedding", .final_norm = "norm", .head = "head"};
  names.norm = [](int64_t, BlockNorm) { return "norm"; };
  names.linear = [](int64_t layer, Linear linear) {
    return "layers." + std::to_string(layer) + ".linear" + std::to_string(static_cast<int>(linear));
  };
  options.adapters =
      SelectAdapters(model, names,
                     {.r = r, .alpha = static_cast<double>(r), .target_modules = {"all-linear"}})
          .value();
  return options;
}

EngineOptions Llama8B(int64_t micro_batch_tokens, int64_t r = 16) {
  return JobOf({.vocab_size = 128256,
                .hidden_size = 4096,
                .num_layers = 32,
                .num_heads = 32,
                .num_kv_heads = 8,
                .head_dim = 128,
                .intermediate_size = 14336},
               micro_batch_tokens, r);
}

EngineOptions Qwen600M(int64_t micro_batch_tokens, int64_t r = 16) {
  return JobOf({.vocab_size = 151936,
                .hidden_size = 1024,
                .num_layers = 28,
                .num_heads = 16,
                .num_kv_heads = 8,
                .head_dim = 128,
                .intermediate_size = 3072,
                .tied_embeddings = true,
                .qk_norm = true},
               micro_batch_tokens, r);
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
  for (int64_t mib = int64_t{7} * 1024; mib <= int64_t{11} * 1024; mib += 256) {
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

// With 2 GiB less of the host an MLP in tiles makes room on the device for another layer's
// projections, which else eight layers would compute again (0.5 % slower).
TEST(PlacementTest, TilesTheMlpWhereThatKeepsProjections) {
  EngineOptions options = Llama8B(65536, /*r=*/32);
  ASSERT_TRUE(ChoosePlacement({.device_bytes = kGib * 2305 / 100, .host_bytes = 62 * kGib},
                              RatesOf("NVIDIA H200"), 65536, &options)
                  .ok());
  EXPECT_EQ(options.activations.projections_rebuilt, 0);
  EXPECT_EQ(options.activations.mlp_tile, 16384);
}

// One document of 342,784 tokens: each layer that keeps what attention gave saves over a second of
// 290. The search found none beside expanded weights, in eighths of the layers (1.8 % slower).
TEST(PlacementTest, KeepsAttentionOfSingleLayers) {
  EngineOptions options = Llama8B(342784, /*r=*/32);
  ASSERT_TRUE(ChoosePlacement({.device_bytes = 80'000'000'000, .host_bytes = 64 * kGib},
                              RatesOf("NVIDIA H200"), 342784, &options)
                  .ok());
  EXPECT_FALSE(options.resident);
  EXPECT_LE(options.activations.layers_rebuilt, 28);
}

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

// What was measured (docs/benchmarks.md), and the commit that ran, or that noted it (5c40dd8).
struct MeasuredRow {
  const char* commit;
  int64_t tokens, context;
  bool resident;
  ActivationPolicy activations;
  bool embedding_on_host;
  double tokens_per_s;
  bool fp8 = false;
  int64_t r = 16;
  EngineOptions (*job)(int64_t, int64_t) = Llama8B;
};
class SpeedModelTest : public testing::TestWithParam<MeasuredRow> {
 protected:
  static double PredictedTokensPerSecond(const DeviceRates& rates) {
    const MeasuredRow& row = GetParam();
    EngineOptions options = row.job(row.tokens, row.r);
    options.resident = row.resident;
    options.activations = row.activations;
    options.embedding_on_host = row.embedding_on_host;
    options.spec.mutable_quantization()->set_fp8_products(row.fp8);
    return static_cast<double>(row.tokens) /
           PredictMicroBatchSeconds(options, rates, static_cast<double>(row.context));
  }
};

// Of several commits, the older ones with slower kernels.
class H100SpeedModelTest : public SpeedModelTest {};
TEST_P(H100SpeedModelTest, IsWithinTenPercentOfWhatWasMeasured) {
  const double measured = GetParam().tokens_per_s;
  EXPECT_NEAR(PredictedTokensPerSecond(kRates), measured, 0.1 * measured) << GetParam().commit;
}

// One H100 80GB HBM3 (2026-11-26).
INSTANTIATE_TEST_SUITE_P(
    Rows, H100SpeedModelTest,
    testing::Values(MeasuredRow{"669e8d4", 16384, 2048, true, {}, false, 17881},
                    MeasuredRow{"669e8d4", 16384, 8192, true, {}, false, 14901},
                    MeasuredRow{"f7654c7", 4096, 2048, true, {}, false, 16801},
                    MeasuredRow{"839049f", 4096, 2048, false, {}, false, 15716},
                    MeasuredRow{"839049f", 2048, 2048, false, {}, false, 14536},
                    MeasuredRow{"f7654c7", 2048, 2048, false, {0, 24, 0}, false, 14170},
                    MeasuredRow{"f7654c7", 2048, 2048, false, {20, 12, 20}, true, 12735},
                    MeasuredRow{"f7654c7", 2048, 2048, false, {32, 4, 28}, true, 12083},
                    MeasuredRow{
                        "f7654c7", 32768, 32768, false, {32, 0, 32}, false, 8089, false, 32},
                    MeasuredRow{"5c40dd8", 8192, 8192, false, {29, 8, 24}, true, 12359},
                    MeasuredRow{"5c40dd8", 4096, 2048, false, {21, 12, 10}, true, 14730},
                    MeasuredRow{"5c40dd8", 4096, 2048, false, {32, 5, 24}, true, 13810},
                    MeasuredRow{"5c40dd8", 2048, 2048, false, {32, 7, 14}, true, 13713},
                    MeasuredRow{"669e8d4", 16384, 2048, true, {}, false, 26292, true},
                    MeasuredRow{"669e8d4", 2048, 2048, false, {12, 8, 0}, true, 21438, true}));

class H200SpeedModelTest : public SpeedModelTest {};
TEST_P(H200SpeedModelTest, IsWithinFivePercentOfWhatWasMeasured) {
  const double measured = GetParam().tokens_per_s;
  EXPECT_NEAR(PredictedTokensPerSecond(RatesOf("NVIDIA H200")), measured, 0.05 * measured)
      << GetParam().commit;
}

// One H200 (2026-11-27-e-h200.json), and documents that fill their pack (2026-11-27-f-h200.json).
constexpr ActivationPolicy kHeadsSaved{.heads_saved = true};
INSTANTIATE_TEST_SUITE_P(
    Rows, H200SpeedModelTest,
    testing::Values(
        MeasuredRow{"428a7d9", 16384, 2048, true, {}, false, 18455},
        MeasuredRow{"428a7d9", 16384, 2048, true, {}, false, 27908, true},
        MeasuredRow{"428a7d9", 4096, 2048, true, {}, false, 18138},
        MeasuredRow{"428a7d9", 4096, 2048, false, {21, 11, 11}, true, 16114},
        MeasuredRow{"428a7d9", 2048, 2048, false, {0, 12, 0}, true, 23603, true},
        MeasuredRow{"428a7d9", 8192, 8192, false, {31, 5, 26}, true, 12916},
        MeasuredRow{"428a7d9", 4096, 2048, false, {31, 5, 25}, true, 14912},
        MeasuredRow{"428a7d9", 16384, 8192, true, {}, false, 15353},
        MeasuredRow{"428a7d9", 2048, 2048, false, {31, 6, 25}, true, 14150},
        MeasuredRow{"428a7d9", 16384, 2048, true, kHeadsSaved, false, 137262, false, 16, Qwen600M},
        MeasuredRow{"428a7d9", 4096, 2048, true, kHeadsSaved, false, 121677, false, 16, Qwen600M},
        MeasuredRow{
            "428a7d9", 32768, 32768, false, {32, 14, 18, 0, 0, 8192}, false, 8655, false, 32},
        MeasuredRow{"428a7d9", 65536, 65536, false, {31, 0, 32, 4}, false, 5491, false, 32},
        MeasuredRow{"428a7d9", 78592, 78592, false, {32, 0, 32, 16}, false, 4946, false, 32},
        // One step that was the first one, too: with the making of plans.
        MeasuredRow{
            "428a7d9", 342784, 342784, false, {24, 0, 32, 0, 32, 8192}, false, 1123, false, 32}));

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
