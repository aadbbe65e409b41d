// The engine in fp32 against Transformers + PEFT + bitsandbytes (golden files: make_golden.py).
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/elementwise/elementwise.h"
#include "tests/parity/engine/golden_case.h"
#include "worker/train/schedule.h"

namespace attune {
namespace {

const std::string kGolden = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/engine/golden/";

// |a - b| / |b|, in the Euclidean norm; 0 where both are zero (the gradient of A while B is zero).
double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

std::vector<float> Values(const Exec& exec, const TensorView& view) {
  std::vector<float> values(view.size());
  CopyToHost(exec, view, values.data());
  return values;
}

class EngineParityTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { golden_ = LoadGoldenCase(kGolden + GetParam(), DType::kF32); }

  // Runs the case's steps; `zero_gradients` is the control of a broken backward.
  std::vector<double> Losses(Engine* engine, bool zero_gradients) {
    std::unique_ptr<Communicator> self = NewSelfCommunicator();
    std::vector<double> losses;
    const v1::JobSpec& spec = golden_.options.spec;
    const int64_t steps = static_cast<int64_t>(golden_.steps.size());
    for (int64_t s = 0; s < steps; ++s) {
      GoldenStep step = StepOf(golden_, s);
      step.input.learning_rate =
          LearningRate(spec.schedule(), spec.optimizer().learning_rate(), s, steps);
      if (zero_gradients) step.input.learning_rate = 0;
      const StepResult result =
          engine->TrainStep(step.input, step.packs, self.get(), [] {}).value();
      losses.push_back(result.loss);
    }
    return losses;
  }

  GoldenCase golden_;
};

TEST_P(EngineParityTest, Logits) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  LayerContext ctx = engine->context();
  // The engine's arena is planned for training; logits of all rows need their own.
  Arena arena = Arena::Allocate(DeviceKind::kCpu, 64 << 20).value();
  ctx.arena = &arena;
  const PackBuffers buffers(ctx, golden_.steps[0][0].ids.size(),
                            golden_.options.model.head_dim);
  for (size_t i = 0; i < golden_.steps[0].size(); ++i) {
    ArenaScope scope(&arena, ArenaEnd::kBottom);
    const Pack& pack = golden_.steps[0][i];
    const PackBatch batch = buffers.Upload(ctx, pack, engine->model().inverse_frequencies());
    const Hidden hidden = engine->model().Infer(ctx, batch, nullptr, 0);
    const int64_t rows = pack.q_begin[pack.num_segments];
    const TensorView logits =
        ctx.Saved(DType::kF32, {rows, golden_.options.model.vocab_size});
    engine->model().head().Logits(ctx, hidden.x, hidden.delta, 0, logits);
    EXPECT_LT(RelativeError(Values(ctx.exec, logits),
                            golden_.Expected("logits." + std::to_string(i))),
              1e-4);
  }
}

TEST_P(EngineParityTest, LossGradientNormAndEveryGradient) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  const GoldenStep step = StepOf(golden_, 0);
  const StepResult result = engine->TrainStep(step.input, step.packs, self.get(), [] {}).value();
  const double loss = golden_.json["losses"][0], norm = golden_.json["grad_norms"][0];
  EXPECT_LT(std::abs(result.loss - loss) / loss, 1e-5);
  EXPECT_LT(std::abs(result.grad_norm - norm) / norm, 1e-4);
  const AdapterSet& adapters = *engine->adapters();
  int compared = 0;
  for (const AdapterEntry& entry : adapters.layout().entries) {
    const std::string prefix = "grad.base_model.model." + entry.module;
    EXPECT_LT(RelativeError(Values(engine->context().exec, adapters.A(entry, adapters.grad())),
                            golden_.Expected(prefix + ".lora_A.weight")),
              1e-3)
        << entry.module;
    EXPECT_LT(RelativeError(Values(engine->context().exec, adapters.B(entry, adapters.grad())),
                            golden_.Expected(prefix + ".lora_B.weight")),
              1e-3)
        << entry.module;
    compared += 2;
  }
  EXPECT_GE(compared, 12);
}

TEST_P(EngineParityTest, EveryLossOfTheRunAndTheAdapterAfterIt) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  const std::vector<double> losses = Losses(engine.get(), /*zero_gradients=*/false);
  const auto expected = golden_.json["losses"].get<std::vector<double>>();
  for (size_t s = 0; s < losses.size(); ++s) {
    EXPECT_NEAR(losses[s], expected[s], 1e-3 * expected[s]) << "step " << s;
  }
  const AdapterSet& adapters = *engine->adapters();
  for (const AdapterEntry& entry : adapters.layout().entries) {
    const std::string prefix = "final.base_model.model." + entry.module;
    EXPECT_LT(RelativeError(Values(engine->context().exec, adapters.B(entry, adapters.master())),
                            golden_.Expected(prefix + ".lora_B.weight")),
              2e-2)
        << entry.module;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, EngineParityTest,
                         testing::Values("dense", "nf4", "qlora60", "rslora"),
                         [](const auto& info) { return std::string(info.param); });

// What the comparison of losses is worth: training that does nothing must not pass it.
using EngineParityControl = EngineParityTest;
TEST_P(EngineParityControl, ZeroedGradientsFailTheSameCheck) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  const std::vector<double> losses = Losses(engine.get(), /*zero_gradients=*/true);
  const auto expected = golden_.json["losses"].get<std::vector<double>>();
  EXPECT_GT(expected.front() - expected.back(), 1.0) << "the oracle's loss does not really fall";
  int outside = 0;
  for (size_t s = 0; s < losses.size(); ++s) {
    outside += std::abs(losses[s] - expected[s]) > 1e-3 * expected[s];
  }
  EXPECT_GT(outside, static_cast<int>(losses.size()) * 3 / 4);
}
INSTANTIATE_TEST_SUITE_P(Cases, EngineParityControl, testing::Values("qlora60"));

}  // namespace
}  // namespace attune
