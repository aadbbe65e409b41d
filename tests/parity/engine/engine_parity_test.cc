// The engine in fp32 against Transformers + PEFT + bitsandbytes (golden files: make_golden.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "kernels/elementwise/elementwise.h"
#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"
#include "worker/train/schedule.h"

namespace attune {
namespace {

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

int GradientsOf(const SafetensorsFile& expected) {
  return static_cast<int>(
      std::count_if(expected.names().begin(), expected.names().end(),
                    [](const std::string& name) { return absl::StartsWith(name, "grad."); }));
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

  // Of the i-th pack of the first step, from the oracle's.
  double LogitsError(const Engine& engine, int i) const {
    LayerContext ctx = engine.context();
    // The engine's arena is planned for training; logits of all rows need their own.
    Arena arena = Arena::Allocate(DeviceKind::kCpu, 64 << 20).value();
    ctx.arena = &arena;
    const Pack& pack = golden_.steps[0][i];
    const PackBuffers buffers(ctx, static_cast<int64_t>(pack.ids.size()), engine.model().ropes());
    const PackBatch batch = buffers.Upload(ctx, pack);
    const Hidden hidden = engine.model().Infer(ctx, batch, nullptr, 0);
    const int64_t rows = pack.q_begin[pack.num_segments];
    const TensorView logits = ctx.Saved(DType::kF32, {rows, golden_.options.model.vocab_size});
    engine.model().head().Logits(ctx, hidden.x, hidden.delta, 0, logits);
    return RelativeError(Values(ctx.exec, logits), golden_.Expected("logits." + std::to_string(i)));
  }

  GoldenCase golden_;
};

TEST_P(EngineParityTest, Logits) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  for (size_t i = 0; i < golden_.steps[0].size(); ++i) {
    EXPECT_LT(LogitsError(*engine, static_cast<int>(i)), 2e-5);
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
    if (!adapters.layout().use_dora) continue;
    EXPECT_LT(
        RelativeError(Values(engine->context().exec, adapters.Magnitude(entry, adapters.grad())),
                      golden_.Expected(prefix + ".lora_magnitude_vector")),
        1e-3)
        << entry.module;
    ++compared;
  }
  for (const ModuleEntry& entry : adapters.layout().modules) {
    const std::string name = "grad.base_model.model." + entry.modules[0] + ".weight";
    EXPECT_LT(RelativeError(Values(engine->context().exec, adapters.Module(entry, adapters.grad())),
                            golden_.Expected(name)),
              1e-3)
        << name;
    ++compared;
  }
  EXPECT_GE(compared, 4);
  EXPECT_EQ(compared, GradientsOf(*golden_.expected));
}

TEST_P(EngineParityTest, EveryLossOfTheRun) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  const std::vector<double> losses = Losses(engine.get(), /*zero_gradients=*/false);
  const auto expected = golden_.json["losses"].get<std::vector<double>>();
  ASSERT_EQ(losses.size(), expected.size());
  for (size_t s = 0; s < losses.size(); ++s) {
    EXPECT_NEAR(losses[s], expected[s], 1e-3 * expected[s]) << "step " << s;
  }
}

const auto kName = [](const auto& info) { return std::string(info.param); };
INSTANTIATE_TEST_SUITE_P(Cases, EngineParityTest,
                         testing::Values("dense", "nf4", "qlora60", "rslora"), kName);
INSTANTIATE_TEST_SUITE_P(Trained, EngineParityTest, testing::ValuesIn(kTrainedCases), kName);
INSTANTIATE_TEST_SUITE_P(Families, EngineParityTest, testing::ValuesIn(kFamilyCases), kName);

using EngineParityOfAdapters = EngineParityTest;
TEST_P(EngineParityOfAdapters, TheAdapterAfterTheRun) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  Losses(engine.get(), /*zero_gradients=*/false);
  const AdapterSet& adapters = *engine->adapters();
  for (const AdapterEntry& entry : adapters.layout().entries) {
    const std::string prefix = "final.base_model.model." + entry.module;
    EXPECT_LT(RelativeError(Values(engine->context().exec, adapters.B(entry, adapters.master())),
                            golden_.Expected(prefix + ".lora_B.weight")),
              2e-2)
        << entry.module;
    if (!adapters.layout().use_dora) continue;
    EXPECT_LT(
        RelativeError(Values(engine->context().exec, adapters.Magnitude(entry, adapters.master())),
                      golden_.Expected(prefix + ".lora_magnitude_vector")),
        1e-4)
        << entry.module;
  }
  for (const ModuleEntry& entry : adapters.layout().modules) {
    const std::string name = "final.base_model.model." + entry.modules[0] + ".weight";
    EXPECT_LT(
        RelativeError(Values(engine->context().exec, adapters.Module(entry, adapters.master())),
                      golden_.Expected(name)),
        1e-3)
        << name;
  }
}
INSTANTIATE_TEST_SUITE_P(Cases, EngineParityOfAdapters,
                         testing::Values("dense", "nf4", "qlora60", "rslora", "modules",
                                         "modules_head", "drawn", "drawn_dora"),
                         kName);

// What a family's case is worth: without any one of the things that make the model another than
// Llama 2, the logits are others. (The case's weights are those of the whole model.)
struct Trait {
  const char* name;
  bool (*there)(const ModelConfig& c);
  void (*leave_out)(ModelConfig* c);
};
const Trait kTraits[] = {
    {"biases of q, k, v", [](const ModelConfig& c) { return c.qkv_bias; },
     [](ModelConfig* c) { c->qkv_bias = false; }},
    {"bias of o", [](const ModelConfig& c) { return c.o_bias; },
     [](ModelConfig* c) { c->o_bias = false; }},
    {"biases of the MLP", [](const ModelConfig& c) { return c.mlp_bias; },
     [](ModelConfig* c) { c->mlp_bias = false; }},
    {"norms of heads", [](const ModelConfig& c) { return c.qk_norm; },
     [](ModelConfig* c) { c->qk_norm = false; }},
    {"post-norms", [](const ModelConfig& c) { return c.post_norms; },
     [](ModelConfig* c) { c->post_norms = false; }},
    {"1 + w", [](const ModelConfig& c) { return c.norm_weight_offset != 0; },
     [](ModelConfig* c) { c->norm_weight_offset = 0; }},
    {"activation", [](const ModelConfig& c) { return c.activation != Activation::kSilu; },
     [](ModelConfig* c) { c->activation = Activation::kSilu; }},
    {"GELU by tanh", [](const ModelConfig& c) { return c.activation == Activation::kGeluTanh; },
     [](ModelConfig* c) { c->activation = Activation::kGeluErf; }},
    {"scale of scores", [](const ModelConfig& c) { return c.attention_scale != 0; },
     [](ModelConfig* c) { c->attention_scale = 0; }},
    {"cap of scores", [](const ModelConfig& c) { return c.attention_softcap != 0; },
     [](ModelConfig* c) { c->attention_softcap = 0; }},
    {"scale of embeddings", [](const ModelConfig& c) { return c.embedding_scale != 1; },
     [](ModelConfig* c) { c->embedding_scale = 1; }},
    {"scale of what is added", [](const ModelConfig& c) { return c.residual_scale != 1; },
     [](ModelConfig* c) { c->residual_scale = 1; }},
    {"scale of logits", [](const ModelConfig& c) { return c.logit_scale != 1; },
     [](ModelConfig* c) { c->logit_scale = 1; }},
    {"cap of logits", [](const ModelConfig& c) { return c.logit_softcap != 0; },
     [](ModelConfig* c) { c->logit_softcap = 0; }},
    {"windows",
     [](const ModelConfig& c) {
       return std::any_of(c.layers.begin(), c.layers.end(),
                          [](const LayerConfig& layer) { return layer.window > 0; });
     },
     [](ModelConfig* c) {
       for (LayerConfig& layer : c->layers) layer.window = 0;
     }},
    {"layers without rope",
     [](const ModelConfig& c) {
       return std::any_of(c.layers.begin(), c.layers.end(), [](const LayerConfig& layer) {
         return layer.rope == LayerConfig::kNoRope;
       });
     },
     [](ModelConfig* c) {
       for (LayerConfig& layer : c->layers) layer.rope = 0;
     }},
    {"the second rope", [](const ModelConfig& c) { return c.ropes.size() > 1; },
     [](ModelConfig* c) { c->ropes[1] = c->ropes[0]; }},
    {"scaled rope", [](const ModelConfig& c) { return c.ropes[0].scaling != RopeScaling::kNone; },
     [](ModelConfig* c) { c->ropes[0].scaling = RopeScaling::kNone; }},
    {"long factors", [](const ModelConfig& c) { return !c.ropes[0].long_factors.empty(); },
     [](ModelConfig* c) { c->ropes[0].long_factors = c->ropes[0].short_factors; }},
    {"factor of the angles", [](const ModelConfig& c) { return c.ropes[0].attention_factor != 1; },
     [](ModelConfig* c) { c->ropes[0].attention_factor = 1; }},
    {"rope of a part", [](const ModelConfig& c) { return c.ropes[0].rotary_dim != 0; },
     [](ModelConfig* c) {
       c->ropes[0].rotary_dim -= 2;
       c->ropes[0].short_factors.pop_back();
       c->ropes[0].long_factors.pop_back();
     }},
};

using EngineParityTraits = EngineParityTest;
TEST_P(EngineParityTraits, EveryTraitOfTheFamilyMatters) {
  for (const Trait& trait : kTraits) {
    const ModelConfig whole = golden_.options.model;
    if (!trait.there(whole)) continue;
    trait.leave_out(&golden_.options.model);
    const std::unique_ptr<Engine> engine = StartEngine(golden_);
    golden_.options.model = whole;
    EXPECT_GT(LogitsError(*engine, 0), 1e-4) << trait.name;  // parity is asked for to 2e-5
  }
}
INSTANTIATE_TEST_SUITE_P(Families, EngineParityTraits, testing::ValuesIn(kFamilyCases), kName);

// What the comparison of losses is worth: training that does nothing must not pass it.
using EngineParityControl = EngineParityTest;
TEST_P(EngineParityControl, ZeroedGradientsFailTheSameCheck) {
  std::unique_ptr<Engine> engine = StartEngine(golden_);
  const std::vector<double> losses = Losses(engine.get(), /*zero_gradients=*/true);
  const auto expected = golden_.json["losses"].get<std::vector<double>>();
  EXPECT_LT(expected.back(), 0.8 * expected.front()) << "the oracle's loss does not really fall";
  int outside = 0;
  for (size_t s = 0; s < losses.size(); ++s) {
    outside += std::abs(losses[s] - expected[s]) > 1e-3 * expected[s];
  }
  EXPECT_GT(outside, static_cast<int>(losses.size()) * 3 / 4);
}
INSTANTIATE_TEST_SUITE_P(Cases, EngineParityControl, testing::Values("qlora60"), kName);
INSTANTIATE_TEST_SUITE_P(Trained, EngineParityControl,
                         testing::Values("modules", "modules_head", "modules_tied", "dora"), kName);
INSTANTIATE_TEST_SUITE_P(Families, EngineParityControl, testing::ValuesIn(kFamilyCases), kName);

}  // namespace
}  // namespace attune
