// load_bench: a checkpoint from the page cache to quantised weights on a GPU, by the engine that
// trains jobs, beside the two rates that bound it and that the same run measures: copies out of
// pinned memory, and reads of the checkpoint by all threads, which throw away what they read.
//
// Everything is done --repeat times, and each time is a JSON object on standard output. The first
// one also pins the ring of pieces, and where the checkpoint is not in the page cache, reads the
// disk. "ratio" is the whole of Engine::Create (device memory, adapters, optimiser, weights)
// against the pinned copy of as many bytes.
#include <omp.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <utility>

#include "proto/job_spec.h"
#include "worker/io/json.h"
#include "worker/memory/device.h"
#include "worker/model/checkpoint_source.h"
#include "worker/train/engine.h"

namespace attune {
namespace {

struct Flags {
  std::string model;
  bool dense = false;
  int64_t micro_tokens = 4096;
  int repeat = 3, device = 0;
  std::vector<int> threads;
  std::string label;
};

class Timer {
 public:
  double Seconds() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_ = Clock::now();
};

EngineOptions OptionsOf(const Flags& flags, const LoadedConfig& loaded) {
  v1::JobSpec spec;
  spec.mutable_batch()->set_micro_batch_tokens(flags.micro_tokens);
  spec.mutable_quantization()->set_weights(flags.dense ? v1::WEIGHT_FORMAT_NONE
                                                       : v1::WEIGHT_FORMAT_NF4);
  ApplyDefaults("bench", &spec);
  EngineOptions options{.device = DeviceKind::kCuda,
                        .dtype = DType::kBF16,
                        .model = loaded.config,
                        .names = loaded.names,
                        .spec = spec};
  options.adapters =
      SelectAdapters(
          options.model, options.names,
          {.r = spec.lora().r(), .alpha = spec.lora().alpha(), .target_modules = {"all-linear"}})
          .value();
  return options;
}

// Bytes a second of copies of 4 MiB out of pinned memory.
absl::StatusOr<double> PinnedRate() {
  constexpr int64_t kPiece = int64_t{4} << 20, kPieces = 16;
  absl::StatusOr<Arena> arena = Arena::Allocate(DeviceKind::kCuda, kPiece * kPieces);
  if (!arena.ok()) return arena.status();
  PinnedMemory host;
  if (absl::Status s = host.Allocate(DeviceKind::kCuda, kPiece * kPieces); !s.ok()) return s;
  const Exec exec{.device = DeviceKind::kCuda, .stream = NewStream(DeviceKind::kCuda)};
  const TensorView to =
      arena->New(ArenaEnd::kBottom, MemoryClass::kWorkspace, DType::kU8, {kPiece * kPieces});
  double best = 0;
  for (int round = 0; round < 10; ++round) {
    const Timer timer;
    constexpr int64_t kCopies = 128;
    for (int64_t i = 0; i < kCopies; ++i) {
      const int64_t begin = i % kPieces * kPiece;
      CopyFromPinned(exec, host.data() + begin, to.Slice(0, begin, begin + kPiece));
    }
    Synchronize(exec);
    best = std::max(best, static_cast<double>(kCopies * kPiece) / timer.Seconds());
  }
  return best;
}

// Bytes a second of reads of all tensors.
absl::StatusOr<double> ReadRate(const CheckpointWeights& weights) {
  const Checkpoint& checkpoint = weights.checkpoint();
  constexpr int64_t kPart = int64_t{512} << 10;
  std::vector<absl::Span<const uint8_t>> parts;
  for (const std::string& name : checkpoint.names()) {
    absl::StatusOr<TensorInfo> info = checkpoint.Find(name);
    if (!info.ok()) return info.status();
    for (size_t begin = 0; begin < info->bytes.size(); begin += kPart) {
      parts.push_back(info->bytes.subspan(begin, kPart));
    }
  }
  int failed = 0;
  const Timer timer;
#pragma omp parallel reduction(+ : failed)
  {
    std::vector<char> to(kPart);
#pragma omp for schedule(dynamic)
    for (const absl::Span<const uint8_t>& part : parts) {
      const auto bytes = static_cast<int64_t>(part.size());
      failed += weights.Read(part.data(), bytes, to.data()).ok() ? 0 : 1;
    }
  }
  if (failed > 0) return absl::UnavailableError("reading failed");
  return static_cast<double>(checkpoint.data_bytes()) / timer.Seconds();
}

absl::Status Run(const Flags& flags) {
  const Timer opening;
  if (absl::Status s = OpenDevice(DeviceKind::kCuda, flags.device); !s.ok()) return s;
  const double open_s = opening.Seconds();
  absl::StatusOr<LoadedConfig> loaded = LoadModelConfig(flags.model);
  if (!loaded.ok()) return loaded.status();
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(flags.model);
  if (!checkpoint.ok()) return checkpoint.status();
  const CheckpointWeights weights(*std::move(checkpoint));
  const EngineOptions options = OptionsOf(flags, *loaded);
  const absl::StatusOr<double> pinned = PinnedRate();
  if (!pinned.ok()) return pinned.status();
  const auto bytes = static_cast<double>(weights.checkpoint().data_bytes());
  for (int threads : flags.threads) {
    omp_set_num_threads(threads);
    for (int i = 0; i < flags.repeat; ++i) {
      const absl::StatusOr<double> read = ReadRate(weights);
      if (!read.ok()) return read.status();
      const Timer planning;
      absl::StatusOr<v1::MemoryEstimate> plan = Engine::Plan(options, weights);
      if (!plan.ok()) return plan.status();
      const double plan_s = planning.Seconds();
      const Timer timer;
      auto engine = Engine::Create(options, weights, plan->peak_bytes(), [] {});
      if (!engine.ok()) return engine.status();
      const double load_s = timer.Seconds();
      const LoadTimes& times = (*engine)->load_times();
      const Json row = {{"label", flags.label},
                        {"device", DeviceName()},
                        {"weights", flags.dense ? "bf16" : "nf4"},
                        {"threads", threads},
                        {"gb", bytes * 1e-9},
                        {"arena_gb", static_cast<double>(plan->peak_bytes()) * 1e-9},
                        {"open_device_s", open_s},
                        {"pinned_gb_s", *pinned * 1e-9},
                        {"read_gb_s", *read * 1e-9},
                        {"plan_and_check_s", plan_s},
                        {"memory_s", times.memory_s},
                        {"adapters_s", times.adapters_s},
                        {"weights_s", times.weights_s},
                        {"load_s", load_s},
                        {"gb_s", bytes * 1e-9 / load_s},
                        {"ratio", bytes / load_s / *pinned}};
      std::printf("%s\n", row.dump().c_str());
      std::fflush(stdout);
    }
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  CLI::App app("A checkpoint to quantised weights on one GPU");
  Flags flags{.threads = {omp_get_max_threads()}};
  app.add_option("--model", flags.model, "Directory of a checkpoint")->required();
  app.add_flag("--dense", flags.dense, "Keep bf16 instead of NF4");
  app.add_option("--micro-tokens", flags.micro_tokens, "Of a pack: memory is taken for it");
  app.add_option("--repeat", flags.repeat)->check(CLI::Range(1, 1000));
  app.add_option("--threads", flags.threads, "How many read; several: one after the other [cores]")
      ->delimiter(',');
  app.add_option("--device", flags.device, "Which GPU");
  app.add_option("--label", flags.label, "Of the rows");
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "load_bench: %s\n", status.ToString().c_str());
  return 1;
}

}  // namespace
}  // namespace attune

int main(int argc, char** argv) {
  return attune::Main(argc, argv);
}
