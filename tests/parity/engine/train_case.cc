// Trains the adapter of a golden case for its first steps and writes it as a job would:
//   train_case CASE STEPS OUT       CASE and OUT are directories
// check_peft.py loads it with PEFT.
#include <cstdio>
#include <cstdlib>

#include "tests/parity/engine/golden_case.h"
#include "worker/train/schedule.h"

int main(int argc, char** argv) {
  using namespace attune;  // NOLINT: a main file
  if (argc != 4) {
    std::fprintf(stderr, "usage: train_case CASE STEPS OUT\n");
    return 2;
  }
  const GoldenCase golden = LoadGoldenCase(argv[1], DType::kF32);
  const v1::JobSpec& spec = golden.options.spec;
  std::unique_ptr<Engine> engine = StartEngine(golden);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  const int64_t steps =
      std::min<int64_t>(std::atoi(argv[2]), static_cast<int64_t>(golden.steps.size()));
  for (int64_t s = 0; s < steps; ++s) {
    GoldenStep step = StepOf(golden, s);
    step.input.learning_rate =
        LearningRate(spec.schedule(), spec.optimizer().learning_rate(), s, steps);
    const auto result = engine->TrainStep(step.input, step.packs, self.get(), [] {});
    if (!result.ok()) {
      std::fprintf(stderr, "%s\n", result.status().ToString().c_str());
      return 1;
    }
  }
  const absl::Status s = WritePeftAdapter(engine->context(), *engine->adapters(), {}, argv[3]);
  if (!s.ok()) std::fprintf(stderr, "%s\n", s.ToString().c_str());
  return s.ok() ? 0 : 1;
}
