// Trains the adapter of a golden case for its first steps and writes it as a job would:
//   train_case CASE STEPS OUT [f32|bf16]       CASE and OUT are directories
// Prints the losses and the steps' seconds and CPU seconds, as JSON. For check_peft.py, which loads
// the adapter with PEFT, and tests/bench/compare_cpu.py.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "tests/parity/engine/golden_case.h"
#include "worker/train/schedule.h"

int main(int argc, char** argv) {
  using namespace attune;  // NOLINT: a main file
  const std::string dtype = argc == 5 ? argv[4] : "f32";
  if (argc < 4 || argc > 5 || (dtype != "f32" && dtype != "bf16")) {
    std::fprintf(stderr, "usage: train_case CASE STEPS OUT [f32|bf16]\n");
    return 2;
  }
  const GoldenCase golden = LoadGoldenCase(argv[1], dtype == "f32" ? DType::kF32 : DType::kBF16);
  const v1::JobSpec& spec = golden.options.spec;
  std::unique_ptr<Engine> engine = StartEngine(golden);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  const int64_t steps =
      std::min<int64_t>(std::atoi(argv[2]), static_cast<int64_t>(golden.steps.size()));
  Json losses = Json::array(), seconds = Json::array(), cpu_seconds = Json::array();
  for (int64_t s = 0; s < steps; ++s) {
    const auto begin = std::chrono::steady_clock::now();
    const std::clock_t cpu_begin = std::clock();
    GoldenStep step = StepOf(golden, s);
    step.input.learning_rate =
        LearningRate(spec.schedule(), spec.optimizer().learning_rate(), s, steps);
    const auto result = engine->TrainStep(step.input, step.packs, self.get(), [] {});
    if (!result.ok()) {
      std::fprintf(stderr, "%s\n", result.status().ToString().c_str());
      return 1;
    }
    losses.push_back(result->loss);
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    cpu_seconds.push_back(static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC);
  }
  const Json out = {{"losses", losses}, {"seconds", seconds}, {"cpu_seconds", cpu_seconds}};
  std::printf("%s\n", out.dump().c_str());
  const absl::Status s = WritePeftAdapter(engine->context(), *engine->adapters(), {}, argv[3]);
  if (!s.ok()) std::fprintf(stderr, "%s\n", s.ToString().c_str());
  return s.ok() ? 0 : 1;
}
