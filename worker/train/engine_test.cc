// Properties of the engine that need no oracle: gradients against finite differences in f64, the
// plan against the real arena, packing against documents alone.
#include "worker/train/engine.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"

namespace attune {
namespace {

double LossAt(Engine* engine, const GoldenStep& step) {
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  GoldenStep frozen = step;
  frozen.input.learning_rate = 0;
  return engine->TrainStep(frozen.input, frozen.packs, self.get(), [] {}).value().loss;
}

template <typename T>
std::vector<T> Download(const Engine& engine, const TensorView& view) {
  std::vector<T> values(view.size());
  CopyToHost(engine.context().exec, view, values.data());
  return values;
}

class GradientTest : public testing::TestWithParam<std::tuple<const char*, double>> {};

TEST_P(GradientTest, EqualsFiniteDifferencesInDouble) {
  const auto [name, dropout] = GetParam();
  GoldenCase golden = LoadGoldenCase(kGolden + name, DType::kF64);
  golden.options.spec.mutable_lora()->set_dropout(dropout);
  golden.options.spec.mutable_optimizer()->set_weight_decay(0);
  if (dropout > 0) {  // with everything else that training has, too
    golden.options.spec.mutable_sft()->set_label_smoothing_factor(0.1);
    golden.options.spec.mutable_sft()->set_z_loss_weight(0.01);
    golden.options.spec.mutable_sft()->set_neftune_noise_alpha(5);
  }
  std::unique_ptr<Engine> engine = StartEngine(golden);
  const GoldenStep step = StepOf(golden, 0);
  LossAt(engine.get(), step);
  const std::vector<double> grad = Download<double>(*engine, engine->adapters()->grad());
  const TensorView master = engine->adapters()->master();
  // Along random directions: every parameter takes part in each.
  uint64_t state = 7;
  for (int trial = 0; trial < 4; ++trial) {
    std::vector<double> direction(grad.size());
    double slope = 0;
    for (size_t i = 0; i < grad.size(); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      direction[i] = (static_cast<double>(state >> 33) / (1u << 30)) - 1;
      slope += direction[i] * grad[i];
    }
    constexpr double kStep = 1e-6;
    double side[2];
    double* const values = master.As<double>();
    for (int sign : {0, 1}) {
      const double h = sign ? kStep : -kStep;
      for (size_t i = 0; i < grad.size(); ++i) values[i] += h * direction[i];
      side[sign] = LossAt(engine.get(), step);
      for (size_t i = 0; i < grad.size(); ++i) values[i] -= h * direction[i];
    }
    const double numeric = (side[1] - side[0]) / (2 * kStep);
    EXPECT_NEAR(slope, numeric, 1e-6 * std::abs(numeric) + 1e-9);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GradientTest,
                         testing::Combine(testing::Values("dense", "nf4", "rslora"),
                                          testing::Values(0.0, 0.3)));
INSTANTIATE_TEST_SUITE_P(Families, GradientTest,
                         testing::Combine(testing::ValuesIn(kFamilyCases),
                                          testing::Values(0.0, 0.3)));

// The loss with smoothing, z-loss and noise is another one, its gradient is right, and an
// evaluation has none of them.
TEST(EngineTest, SmoothingZLossAndNoiseAreOfTrainingAlone) {
  GoldenCase golden = LoadGoldenCase(kGolden + "rslora", DType::kF64);
  const auto evaluate = [&] {
    std::unique_ptr<Engine> engine = StartEngine(golden);
    const GoldenStep step = StepOf(golden, 0);
    std::unique_ptr<Communicator> self = NewSelfCommunicator();
    return engine->Evaluate(step.packs, step.input.trained_tokens, self.get(), [] {}).value().loss;
  };
  const double plain = evaluate(), trained = LossAt(StartEngine(golden).get(), StepOf(golden, 0));
  EXPECT_NEAR(plain, trained, 1e-12);
  v1::SftSpec* sft = golden.options.spec.mutable_sft();
  sft->set_label_smoothing_factor(0.1);
  const double smooth = LossAt(StartEngine(golden).get(), StepOf(golden, 0));
  EXPECT_GT(std::abs(smooth - plain), 1e-3);
  sft->set_z_loss_weight(0.01);
  const double with_z = LossAt(StartEngine(golden).get(), StepOf(golden, 0));
  EXPECT_GT(with_z, smooth + 1e-3);
  sft->set_neftune_noise_alpha(20);
  EXPECT_GT(std::abs(LossAt(StartEngine(golden).get(), StepOf(golden, 0)) - with_z), 1e-4);
  EXPECT_EQ(evaluate(), plain);
}

class PlanTest : public testing::TestWithParam<std::tuple<const char*, DType>> {};

TEST_P(PlanTest, PeakOfThePlanIsThePeakOfTheRun) {
  const auto [name, dtype] = GetParam();
  const GoldenCase golden = LoadGoldenCase(kGolden + name, dtype);
  const v1::MemoryEstimate plan = Engine::Plan(golden.options, *golden.weights).value();
  std::unique_ptr<Engine> engine = StartEngine(golden);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  for (int s = 0; s < 2; ++s) {
    GoldenStep step = StepOf(golden, s);
    step.input.learning_rate = 1e-3;
    ASSERT_TRUE(engine->TrainStep(step.input, step.packs, self.get(), [] {}).ok());
    ASSERT_TRUE(engine->Evaluate(step.packs, step.input.trained_tokens, self.get(), [] {}).ok());
  }
  EXPECT_EQ(engine->peak_bytes(), plan.peak_bytes());
  EXPECT_GT(plan.weights_bytes(), 0);
  EXPECT_GT(plan.optimizer_bytes(), 0);
  EXPECT_EQ(plan.peak_phase(), "train");
}

INSTANTIATE_TEST_SUITE_P(Cases, PlanTest,
                         testing::Combine(testing::Values("dense", "nf4"),
                                          testing::Values(DType::kF32, DType::kBF16)));
INSTANTIATE_TEST_SUITE_P(Families, PlanTest,
                         testing::Combine(testing::ValuesIn(kFamilyCases),
                                          testing::Values(DType::kF32, DType::kBF16)));

class PackingTest : public testing::TestWithParam<const char*> {};

TEST_P(PackingTest, APackGivesWhatItsDocumentsGiveAlone) {
  const GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF64);
  std::unique_ptr<Engine> engine = StartEngine(golden);
  const GoldenStep together = StepOf(golden, 0);
  const double loss = LossAt(engine.get(), together);
  const std::vector<double> grad = Download<double>(*engine, engine->adapters()->grad());

  GoldenStep alone;
  alone.input = together.input;
  std::vector<Pack> packs;
  const Json& step = golden.json["steps"][0];
  for (const Json& documents : step) {
    for (const Json& document : documents) {
      packs.push_back(PackDocuments(Json::array({document}), golden.json["pack_tokens"]));
    }
  }
  ASSERT_GT(packs.size(), together.packs.size());
  for (const Pack& pack : packs) alone.packs.push_back({&pack, 0});
  EXPECT_NEAR(LossAt(engine.get(), alone), loss, 1e-12);
  const std::vector<double> grad_alone = Download<double>(*engine, engine->adapters()->grad());
  for (size_t i = 0; i < grad.size(); ++i) ASSERT_NEAR(grad_alone[i], grad[i], 1e-12) << i;
}

INSTANTIATE_TEST_SUITE_P(Cases, PackingTest, testing::Values("dense"));
INSTANTIATE_TEST_SUITE_P(Families, PackingTest, testing::ValuesIn(kFamilyCases));

// What one step gives: the loss and the adapters' gradients.
struct StepOutcome {
  double loss;
  std::vector<float> grad;
};
StepOutcome OneStep(const GoldenCase& golden) {
  std::unique_ptr<Engine> engine = StartEngine(golden);
  // Twice: buffers that travel are used again.
  LossAt(engine.get(), StepOf(golden, 1));
  const double loss = LossAt(engine.get(), StepOf(golden, 0));
  EXPECT_EQ(engine->peak_bytes(),
            Engine::Plan(golden.options, *golden.weights).value().peak_bytes());
  return {loss, Download<float>(*engine, engine->adapters()->grad())};
}

// |got - want| / |want| of the gradients, in the Euclidean norm.
double GradientError(const StepOutcome& got, const StepOutcome& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.grad.size(); ++i) {
    error += std::pow(got.grad[i] - want.grad[i], 2);
    norm += std::pow(want.grad[i], 2);
  }
  EXPECT_GT(norm, 0);
  return std::sqrt(error / norm);
}

class PlacesTest : public testing::TestWithParam<const char*> {};

TEST_P(PlacesTest, WhereActivationsAreKeptChangesNoBit) {
  GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
  const int64_t L = golden.options.model.num_layers;
  const StepOutcome kept = OneStep(golden);
  for (const ActivationPolicy& policy :
       {ActivationPolicy{L, 0, 0}, ActivationPolicy{0, L, 0}, ActivationPolicy{0, 0, L},
        ActivationPolicy{L, L, 0}, ActivationPolicy{L - 1, 1, L - 1}, ActivationPolicy{1, 0, 1}}) {
    golden.options.activations = policy;
    if (policy.gate_ups_rebuilt + policy.gate_ups_on_host > L) continue;
    const StepOutcome other = OneStep(golden);
    EXPECT_EQ(other.loss, kept.loss);
    EXPECT_EQ(other.grad, kept.grad) << policy.streams_on_host << " " << policy.gate_ups_on_host
                                     << " " << policy.gate_ups_rebuilt;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, PlacesTest, testing::Values("nf4"));
INSTANTIATE_TEST_SUITE_P(Families, PlacesTest, testing::ValuesIn(kFamilyCases));

TEST(EngineTest, EmbeddingsOnTheHostChangeNoBit) {
  GoldenCase golden = LoadGoldenCase(kGolden + "dense", DType::kF32);
  ASSERT_FALSE(golden.options.model.tied_embeddings);
  const int64_t bytes = Engine::Plan(golden.options, *golden.weights).value().peak_bytes();
  const StepOutcome on_device = OneStep(golden);
  golden.options.embedding_on_host = true;
  const StepOutcome on_host = OneStep(golden);
  EXPECT_EQ(on_host.loss, on_device.loss);
  EXPECT_EQ(on_host.grad, on_device.grad);
  const int64_t table = golden.options.model.vocab_size * golden.options.model.hidden_size * 4;
  EXPECT_LE(Engine::Plan(golden.options, *golden.weights).value().peak_bytes(), bytes - table);
}

TEST(EngineTest, ExpandingAheadChangesNoBit) {
  for (const char* name : {"nf4", "nf4_qwen2"}) {  // of the second some matrices are dense
    for (const bool fused : {false, true}) {
      GoldenCase golden = LoadGoldenCase(kGolden + name, DType::kF32);
      golden.options.fused_lora = fused;
      golden.options.activations.gate_ups_rebuilt = 1;
      const StepOutcome when_used = OneStep(golden);
      golden.options.prefetch = true;
      const StepOutcome ahead = OneStep(golden);
      EXPECT_EQ(ahead.loss, when_used.loss);
      EXPECT_EQ(ahead.grad, when_used.grad);
    }
  }
}

class FusedTest : public testing::TestWithParam<const char*> {};

TEST_P(FusedTest, OneProductGivesWhatSeparateOnesGive) {
  for (const bool resident : {false, true}) {
    GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
    const StepOutcome separate = OneStep(golden);
    golden.options.fused_lora = true;
    golden.options.resident = resident;
    const StepOutcome fused = OneStep(golden);
    EXPECT_NEAR(fused.loss, separate.loss, 1e-5 * separate.loss);
    EXPECT_LT(GradientError(fused, separate), 1e-5) << (resident ? "kept expanded" : "");
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, FusedTest, testing::Values("dense", "nf4"));
INSTANTIATE_TEST_SUITE_P(Families, FusedTest, testing::ValuesIn(kFamilyCases));

// Products of 8-bit floats give nearly what those of f32 give, with dropout too.
class Fp8EngineTest : public testing::TestWithParam<const char*> {};

TEST_P(Fp8EngineTest, IsNearFullPrecision) {
  for (const double dropout : {0.0, 0.2}) {
    GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
    golden.options.spec.mutable_lora()->set_dropout(dropout);
    const StepOutcome full = OneStep(golden);
    // A model whose scores are sharp makes much of any rounding.
    GoldenCase half = LoadGoldenCase(kGolden + GetParam(), DType::kBF16);
    half.options.spec.mutable_lora()->set_dropout(dropout);
    const double rounding = GradientError(OneStep(half), full);
    golden.options.spec.mutable_quantization()->set_fp8_products(true);
    const StepOutcome fp8 = OneStep(golden);
    EXPECT_NE(fp8.loss, full.loss);
    EXPECT_NEAR(fp8.loss, full.loss, 0.02 * full.loss);
    EXPECT_LT(GradientError(fp8, full), std::max(0.2, 16 * rounding)) << "dropout " << dropout;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Fp8EngineTest, testing::Values("dense", "nf4"));
INSTANTIATE_TEST_SUITE_P(Families, Fp8EngineTest, testing::ValuesIn(kFamilyCases));

}  // namespace
}  // namespace attune
