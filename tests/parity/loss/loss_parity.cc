// loss_parity CASE: trains make_case.py's model on the GPU, in the oracle's order of data, and
// compares each loss with the oracle's. Passes if their mean absolute difference is at most 2 % of
// what the oracle's loss falls by; a control that does not learn must fail the same check.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>

#include "tests/parity/engine/golden_case.h"
#include "worker/memory/device.h"
#include "worker/train/schedule.h"

namespace attune {
namespace {

constexpr double kShareOfFall = 0.02;
constexpr double kLeastFall = 1.0;  // nats

struct RunLosses {
  std::vector<double> losses;
  double seconds = 0;
};

RunLosses Train(const GoldenCase& golden, bool learn) {
  const v1::JobSpec& spec = golden.options.spec;
  std::unique_ptr<Engine> engine = StartEngine(golden);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  RunLosses out;
  const auto begin = std::chrono::steady_clock::now();
  const int64_t steps = static_cast<int64_t>(golden.steps.size());
  for (int64_t s = 0; s < steps; ++s) {
    GoldenStep step = StepOf(golden, s);
    step.input.learning_rate =
        learn ? LearningRate(spec.schedule(), spec.optimizer().learning_rate(), s, steps) : 0;
    const absl::StatusOr<StepResult> result =
        engine->TrainStep(step.input, step.packs, self.get(), [] {});
    if (!result.ok()) {
      std::fprintf(stderr, "step %lld: %s\n", static_cast<long long>(s),
                   result.status().ToString().c_str());
      std::exit(1);
    }
    out.losses.push_back(result->loss);
  }
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return out;
}

double MeanDifference(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(a[i] - b[i]);
  return sum / static_cast<double>(a.size());
}

// By how much a run's loss falls: the mean of its first ten steps less that of its last ten.
double Fall(const std::vector<double>& losses) {
  double first = 0, last = 0;
  const size_t n = std::min<size_t>(10, losses.size());
  for (size_t i = 0; i < n; ++i) {
    first += losses[i];
    last += losses[losses.size() - 1 - i];
  }
  return (first - last) / static_cast<double>(n);
}

int Main(int argc, char** argv) {
  CLI::App app("Losses of a QLoRA run against Transformers + PEFT + bitsandbytes");
  std::string directory, json;
  bool cpu = false;
  app.add_option("case", directory, "What make_case.py wrote")->required();
  app.add_option("--json", json, "Write the result to this file");
  app.add_flag("--cpu", cpu, "In fp32 on the CPU, instead of bf16 on the GPU");
  CLI11_PARSE(app, argc, argv);
  const DeviceKind device = cpu ? DeviceKind::kCpu : DeviceKind::kCuda;
  if (absl::Status s = OpenDevice(device, 0); !s.ok()) {
    std::fprintf(stderr, "loss_parity: %s\n", s.ToString().c_str());
    return 1;
  }
  GoldenCase golden = LoadGoldenCase(directory, cpu ? DType::kF32 : DType::kBF16);
  golden.options.device = device;
  golden.options.deterministic = false;
  const auto oracle = golden.json["losses"].get<std::vector<double>>();
  const double fall = Fall(oracle), limit = kShareOfFall * fall;

  Json runs = Json::array();
  bool good = fall >= kLeastFall;
  const auto check = [&](const char* name, bool learn, bool expect_pass) {
    const RunLosses run = Train(golden, learn);
    const double difference = MeanDifference(run.losses, oracle);
    const bool passes = difference <= limit;
    good = good && passes == expect_pass;
    std::printf(
        "%-28s loss %.4f -> %.4f (oracle %.4f -> %.4f), mean difference %.5f = %.2f %% of "
        "the fall, %s, %.1f s\n",
        name, run.losses.front(), run.losses.back(), oracle.front(), oracle.back(), difference,
        100 * difference / fall, passes == expect_pass ? "as it must be" : "WRONG", run.seconds);
    runs.push_back({{"run", name}, {"losses", run.losses}, {"mean_difference", difference}});
  };
  golden.options.fused_lora = true;
  golden.options.resident = !cpu;
  check("fused, kept expanded", true, true);
  golden.options.resident = false;
  check("fused, expanded at use", true, true);
  golden.options.fused_lora = false;
  check("separate products", true, true);
  if (!cpu) {
    golden.options.spec.mutable_quantization()->set_fp8_products(true);
    check("products of 8-bit floats", true, true);
    golden.options.spec.mutable_quantization()->set_fp8_products(false);
  }
  check("control: learning rate 0", false, false);
  std::printf("the oracle's loss falls by %.3f nats over %zu steps (at least %.1f): %s\n", fall,
              oracle.size(), kLeastFall, good ? "parity" : "NO PARITY");
  if (!json.empty()) {
    std::ofstream(json) << Json{{"fall", fall}, {"oracle", oracle}, {"runs", runs}}.dump() << "\n";
  }
  return good ? 0 : 1;
}

}  // namespace
}  // namespace attune

int main(int argc, char** argv) {
  return attune::Main(argc, argv);
}
