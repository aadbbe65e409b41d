// Properties of the engine that need no oracle: gradients against finite differences in f64, the
// plan against the real arena, packing against documents alone.
#include "worker/train/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

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

// Everything is computed again that can be, the MLPs in tiles with a smaller one at the end.
ActivationPolicy MostSparing(const GoldenCase& golden) {
  const int64_t L = golden.options.model.num_layers;
  return {.streams_on_host = L, .gate_ups_rebuilt = L, .layers_rebuilt = L, .mlp_tile = 5};
}

class GradientTest : public testing::TestWithParam<std::tuple<const char*, double, bool>> {};

// A case in double, with everything that training has, if with dropout.
GoldenCase InDouble(const std::string& name, double dropout) {
  GoldenCase golden = LoadGoldenCase(kGolden + name, DType::kF64);
  golden.options.spec.mutable_lora()->set_dropout(dropout);
  golden.options.spec.mutable_optimizer()->set_weight_decay(0);
  if (dropout > 0) {
    golden.options.spec.mutable_sft()->set_label_smoothing_factor(0.1);
    golden.options.spec.mutable_sft()->set_z_loss_weight(0.01);
    golden.options.spec.mutable_sft()->set_neftune_noise_alpha(5);
  }
  return golden;
}

// Every parameter takes part in each trial's direction.
std::vector<double> RandomDirection(int trial, size_t size) {
  uint64_t state = 7 + static_cast<uint64_t>(trial);
  std::vector<double> direction(size);
  for (double& x : direction) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = (static_cast<double>(state >> 33) / (1u << 30)) - 1;
  }
  return direction;
}

constexpr double kStep = 1e-6;
// A sanitizer looks at how memory is used, and takes ten times as long for each.
#ifdef ATTUNE_SANITIZED
constexpr int kTrials = 1;
#else
constexpr int kTrials = 4;
#endif

// f at kStep along the direction, minus f at kStep against it, over 2 kStep.
template <typename F>
auto Slope(const TensorView& master, const std::vector<double>& direction, const F& f) {
  double* const values = master.As<double>();
  const auto at = [&](double h) {
    for (size_t i = 0; i < direction.size(); ++i) values[i] += h * direction[i];
    auto result = f();
    for (size_t i = 0; i < direction.size(); ++i) values[i] -= h * direction[i];
    return result;
  };
  auto up = at(kStep), down = at(-kStep);
  return (up - down) / (2 * kStep);
}

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

TEST_P(GradientTest, EqualsFiniteDifferencesInDouble) {
  const auto [name, dropout, sparing] = GetParam();
  GoldenCase golden = InDouble(name, dropout);
  if (sparing) golden.options.activations = MostSparing(golden);
  std::unique_ptr<Engine> engine = StartEngine(golden);
  const GoldenStep step = StepOf(golden, 0);
  LossAt(engine.get(), step);
  const std::vector<double> grad = Download<double>(*engine, engine->adapters()->grad());
  for (int trial = 0; trial < kTrials; ++trial) {
    const std::vector<double> direction = RandomDirection(trial, grad.size());
    const double numeric =
        Slope(engine->adapters()->master(), direction, [&] { return LossAt(engine.get(), step); });
    EXPECT_NEAR(Dot(direction, grad), numeric, 1e-6 * std::abs(numeric) + 1e-9);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GradientTest,
                         testing::Combine(testing::Values("dense", "nf4"),
                                          testing::Values(0.0, 0.3), testing::Bool()));
INSTANTIATE_TEST_SUITE_P(Scale, GradientTest,
                         testing::Values(std::make_tuple("rslora", 0.3, false)));
INSTANTIATE_TEST_SUITE_P(Trained, GradientTest,
                         testing::Combine(testing::Values("modules", "modules_head", "modules_tied",
                                                          "drawn"),
                                          testing::Values(0.0, 0.3), testing::Values(true)));
// With everything in its place their gradients are the oracle's (engine_parity_test).
INSTANTIATE_TEST_SUITE_P(Families, GradientTest,
                         testing::Combine(testing::ValuesIn(kFamilyCases),
                                          testing::Values(0.0, 0.3), testing::Values(true)));

// DoRA takes the lengths of W + scale B A for constants, which differences do not. A loss hangs on
// them by g = m / length alone, so its derivative by a length is -dm m / length: with it they
// agree.
class DoraGradientTest : public testing::TestWithParam<std::tuple<const char*, double>> {};

// sum over rows of dm m / length^0 * length, where length^0 and the gradients stay as they were.
class LengthsOfRows {
 public:
  LengthsOfRows(const GoldenCase& golden, Engine* engine) : golden_(golden), engine_(engine) {}

  // Of every row of every adapted matrix, by the adapters as they are.
  std::vector<double> Lengths() const {
    std::vector<double> lengths;
    const AdapterSet& adapters = *engine_->adapters();
    const AdapterLayout& layout = adapters.layout();
    for (const AdapterEntry& entry : layout.entries) {
      const TensorView w = golden_.weights->Find(entry.module + ".weight").value();
      const double* const a = adapters.A(entry, adapters.master()).As<double>();
      const double* const b = adapters.B(entry, adapters.master()).As<double>();
      for (int64_t n = 0; n < entry.shape.out; ++n) {
        double squares = 0;
        for (int64_t k = 0; k < entry.shape.in; ++k) {
          const int64_t i = n * entry.shape.in + k;
          double v =
              w.dtype == DType::kF32 ? w.As<float>()[i] : static_cast<float>(w.As<BFloat16>()[i]);
          for (int64_t j = 0; j < layout.r; ++j) {
            v += layout.scale() * b[n * layout.r + j] * a[j * entry.shape.in + k];
          }
          squares += v * v;
        }
        lengths.push_back(std::sqrt(squares));
      }
    }
    return lengths;
  }

  // The loss's derivative by each.
  std::vector<double> Derivatives() const {
    const AdapterSet& adapters = *engine_->adapters();
    const std::vector<double> lengths = Lengths();
    std::vector<double> out;
    for (const AdapterEntry& entry : adapters.layout().entries) {
      const double* const m = adapters.Magnitude(entry, adapters.master()).As<double>();
      const double* const dm = adapters.Magnitude(entry, adapters.grad()).As<double>();
      for (int64_t n = 0; n < entry.shape.out; ++n) {
        out.push_back(-dm[n] * m[n] / lengths[out.size()]);
      }
    }
    return out;
  }

 private:
  const GoldenCase& golden_;
  Engine* engine_;
};

TEST_P(DoraGradientTest, EqualsFiniteDifferencesInDouble) {
  const auto [name, dropout] = GetParam();
  GoldenCase golden = InDouble(name, dropout);
  golden.options.spec.mutable_quantization()->set_weights(v1::WEIGHT_FORMAT_NONE);
  std::unique_ptr<Engine> engine = StartEngine(golden);
  const GoldenStep step = StepOf(golden, 0);
  LossAt(engine.get(), step);
  const std::vector<double> grad = Download<double>(*engine, engine->adapters()->grad());
  const LengthsOfRows rows(golden, engine.get());
  const std::vector<double> by_length = rows.Derivatives();
  const TensorView master = engine->adapters()->master();
  for (int trial = 0; trial < kTrials; ++trial) {
    const std::vector<double> direction = RandomDirection(trial, grad.size());
    const double numeric = Slope(master, direction, [&] { return LossAt(engine.get(), step); });
    const double through_lengths =
        Slope(master, direction, [&] { return Dot(by_length, rows.Lengths()); });
    EXPECT_GT(std::abs(through_lengths), 1e-6 * std::abs(numeric));  // they do matter
    EXPECT_NEAR(Dot(direction, grad) + through_lengths, numeric,
                1e-6 * (std::abs(numeric) + std::abs(through_lengths)) + 1e-9);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, DoraGradientTest,
                         testing::Combine(testing::Values("dora", "drawn_dora"),
                                          testing::Values(0.0, 0.3)));

// A new adapter's magnitudes are the lengths of the base's rows, so that it changes nothing.
TEST(EngineTest, ANewDoraAdapterIsTheBase) {
  for (const char* name : {"dora", "drawn_dora"}) {
    GoldenCase golden = InDouble(name, 0);
    golden.options.adapter_directory.clear();
    const double with = LossAt(StartEngine(golden).get(), StepOf(golden, 0));
    golden.options.adapters = SelectAdapters(golden.options.model, golden.options.names,
                                             {.r = 2, .alpha = 2, .target_modules = {"q_proj"}})
                                  .value();
    EXPECT_NEAR(LossAt(StartEngine(golden).get(), StepOf(golden, 0)), with, 1e-12) << name;
  }
}

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
INSTANTIATE_TEST_SUITE_P(Trained, PlanTest,
                         testing::Combine(testing::ValuesIn(kTrainedCases),
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
INSTANTIATE_TEST_SUITE_P(Trained, PackingTest,
                         testing::Values("modules", "modules_head", "modules_tied", "dora"));
INSTANTIATE_TEST_SUITE_P(Families, PackingTest, testing::ValuesIn(kFamilyCases));

// What one step gives: the loss and the adapters' gradients.
template <typename T>
struct StepOutcome {
  double loss;
  std::vector<T> grad;
};
template <typename T = float>
StepOutcome<T> OneStep(const GoldenCase& golden) {
  std::unique_ptr<Engine> engine = StartEngine(golden);
  // Twice: buffers that travel are used again.
  LossAt(engine.get(), StepOf(golden, 1));
  const GoldenStep step = StepOf(golden, 0);
  const double loss = LossAt(engine.get(), step);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  EXPECT_TRUE(engine->Evaluate(step.packs, step.input.trained_tokens, self.get(), [] {}).ok());
  EXPECT_EQ(engine->peak_bytes(),
            Engine::Plan(golden.options, *golden.weights).value().peak_bytes());
  return {loss, Download<T>(*engine, engine->adapters()->grad())};
}

// |got - want| / |want| of the gradients, in the Euclidean norm.
template <typename T>
double GradientError(const StepOutcome<T>& got, const StepOutcome<T>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.grad.size(); ++i) {
    error += std::pow(got.grad[i] - want.grad[i], 2);
    norm += std::pow(want.grad[i], 2);
  }
  EXPECT_GT(norm, 0);
  return std::sqrt(error / norm);
}

std::string PolicyText(const ActivationPolicy& policy) {
  std::string text;
  for (int64_t n : {policy.streams_on_host, policy.gate_ups_on_host, policy.gate_ups_rebuilt,
                    policy.projections_rebuilt, policy.layers_rebuilt, policy.mlp_tile}) {
    text += std::to_string(n) + " ";
  }
  return text + (policy.heads_saved ? "heads saved" : "");
}

// The last: each place by itself too, not mixed ones alone.
class PlacesTest : public testing::TestWithParam<std::tuple<const char*, double, bool>> {};

TEST_P(PlacesTest, WhereActivationsAreKeptChangesNoBit) {
  const auto [name, dropout, each] = GetParam();
  GoldenCase golden = LoadGoldenCase(kGolden + name, DType::kF32);
  golden.options.spec.mutable_lora()->set_dropout(dropout);
  golden.options.fused_lora = dropout == 0;
  const int64_t L = golden.options.model.num_layers;
  const StepOutcome<float> kept = OneStep(golden);
  std::vector<ActivationPolicy> policies = {
      {L, L, 0, 0, 0},       {L - 1, 1, L - 1, 0, 0},
      {L, 0, L, 0, L},       {1, 0, 1, 1, L - 1},
      {.heads_saved = true}, {.streams_on_host = 1, .layers_rebuilt = L - 1, .heads_saved = true}};
  if (each) {
    policies.insert(policies.end(), {{L, 0, 0, 0, 0},
                                     {0, L, 0, 0, 0},
                                     {0, 0, L, 0, 0},
                                     {0, 0, 0, L, 0},
                                     {0, 0, 0, 0, L},
                                     {1, 0, 1, 0, 0},
                                     {L, L, 0, L - 1, 1},
                                     {L - 1, 1, 0, 1, 0}});
  }
  for (const ActivationPolicy& policy : policies) {
    golden.options.activations = policy;
    const StepOutcome<float> other = OneStep(golden);
    EXPECT_EQ(other.loss, kept.loss) << PolicyText(policy);
    EXPECT_EQ(other.grad, kept.grad) << PolicyText(policy);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, PlacesTest,
                         testing::Combine(testing::Values("nf4"), testing::Values(0.0, 0.3),
                                          testing::Values(true)));
INSTANTIATE_TEST_SUITE_P(Trained, PlacesTest,
                         testing::Combine(testing::ValuesIn(kTrainedCases), testing::Values(0.0),
                                          testing::Values(false)));
INSTANTIATE_TEST_SUITE_P(Families, PlacesTest,
                         testing::Combine(testing::ValuesIn(kFamilyCases),
                                          testing::Values(0.0, 0.3), testing::Values(false)));

// Tiles of rows: the loss is the same, bit by bit where a row's sums do not hang on how many rows
// there are (f64), and the gradients are but for the order of their sums.
class TileTest : public testing::TestWithParam<std::tuple<const char*, double, int64_t>> {};

TEST_P(TileTest, TilesOfTheMlpGiveWhatAllRowsAtOnceGive) {
  const auto [name, dropout, tile] = GetParam();
  GoldenCase exact = LoadGoldenCase(kGolden + name, DType::kF64);
  GoldenCase fused = LoadGoldenCase(kGolden + name, DType::kF32);
  exact.options.spec.mutable_lora()->set_dropout(dropout);
  fused.options.spec.mutable_lora()->set_dropout(dropout);
  fused.options.fused_lora = true;
  const int64_t L = exact.options.model.num_layers;
  const StepOutcome<double> whole = OneStep<double>(exact);
  const StepOutcome<float> whole_fused = OneStep<float>(fused);
  for (const int64_t rebuilt : {int64_t{0}, L}) {
    const ActivationPolicy policy{.gate_ups_rebuilt = rebuilt, .mlp_tile = tile};
    exact.options.activations = fused.options.activations = policy;
    const StepOutcome<double> tiled = OneStep<double>(exact);
    EXPECT_EQ(tiled.loss, whole.loss) << PolicyText(policy);
    EXPECT_LT(GradientError(tiled, whole), 1e-13) << PolicyText(policy);
    fused.options.prefetch = rebuilt > 0;
    const StepOutcome<float> tiled_fused = OneStep<float>(fused);
    EXPECT_NEAR(tiled_fused.loss, whole_fused.loss, 1e-6 * whole_fused.loss);
    EXPECT_LT(GradientError(tiled_fused, whole_fused), 1e-5) << PolicyText(policy);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, TileTest,
                         testing::Combine(testing::Values("nf4"), testing::Values(0.0, 0.3),
                                          testing::Values(3, 1000)));
INSTANTIATE_TEST_SUITE_P(Trained, TileTest,
                         testing::Combine(testing::ValuesIn(kTrainedCases), testing::Values(0.3),
                                          testing::Values(7)));
INSTANTIATE_TEST_SUITE_P(Families, TileTest,
                         testing::Combine(testing::ValuesIn(kFamilyCases), testing::Values(0.3),
                                          testing::Values(7)));

TEST(EngineTest, EmbeddingsOnTheHostChangeNoBit) {
  GoldenCase golden = LoadGoldenCase(kGolden + "dense", DType::kF32);
  ASSERT_FALSE(golden.options.model.tied_embeddings);
  const int64_t bytes = Engine::Plan(golden.options, *golden.weights).value().peak_bytes();
  const StepOutcome<float> on_device = OneStep(golden);
  golden.options.embedding_on_host = true;
  const StepOutcome<float> on_host = OneStep(golden);
  EXPECT_EQ(on_host.loss, on_device.loss);
  EXPECT_EQ(on_host.grad, on_device.grad);
  const int64_t table = golden.options.model.vocab_size * golden.options.model.hidden_size * 4;
  EXPECT_LE(Engine::Plan(golden.options, *golden.weights).value().peak_bytes(), bytes - table);
}

// A table that is trained is the adapters', and stays on the device.
TEST(EngineTest, TrainedEmbeddingsStayOnTheDevice) {
  GoldenCase golden = LoadGoldenCase(kGolden + "modules", DType::kF32);
  const StepOutcome on_device = OneStep(golden);
  golden.options.embedding_on_host = true;
  const StepOutcome asked = OneStep(golden);
  EXPECT_EQ(asked.loss, on_device.loss);
  EXPECT_EQ(asked.grad, on_device.grad);
}

// Without an adapter to start from, what is trained in full starts as the base has it.
TEST(EngineTest, TrainedTablesStartAsTheBase) {
  for (const char* name : {"modules", "modules_head", "modules_tied"}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      GoldenCase golden = LoadGoldenCase(kGolden + name, dtype);
      golden.options.adapter_directory.clear();
      const double adapted = LossAt(StartEngine(golden).get(), StepOf(golden, 0));
      golden.options.adapters.elements = golden.options.adapters.modules.front().offset;
      golden.options.adapters.modules.clear();
      EXPECT_EQ(LossAt(StartEngine(golden).get(), StepOf(golden, 0)), adapted) << name;
    }
  }
}

TEST(EngineTest, ExpandingAheadChangesNoBit) {
  for (const char* name : {"nf4", "nf4_qwen2"}) {  // of the second some matrices are dense
    for (const bool fused : {false, true}) {
      GoldenCase golden = LoadGoldenCase(kGolden + name, DType::kF32);
      golden.options.fused_lora = fused;
      golden.options.activations.gate_ups_rebuilt = 1;
      const StepOutcome<float> when_used = OneStep(golden);
      golden.options.prefetch = true;
      const StepOutcome<float> ahead = OneStep(golden);
      EXPECT_EQ(ahead.loss, when_used.loss);
      EXPECT_EQ(ahead.grad, when_used.grad);
    }
  }
}

class FusedTest : public testing::TestWithParam<const char*> {};

TEST_P(FusedTest, OneProductGivesWhatSeparateOnesGive) {
  for (const bool resident : {false, true}) {
    GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
    golden.options.fused_lora = false;
    const StepOutcome<float> separate = OneStep(golden);
    golden.options.fused_lora = true;
    golden.options.resident = resident;
    const StepOutcome<float> fused = OneStep(golden);
    EXPECT_NEAR(fused.loss, separate.loss, 1e-5 * separate.loss);
    EXPECT_LT(GradientError(fused, separate), 1e-5) << (resident ? "kept expanded" : "");
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, FusedTest, testing::Values("dense", "nf4"));
INSTANTIATE_TEST_SUITE_P(Trained, FusedTest, testing::ValuesIn(kTrainedCases));
INSTANTIATE_TEST_SUITE_P(Families, FusedTest, testing::ValuesIn(kFamilyCases));

// Products of 8-bit floats give nearly what those of f32 give, with dropout too.
class Fp8EngineTest : public testing::TestWithParam<const char*> {};

TEST_P(Fp8EngineTest, IsNearFullPrecision) {
  for (const double dropout : {0.0, 0.2}) {
    GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
    golden.options.spec.mutable_lora()->set_dropout(dropout);
    const StepOutcome<float> full = OneStep(golden);
    // A model whose scores are sharp makes much of any rounding.
    GoldenCase half = LoadGoldenCase(kGolden + GetParam(), DType::kBF16);
    half.options.spec.mutable_lora()->set_dropout(dropout);
    const double rounding = GradientError(OneStep(half), full);
    golden.options.spec.mutable_quantization()->set_fp8_products(true);
    const StepOutcome<float> fp8 = OneStep(golden);
    EXPECT_NE(fp8.loss, full.loss);
    EXPECT_NEAR(fp8.loss, full.loss, 0.02 * full.loss);
    EXPECT_LT(GradientError(fp8, full), std::max(0.2, 16 * rounding)) << "dropout " << dropout;
  }
}

TEST_P(Fp8EngineTest, PeakOfThePlanIsThePeakOfTheRun) {
  for (const double dropout : {0.0, 0.2}) {
    for (const bool sparing : {false, true}) {
      GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kBF16);
      golden.options.spec.mutable_quantization()->set_fp8_products(true);
      golden.options.spec.mutable_lora()->set_dropout(dropout);
      if (sparing) golden.options.activations = MostSparing(golden);
      const int64_t plan = Engine::Plan(golden.options, *golden.weights).value().peak_bytes();
      std::unique_ptr<Engine> engine = StartEngine(golden);
      std::unique_ptr<Communicator> self = NewSelfCommunicator();
      GoldenStep step = StepOf(golden, 0);
      ASSERT_TRUE(engine->TrainStep(step.input, step.packs, self.get(), [] {}).ok());
      EXPECT_EQ(engine->peak_bytes(), plan) << dropout << ", " << sparing;
    }
  }
}

// Rows are quantised each by itself, so tiles and layers that are made again change nothing but the
// roundings of products, which flip a code here and there.
TEST_P(Fp8EngineTest, TilesAndRebuiltLayersChangeLittle) {
  GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
  const StepOutcome<float> full = OneStep(golden);
  golden.options.spec.mutable_quantization()->set_fp8_products(true);
  const StepOutcome<float> whole = OneStep(golden);
  golden.options.activations = MostSparing(golden);
  for (const bool prefetch : {false, true}) {
    golden.options.prefetch = prefetch;
    const StepOutcome<float> sparing = OneStep(golden);
    EXPECT_NEAR(sparing.loss, whole.loss, 1e-3 * whole.loss);
    EXPECT_LT(GradientError(sparing, whole), 0.5 * GradientError(whole, full)) << prefetch;
  }
}

// B and A as they are, but counted a hundred times as much: more than 8 times W's largest.
TEST_P(Fp8EngineTest, AnAdapterLargerThanItsWeightIsWhole) {
  GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
  golden.options.adapters.alpha *= 100;
  const StepOutcome<float> full = OneStep(golden);
  golden.options.spec.mutable_quantization()->set_fp8_products(true);
  const StepOutcome<float> fp8 = OneStep(golden);
  EXPECT_NEAR(fp8.loss, full.loss, 0.01 * full.loss);
  EXPECT_LT(GradientError(fp8, full), 5);  // of what is cut off up to 100,000
}

INSTANTIATE_TEST_SUITE_P(Cases, Fp8EngineTest, testing::Values("dense", "nf4"));
INSTANTIATE_TEST_SUITE_P(Families, Fp8EngineTest,
                         testing::Values("qwen3", "phi3", "gemma2", "nf4_qwen2"));

}  // namespace
}  // namespace attune
