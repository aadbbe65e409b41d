// train_bench: optimiser steps of a full-size model with random weights on one GPU, through the
// engine that trains jobs, beside the limit that the same run measures: the frozen matrix products
// and the attention of such a step, back to back, and nothing else ("frozen roof").
//
// Prints a line and, with --json, a JSON object per configuration. Memory is the driver's, less
// what was in use before the engine was made. Every step has fresh random tokens.
#include <omp.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <random>
#include <utility>

#include "kernels/attention/attention.h"
#include "kernels/core/op_trace.h"
#include "kernels/matmul/matmul.h"
#include "proto/job_spec.h"
#include "worker/io/json.h"
#include "worker/memory/device.h"
#include "worker/train/engine.h"
#include "worker/train/placement.h"

namespace attune {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point from) {
  return std::chrono::duration<double>(Clock::now() - from).count();
}

struct Flags {
  std::string model = "8b", target = "all-linear";
  int64_t batch = 8, sequence = 2048, micro_tokens = 0;
  int64_t r = 16;
  int64_t steps = 6, warm_up = 2;
  bool dense = false, fp8 = false, resident = false, prefetch = false, separate = false,
       deterministic = false;
  ActivationPolicy policy;
  int64_t logits_mib = 512;
  double roof_s = 0, memory_gib = 0, host_gib = 0;
  bool embedding_on_host = false;
  bool profile = false, log_normal = false;
  int device = 0, rank = 0, ranks = 1;
  std::string rendezvous;
  bool share_weights = false;
  bool collectives = false;  // never out of each other's memory
  bool launches = false, wait = false;
  int compare = 0;
  std::string json, label;
};

// ---- Models ----

ModelConfig ConfigOf(const std::string& name) {
  ModelConfig c;
  const auto set = [&](int64_t hidden, int64_t layers, int64_t heads, int64_t kv, int64_t d,
                       int64_t ff, int64_t vocab, bool tied) {
    c.hidden_size = hidden;
    c.num_layers = layers;
    c.num_heads = heads;
    c.num_kv_heads = kv;
    c.head_dim = d;
    c.intermediate_size = ff;
    c.vocab_size = vocab;
    c.tied_embeddings = tied;
  };
  c.rms_norm_eps = 1e-5;
  if (name == "8b") set(4096, 32, 32, 8, 128, 14336, 128256, false);  // Llama-3.1-8B
  if (name == "1b") set(2048, 16, 32, 8, 64, 8192, 128256, true);     // Llama-3.2-1B
  if (name == "0.6b") {                                               // Qwen3-0.6B
    set(1024, 28, 16, 8, 128, 3072, 151936, true);
    c.qk_norm = true;
  }
  return c;
}

int64_t QkvRows(const ModelConfig& c) {
  return c.q_size() + 2 * c.kv_size();
}

WeightNames Names() {
  WeightNames names{.embedding = "embedding", .final_norm = "norm", .head = "head"};
  names.norm = [](int64_t, BlockNorm norm) {
    return norm == BlockNorm::kQ || norm == BlockNorm::kK ? "head_norm" : "norm";
  };
  names.linear = [](int64_t i, Linear linear) {
    constexpr const char* kNames[] = {"q", "k", "v", "o", "gate", "up", "down"};
    return "layers." + std::to_string(i) + "." + kNames[static_cast<int>(linear)];
  };
  return names;
}

// Normal values with deviation 0.02, as bf16. All tensors are windows of one buffer, each layer's
// at another place.
class RandomWeights : public WeightSource {
 public:
  explicit RandomWeights(const ModelConfig& config) : config_(config) {
    const int64_t largest =
        std::max(config.vocab_size, config.intermediate_size) * config.hidden_size;
    values_.resize(largest + kSlack);
    const int64_t parts = 64, n = static_cast<int64_t>(values_.size());
#pragma omp parallel for
    for (int64_t part = 0; part < parts; ++part) {
      std::mt19937_64 rng(part);
      std::normal_distribution<float> normal(0.0f, 0.02f);
      // A table drawn from at random: eight times as fast, and as good for this.
      std::vector<BFloat16> table(1 << 16);
      for (BFloat16& value : table) value = BFloat16(normal(rng));
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i += 4) {
        const uint64_t bits = rng();
        for (int64_t j = 0; j < 4 && i + j < n; ++j) {
          values_[i + j] = table[(bits >> (16 * j)) & 0xffff];
        }
      }
    }
    ones_.assign(config.hidden_size, BFloat16(1.0f));
  }

  absl::StatusOr<TensorView> Find(const std::string& name) const override {
    const int64_t C = config_.hidden_size;
    const auto at = [](const BFloat16* p) { return const_cast<BFloat16*>(p); };
    if (name == "norm.weight" || name == "norm") {
      return TensorView(at(ones_.data()), DType::kBF16, {C});
    }
    if (name == "head_norm") return TensorView(at(ones_.data()), DType::kBF16, {config_.head_dim});
    if (name == "embedding" || name == "head") {
      return TensorView(at(values_.data()), DType::kBF16, {config_.vocab_size, C});
    }
    std::string kind = name.substr(name.find('.', 7) + 1);
    kind = kind.substr(0, kind.find('.'));
    constexpr const char* kNames[] = {"q", "k", "v", "o", "gate", "up", "down"};
    int linear = 0;
    while (kind != kNames[linear]) ++linear;
    const LinearShape shape = ShapeOf(config_, static_cast<Linear>(linear));
    const int64_t offset = std::stoll(name.substr(7)) * 8191 * 8 % kSlack / 8 * 8;
    return TensorView(at(values_.data() + offset), DType::kBF16, {shape.out, shape.in});
  }

 private:
  static constexpr int64_t kSlack = int64_t{1} << 22;
  ModelConfig config_;
  std::vector<BFloat16> values_, ones_;
};

// ---- Steps ----

// Lengths of documents that fill T tokens: all `sequence`, or log-normal as chats are (median 600
// tokens, deviation 1.1 of the logarithm, 40 to 16,384).
std::vector<int64_t> Lengths(const Flags& flags, std::mt19937_64* rng) {
  std::vector<int64_t> lengths;
  std::lognormal_distribution<double> draw(std::log(600.0), 1.1);
  for (int64_t left = flags.micro_tokens; left > 0; left -= lengths.back()) {
    const double length = flags.log_normal ? std::clamp(draw(*rng), 40.0, 16384.0)
                                           : static_cast<double>(flags.sequence);
    lengths.push_back(std::min(left, static_cast<int64_t>(length)));
  }
  return lengths;
}

Pack RandomPack(const Flags& flags, int64_t vocab, std::mt19937_64* rng) {
  const int64_t T = flags.micro_tokens;
  Pack pack;
  pack.ids.resize(T);
  pack.targets.resize(T);
  pack.positions.resize(T);
  int64_t begin = 0;
  for (int64_t length : Lengths(flags, rng)) {
    pack.q_begin.push_back(static_cast<int32_t>(begin));
    for (int64_t t = 0; t < length; ++t) {
      pack.ids[begin + t] = static_cast<int32_t>(3 + (*rng)() % (vocab - 4));
      pack.positions[begin + t] = static_cast<int32_t>(t);
    }
    begin += length;
  }
  pack.q_begin.push_back(static_cast<int32_t>(T));
  pack.num_segments = static_cast<int32_t>(pack.q_begin.size()) - 1;
  for (int64_t t = 0; t < T; ++t) {
    const bool last = t + 1 == T || pack.positions[t + 1] == 0;
    pack.targets[t] = last ? -1 : pack.ids[t + 1];
    pack.trained_tokens += last ? 0 : 1;
  }
  return pack;
}

EngineOptions OptionsOf(const Flags& flags) {
  v1::JobSpec spec;
  spec.mutable_lora()->set_r(flags.r);
  spec.mutable_lora()->set_alpha(static_cast<double>(flags.r));
  spec.mutable_batch()->set_micro_batch_tokens(flags.micro_tokens);
  spec.mutable_quantization()->set_weights(flags.dense ? v1::WEIGHT_FORMAT_NONE
                                                       : v1::WEIGHT_FORMAT_NF4);
  spec.mutable_quantization()->set_fp8_products(flags.fp8);
  ApplyDefaults("bench", &spec);
  EngineOptions options{.device = DeviceKind::kCuda,
                        .dtype = DType::kBF16,
                        .deterministic = flags.deterministic,
                        .fused_lora = !flags.separate,
                        .resident = flags.resident,
                        .prefetch = flags.prefetch,
                        .shards = flags.share_weights ? flags.ranks : 1,
                        .shard = flags.share_weights ? flags.rank : 0,
                        .embedding_on_host = flags.embedding_on_host,
                        .activations = flags.policy,
                        .logits_bytes = flags.logits_mib << 20,
                        .model = ConfigOf(flags.model),
                        .names = Names(),
                        .spec = spec};
  options.adapters =
      SelectAdapters(
          options.model, options.names,
          {.r = flags.r, .alpha = static_cast<double>(flags.r), .target_modules = {flags.target}})
          .value();
  return options;
}

struct StepTimes {
  double load_s = 0, first_step_s = 0, median_s = 0;
  double pass_host_s = 0;  // the host's, until a pass is on its way
  double loss = 0, grad_norm = 0;
  double peak_gib = 0, arena_gib = 0, host_gib = 0;
  double tokens_per_s = 0, predicted_tokens_per_s = 0;
  double tflops = 0;      // of the model's own products and attention, recomputation not counted
  std::string placement;  // if it was chosen
};

// Floating-point operations of a step of the frozen model, forward and backward (dx only): 4 for
// each weight and token, and of causal attention 7 products of d per head and pair of tokens.
double StepFlops(const ModelConfig& c, absl::Span<const Pack> packs) {
  const double weights =
      static_cast<double>(c.num_layers) *
          static_cast<double>(c.hidden_size * (QkvRows(c) + c.q_size() + 3 * c.intermediate_size)) +
      static_cast<double>(c.hidden_size * c.vocab_size);
  double flops = 0;
  for (const Pack& pack : packs) {
    flops += 4 * weights * static_cast<double>(pack.ids.size());
    for (int32_t i = 0; i < pack.num_segments; ++i) {
      const double length = pack.q_begin[i + 1] - pack.q_begin[i];
      flops += 7 * static_cast<double>(c.num_layers * c.q_size()) * length * length;
    }
  }
  return flops;
}

int64_t UsedBytes() {
  const DeviceMemory memory = QueryDeviceMemory(DeviceKind::kCuda).value();
  return memory.total_bytes - memory.free_bytes;
}

void PrintProfile(Engine* engine, double seconds, const OpTrace& trace) {
  double sum = 0;
  const auto rows = trace.Rows(engine->context().exec);
  for (const auto& row : rows) sum += row.total_s;
  std::printf("  profile of one step, %.1f ms of ops in %.1f ms\n", sum * 1e3, seconds * 1e3);
  for (const auto& row : rows) {
    if (row.total_s < 0.0015 * sum) break;
    std::printf("    %6.2f %%  %8.2f ms  %5lld x %8.1f us  %s\n", 100 * row.total_s / sum,
                row.total_s * 1e3, static_cast<long long>(row.calls),
                row.total_s * 1e6 / static_cast<double>(row.calls), row.name.c_str());
  }
}

// As the flags place it, or with --memory-gib as a job would be placed within that.
absl::StatusOr<v1::MemoryEstimate> PlanOf(const Flags& flags, const RandomWeights& weights,
                                          const DeviceRates& rates, EngineOptions* options) {
  if (flags.memory_gib > 0) {
    std::printf("link to the host: %.1f GB/s\n", rates.host_copy_bytes_per_s / 1e9);
    const auto bytes = [](double gib) {
      return static_cast<int64_t>(gib * static_cast<double>(1 << 30));
    };
    const PlacementLimits limits{
        .device_bytes = bytes(flags.memory_gib),
        .host_bytes = flags.host_gib > 0
                          ? bytes(flags.host_gib)
                          : QueryDeviceMemory(DeviceKind::kCpu).value().total_bytes / 2};
    const double context = static_cast<double>(std::min(flags.sequence, flags.micro_tokens));
    absl::StatusOr<v1::MemoryEstimate> chosen = ChoosePlacement(limits, rates, context, options);
    if (!chosen.ok()) return chosen.status();
    // Loading takes scratch that shapes alone do not show.
    absl::StatusOr<v1::MemoryEstimate> plan = Engine::Plan(*options, weights);
    if (plan.ok()) plan->set_placement(chosen->placement());
    return plan;
  }
  return Engine::Plan(*options, weights);
}

absl::StatusOr<std::unique_ptr<Communicator>> Join(const Flags& flags) {
  if (flags.ranks == 1) return NewSelfCommunicator();
  const std::unique_ptr<RendezvousStore> store = NewDirectoryStore(flags.rendezvous);
  return NewNcclCommunicator({.rank = flags.rank, .size = flags.ranks}, store.get());
}

// How steps are run: as a trainer does, but for what is switched off.
struct Mode {
  bool replay = true;  // passes as CUDA graphs
  bool ahead = true;   // a step's loss is read when the next one's first pass is on its way
};

// Of an even number the mean of the two in the middle: of two steps, where the host fills the
// second one's pass before it reads the first one's loss, that takes too long and this too short.
double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

// Steps one after the other, and how long they take.
class StepLoop {
 public:
  StepLoop(const Flags& flags, Engine* engine, Communicator* comm)
      : flags_(flags), engine_(engine), comm_(comm), rng_(1 + flags.rank) {}

  void SetMode(const Mode& mode) {
    mode_ = mode;
    engine_->SetReplay(mode.replay);
  }
  // All of them read at the end.
  absl::Status Steps(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (absl::Status s = Step(); !s.ok()) return s;
    }
    return Read();
  }
  void Forget() {
    times_.clear();
    host_.clear();
    flops_ = 0;
  }
  const StepResult& last() const { return last_; }
  double StepSeconds() const { return Median(times_); }
  double PassHostSeconds() const { return Median(host_); }
  double Tflops() const {
    double seconds = 0;
    for (double time : times_) seconds += time;
    return flops_ / seconds / 1e12;
  }

 private:
  absl::Status Step() {
    const Clock::time_point begin = Clock::now();
    std::vector<Pack> packs;
    StepInput input{.step = step_++, .learning_rate = 1e-4};
    const int64_t micro = flags_.batch * flags_.sequence / flags_.micro_tokens;
    for (int64_t k = 0; k < micro; ++k) {
      packs.push_back(RandomPack(flags_, engine_->model().config().vocab_size, &rng_));
      input.trained_tokens += flags_.ranks * packs.back().trained_tokens;
    }
    flops_ += StepFlops(engine_->model().config(), packs);
    engine_->BeginStep(input);
    for (int64_t k = 0; k < micro; ++k) {
      const Clock::time_point pass = Clock::now();
      engine_->TrainPass({&packs[k], k}, comm_);
      if (k == 0) host_.push_back(Seconds(pass));
      if (absl::Status s = Read(); !s.ok()) return s;
    }
    if (absl::Status s = engine_->EndStep(/*stop_requested=*/false, comm_); !s.ok()) return s;
    begin_ = begin;
    unread_ = true;
    return mode_.ahead ? absl::OkStatus() : Read();
  }

  absl::Status Read() {
    if (!std::exchange(unread_, false)) return absl::OkStatus();
    last_ = engine_->ReadStep();
    const Clock::time_point now = Clock::now();
    const std::chrono::duration<double> time = now - std::max(begin_, last_read_);
    times_.push_back(time.count());
    last_read_ = now;
    return comm_->Wait();
  }

  const Flags& flags_;
  Engine* engine_;
  Communicator* comm_;
  std::mt19937_64 rng_;
  Mode mode_;
  int64_t step_ = 0;
  bool unread_ = false;
  Clock::time_point begin_, last_read_;
  StepResult last_;
  std::vector<double> times_, host_;
  double flops_ = 0;
};

// The modes in turn, several times over, so that all see the same clocks.
absl::Status Compare(const Flags& flags, StepLoop* loop) {
  constexpr Mode kModes[] = {{false, false}, {true, false}, {false, true}, {true, true}};
  std::vector<double> step_s[std::size(kModes)], host_s[std::size(kModes)];
  for (int round = 0; round < flags.compare; ++round) {
    for (size_t i = 0; i < std::size(kModes); ++i) {
      loop->SetMode(kModes[i]);
      if (absl::Status s = loop->Steps(2); !s.ok()) return s;  // recorded by then
      loop->Forget();
      if (absl::Status s = loop->Steps(flags.steps); !s.ok()) return s;
      step_s[i].push_back(loop->StepSeconds());
      host_s[i].push_back(loop->PassHostSeconds());
    }
  }
  for (size_t i = 0; i < std::size(kModes); ++i) {
    std::printf("  %-8s %-5s step %9.3f ms (", kModes[i].replay ? "graphs" : "launches",
                kModes[i].ahead ? "ahead" : "wait", Median(step_s[i]) * 1e3);
    for (double s : step_s[i]) std::printf(" %.3f", s * 1e3);
    std::printf(" ), host %.3f ms a pass\n", Median(host_s[i]) * 1e3);
  }
  return absl::OkStatus();
}

absl::StatusOr<StepTimes> Run(const Flags& flags, const RandomWeights& weights) {
  EngineOptions options = OptionsOf(flags);
  const DeviceRates rates = flags.share_weights ? RatesOf(DeviceName()) : MeasureRates();
  absl::StatusOr<v1::MemoryEstimate> plan = PlanOf(flags, weights, rates, &options);
  if (!plan.ok()) return plan.status();
  const int64_t before = UsedBytes();
  StepTimes out;
  out.placement = plan->placement();
  out.predicted_tokens_per_s =
      static_cast<double>(flags.micro_tokens) /
      PredictMicroBatchSeconds(options, rates,
                               static_cast<double>(std::min(flags.sequence, flags.micro_tokens)));
  const Clock::time_point start = Clock::now();
  auto engine = Engine::Create(options, weights, plan->peak_bytes(), [] {});
  if (!engine.ok()) return engine.status();
  Synchronize((*engine)->context().exec);
  out.load_s = Seconds(start);
  absl::StatusOr<std::unique_ptr<Communicator>> comm = Join(flags);
  if (!comm.ok()) return comm.status();
  if (flags.share_weights && !flags.collectives) {
    if (absl::Status s = (*engine)->ShareWeights(comm->get()); !s.ok()) return s;
  }
  StepLoop loop(flags, engine->get(), comm->get());
  loop.SetMode({.replay = !flags.launches, .ahead = !flags.wait});
  for (int64_t i = 0; i < flags.warm_up; ++i) {
    if (absl::Status s = loop.Steps(1); !s.ok()) return s;
    if (i == 0) out.first_step_s = Seconds(start);
  }
  if (flags.compare > 0) {
    if (absl::Status s = Compare(flags, &loop); !s.ok()) return s;
  }
  loop.Forget();
  if (absl::Status s = loop.Steps(flags.steps); !s.ok()) return s;
  out.loss = loop.last().loss;
  out.grad_norm = loop.last().grad_norm;
  out.peak_gib = static_cast<double>(UsedBytes() - before) / (1 << 30);
  out.arena_gib = static_cast<double>(plan->peak_bytes()) / (1 << 30);
  out.host_gib =
      static_cast<double>((*engine)->model().HostBytes((*engine)->context(), flags.micro_tokens)) /
      (1 << 30);
  out.median_s = loop.StepSeconds();
  out.pass_host_s = loop.PassHostSeconds();
  out.tokens_per_s = static_cast<double>(flags.batch * flags.sequence) / out.median_s;
  out.tflops = loop.Tflops();
  if (flags.profile) {
    OpTrace trace;
    loop.SetMode({.ahead = false});
    (*engine)->SetTrace(&trace);
    loop.Forget();
    if (absl::Status s = loop.Steps(1); !s.ok()) return s;
    (*engine)->SetTrace(nullptr);
    PrintProfile(engine->get(), loop.StepSeconds(), trace);
  }
  return out;
}

// ---- The roof ----

// The products and the attention of the frozen model, forward and backward, at the shapes of a
// step: no adapter, no norm, no optimiser, nothing kept.
class Roof {
 public:
  Roof(const ModelConfig& c, int64_t tokens, int64_t sequence, Arena* arena)
      : config_(c), tokens_(tokens), arena_(arena) {
    exec_ = {.device = DeviceKind::kCuda, .plan = arena->plan(), .deterministic = false};
    if (!exec_.plan) exec_.stream = NewStream(DeviceKind::kCuda);
    const int64_t S = std::max<int64_t>(tokens / sequence, 1);
    std::vector<int32_t> begin, length(S, static_cast<int32_t>(std::min(sequence, tokens))),
        zero(S, 0);
    for (int64_t s = 0; s <= S; ++s) begin.push_back(static_cast<int32_t>(s * length[0]));
    const auto ints = [&](const std::vector<int32_t>& values) {
      const TensorView view = Take(DType::kI32, {static_cast<int64_t>(values.size())});
      CopyToDevice(exec_, values.data(), view);
      return view;
    };
    segments_ = {.num_segments = ints({static_cast<int32_t>(S)}),
                 .q_begin = ints(begin),
                 .k_begin = ints({begin.begin(), begin.end() - 1}),
                 .k_length = ints(length),
                 .q_offset = ints(zero),
                 .whole = true};
    wide_ = std::max({QkvRows(c), 2 * c.intermediate_size, c.hidden_size});
    a_ = Random(tokens * wide_);
    w_ = Random(wide_ * std::max(c.hidden_size, c.intermediate_size));
    d_ = Take(DType::kBF16, {tokens * wide_});
    head_ = Random(c.vocab_size * c.hidden_size);
    logits_ = Random(kHeadRows * c.vocab_size);
    q_ = Random(tokens * c.q_size());
    kv_ = Random(4 * tokens * c.kv_size());
    o_ = Take(DType::kBF16, {2 * tokens * c.q_size()});
    lse_ = Take(DType::kF32, {tokens, c.num_heads});
    workspace_ = Take(DType::kU8, {kWorkspaceBytes});
  }

  void Step() {
    const ModelConfig& c = config_;
    for (int64_t i = 0; i < c.num_layers; ++i) {
      Product(c.hidden_size, QkvRows(c));
      Attention(/*backward=*/false);
      Product(c.q_size(), c.hidden_size);
      Product(c.hidden_size, 2 * c.intermediate_size);
      Product(c.intermediate_size, c.hidden_size);
      Attention(/*backward=*/true);
      InputGradient(c.hidden_size, QkvRows(c));
      InputGradient(c.q_size(), c.hidden_size);
      InputGradient(c.hidden_size, 2 * c.intermediate_size);
      InputGradient(c.intermediate_size, c.hidden_size);
    }
    for (int64_t t = 0; t < tokens_; t += kHeadRows) Head(std::min(kHeadRows, tokens_ - t));
  }
  const Exec& exec() const { return exec_; }

 private:
  static constexpr int64_t kHeadRows = 2048;
  static constexpr int64_t kWorkspaceBytes = int64_t{1} << 30;

  TensorView Take(DType dtype, std::initializer_list<int64_t> shape) {
    return arena_->New(ArenaEnd::kBottom, MemoryClass::kWorkspace, dtype, shape);
  }
  TensorView Random(int64_t n) {
    const TensorView out = Take(DType::kBF16, {n});
    if (exec_.plan) return out;
    std::vector<BFloat16> values(n);
#pragma omp parallel for
    for (int64_t part = 0; part < 64; ++part) {
      std::mt19937_64 rng(part);
      for (int64_t i = n * part / 64; i < n * (part + 1) / 64; ++i) {
        values[i] = BFloat16(static_cast<float>(static_cast<int64_t>(rng())) * 0x1p-66f);
      }
    }
    CopyToDevice(exec_, values.data(), out);
    return out;
  }
  static TensorView As(const TensorView& flat, int64_t rows, int64_t columns) {
    return flat.Slice(0, 0, rows * columns).Reshape({rows, columns});
  }
  static TensorView AsHeads(const TensorView& flat, int64_t begin, int64_t t, int64_t h,
                            int64_t d) {
    return flat.Slice(0, begin, begin + t * h * d).Reshape({t, h, d});
  }
  void Multiply(MatMulArgs args) {
    args.workspace = workspace_;
    MatMul(exec_, args);
  }
  void Product(int64_t in, int64_t out) {
    Multiply({.a = As(a_, tokens_, in),
              .b = As(w_, out, in),
              .d = As(d_, tokens_, out),
              .trans_b = true});
  }
  void InputGradient(int64_t in, int64_t out) {
    Multiply({.a = As(a_, tokens_, out), .b = As(w_, out, in), .d = As(d_, tokens_, in)});
  }
  void Head(int64_t rows) {
    const int64_t C = config_.hidden_size, V = config_.vocab_size;
    Multiply(
        {.a = As(a_, rows, C), .b = As(head_, V, C), .d = As(logits_, rows, V), .trans_b = true});
    Multiply({.a = As(logits_, rows, V), .b = As(head_, V, C), .d = As(d_, rows, C)});
  }
  void Attention(bool backward) {
    const ModelConfig& c = config_;
    const int64_t T = tokens_, D = c.head_dim, kv = T * c.kv_size();
    const AttentionOptions options{.scale = 1.0 / std::sqrt(static_cast<double>(D))};
    const TensorView q = AsHeads(q_, 0, T, c.num_heads, D);
    const TensorView k = AsHeads(kv_, 0, T, c.num_kv_heads, D),
                     v = AsHeads(kv_, kv, T, c.num_kv_heads, D);
    const TensorView o = AsHeads(o_, 0, T, c.num_heads, D);
    if (!backward) {
      return AttentionForward(exec_, {.q = q,
                                      .k = k,
                                      .v = v,
                                      .o = o,
                                      .lse = lse_,
                                      .segments = segments_,
                                      .options = options,
                                      .workspace = workspace_});
    }
    AttentionBackward(exec_, {.q = q,
                              .k = k,
                              .v = v,
                              .o = o,
                              .lse = lse_,
                              .d_o = o,
                              .dq = AsHeads(o_, T * c.q_size(), T, c.num_heads, D),
                              .dk = AsHeads(kv_, 2 * kv, T, c.num_kv_heads, D),
                              .dv = AsHeads(kv_, 3 * kv, T, c.num_kv_heads, D),
                              .segments = segments_,
                              .options = options,
                              .workspace = workspace_});
  }

  ModelConfig config_;
  int64_t tokens_, wide_ = 0;
  Arena* arena_;
  Exec exec_;
  AttentionSegments segments_;
  TensorView a_, w_, d_, head_, logits_, q_, kv_, o_, lse_, workspace_;
};

absl::StatusOr<double> RoofTokensPerSecond(const Flags& flags) {
  const ModelConfig config = ConfigOf(flags.model);
  const int64_t tokens = flags.batch * flags.sequence;
  Arena plan = Arena::Plan();
  Roof(config, tokens, flags.sequence, &plan);
  absl::StatusOr<Arena> arena = Arena::Allocate(DeviceKind::kCuda, plan.peak().total);
  if (!arena.ok()) return arena.status();
  Roof roof(config, tokens, flags.sequence, &*arena);
  for (int i = 0; i < 2; ++i) roof.Step();
  Synchronize(roof.exec());
  const Clock::time_point begin = Clock::now();
  int64_t steps = 0;
  while (Seconds(begin) < flags.roof_s) {
    roof.Step();
    Synchronize(roof.exec());
    ++steps;
  }
  return static_cast<double>(tokens * steps) / Seconds(begin);
}

// ---- Rows ----

const char* WeightsName(const Flags& flags) {
  if (flags.fp8) return flags.dense ? "bf16, fp8 products" : "nf4, fp8 products";
  return flags.dense ? "bf16" : "nf4";
}

void Report(const Flags& flags, const StepTimes& t, double roof) {
  std::printf(
      "%s %s r%lld %lldx%lld micro %lld%s%s%s host %lld/%lld rebuilt %lld/%lld/%lld tile %lld: "
      "%.0f tok/s, step %.1f ms, "
      "%.2f GiB (arena %.2f, host %.2f), loss %.4f, grad norm %.4f, load %.2f s, first step "
      "ends at %.2f s",
      flags.model.c_str(), WeightsName(flags), static_cast<long long>(flags.r),
      static_cast<long long>(flags.batch), static_cast<long long>(flags.sequence),
      static_cast<long long>(flags.micro_tokens),
      flags.resident   ? " expanded"
      : flags.prefetch ? " prefetch"
                       : "",
      flags.separate ? " separate" : "", flags.deterministic ? " deterministic" : "",
      static_cast<long long>(flags.policy.streams_on_host),
      static_cast<long long>(flags.policy.gate_ups_on_host),
      static_cast<long long>(flags.policy.gate_ups_rebuilt),
      static_cast<long long>(flags.policy.projections_rebuilt),
      static_cast<long long>(flags.policy.layers_rebuilt),
      static_cast<long long>(flags.policy.mlp_tile), t.tokens_per_s, t.median_s * 1e3, t.peak_gib,
      t.arena_gib, t.host_gib, t.loss, t.grad_norm, t.load_s, t.first_step_s);
  std::printf(", predicted %.0f tok/s, %.1f TFLOP/s, host %.2f ms a pass", t.predicted_tokens_per_s,
              t.tflops, t.pass_host_s * 1e3);
  if (flags.log_normal) std::printf(", log-normal lengths");
  if (flags.ranks > 1) {
    std::printf(", each of %d ranks%s", flags.ranks,
                flags.share_weights ? " that share the weights" : "");
  }
  if (!t.placement.empty()) std::printf(", placed: %s", t.placement.c_str());
  if (roof > 0) std::printf(", %.1f %% of the frozen roof %.0f", 100 * t.tokens_per_s / roof, roof);
  std::printf("\n");
  std::fflush(stdout);
  if (flags.json.empty()) return;
  const Json row = {{"label", flags.label},
                    {"ranks", flags.ranks},
                    {"share_weights", flags.share_weights},
                    {"model", flags.model},
                    {"weights", WeightsName(flags)},
                    {"r", flags.r},
                    {"target", flags.target},
                    {"batch", flags.batch},
                    {"sequence", flags.sequence},
                    {"micro_batch_tokens", flags.micro_tokens},
                    {"expanded", flags.resident},
                    {"prefetch", flags.prefetch},
                    {"streams_on_host", flags.policy.streams_on_host},
                    {"gate_ups_on_host", flags.policy.gate_ups_on_host},
                    {"gate_ups_rebuilt", flags.policy.gate_ups_rebuilt},
                    {"projections_rebuilt", flags.policy.projections_rebuilt},
                    {"layers_rebuilt", flags.policy.layers_rebuilt},
                    {"mlp_tile", flags.policy.mlp_tile},
                    {"heads_saved", flags.policy.heads_saved},
                    {"logits_mib", flags.logits_mib},
                    {"placement", t.placement},
                    {"device", DeviceName()},
                    {"tokens_per_s", t.tokens_per_s},
                    {"predicted_tokens_per_s", t.predicted_tokens_per_s},
                    {"tflops", t.tflops},
                    {"log_normal", flags.log_normal},
                    {"step_s", t.median_s},
                    {"launches", flags.launches},
                    {"wait", flags.wait},
                    {"pass_host_s", t.pass_host_s},
                    {"peak_gib", t.peak_gib},
                    {"arena_gib", t.arena_gib},
                    {"host_gib", t.host_gib},
                    {"loss", t.loss},
                    {"grad_norm", t.grad_norm},
                    {"load_s", t.load_s},
                    {"first_step_s", t.first_step_s},
                    {"frozen_roof_tokens_per_s", roof}};
  std::ofstream(flags.json, std::ios::app) << row.dump() << "\n";
}

int Main(int argc, char** argv) {
  CLI::App app("Training steps of a full-size model with random weights on one GPU");
  Flags flags;
  app.add_option("--model", flags.model)->check(CLI::IsMember({"8b", "1b", "0.6b"}));
  app.add_option("--batch", flags.batch, "Sequences per optimiser step");
  app.add_option("--sequence", flags.sequence, "Tokens of each");
  app.add_flag("--log-normal", flags.log_normal, "Documents of log-normal lengths, packed");
  app.add_option("--micro-tokens", flags.micro_tokens, "Tokens per pack [batch x sequence]");
  app.add_option("--rank", flags.r, "LoRA rank");
  app.add_option(
      "--target", flags.target,
      "Its layers [all-linear]; layers.0.q alone leaves little but the frozen model's own "
      "forward and backward pass");
  app.add_option("--steps", flags.steps, "Timed");
  app.add_option("--warm-up", flags.warm_up, "Steps before them");
  app.add_flag("--dense", flags.dense, "bf16 base instead of NF4");
  app.add_flag("--fp8", flags.fp8, "Products of 8-bit floats with the frozen linear weights");
  app.add_flag("--expanded", flags.resident, "Keep the NF4 values expanded");
  app.add_flag("--prefetch", flags.prefetch, "Expand NF4 weights one ahead");
  app.add_flag("--embedding-on-host", flags.embedding_on_host);
  app.add_flag("--separate", flags.separate, "Base and adapter as separate products");
  app.add_flag("--deterministic", flags.deterministic);
  app.add_option("--streams-on-host", flags.policy.streams_on_host, "Layers");
  app.add_option("--gate-ups-on-host", flags.policy.gate_ups_on_host, "Layers");
  app.add_option("--gate-ups-rebuilt", flags.policy.gate_ups_rebuilt, "Layers");
  app.add_option("--projections-rebuilt", flags.policy.projections_rebuilt,
                 "Layers that keep their inputs and what attention gave");
  app.add_option("--layers-rebuilt", flags.policy.layers_rebuilt,
                 "Other layers, that keep their inputs alone");
  app.add_flag("--heads-saved", flags.policy.heads_saved, "q and k behind their norms, too");
  app.add_option("--mlp-tile", flags.policy.mlp_tile, "Tokens that an MLP takes at a time [all]");
  app.add_option("--logits-mib", flags.logits_mib, "Logits that exist at once");
  app.add_option("--roof", flags.roof_s, "Measure the frozen roof, for so many seconds");
  app.add_option("--memory-gib", flags.memory_gib,
                 "Choose the placement, within this much device memory");
  app.add_option("--host-gib", flags.host_gib, "And this much pinned host memory [half of all]");
  app.add_option("--device", flags.device, "Which GPU");
  app.add_option("--ranks", flags.ranks, "Processes that train together, each on its batch");
  app.add_option("--my-rank", flags.rank, "Which of them this is; 0 prints");
  app.add_option("--rendezvous", flags.rendezvous, "A new directory that all of them see");
  app.add_flag("--share-weights", flags.share_weights, "Each has its share of the NF4 weights");
  app.add_flag("--collectives", flags.collectives, "Gather shares by NCCL, not by copies");
  app.add_flag("--launches", flags.launches, "No CUDA graphs");
  app.add_flag("--wait", flags.wait, "Read each step's loss before the next one begins");
  app.add_option("--compare", flags.compare, "With and without these two, so often in turn");
  app.add_flag("--profile", flags.profile, "Time every op of one more step");
  app.add_option("--json", flags.json, "Append a row to this file");
  app.add_option("--label", flags.label, "Of the row");
  CLI11_PARSE(app, argc, argv);
  if (flags.micro_tokens == 0) flags.micro_tokens = flags.batch * flags.sequence;
  if (absl::Status s = OpenDevice(DeviceKind::kCuda, flags.device); !s.ok()) {
    std::fprintf(stderr, "train_bench: %s\n", s.ToString().c_str());
    return 1;
  }
  omp_set_num_threads(std::max(1, omp_get_max_threads() / flags.ranks));  // as trainers share them
  double roof = 0;
  if (flags.roof_s > 0) {
    absl::StatusOr<double> measured = RoofTokensPerSecond(flags);
    if (measured.ok()) roof = *measured;
    if (!measured.ok()) std::fprintf(stderr, "roof: %s\n", measured.status().ToString().c_str());
  }
  const RandomWeights weights(ConfigOf(flags.model));
  absl::StatusOr<StepTimes> times = Run(flags, weights);
  if (!times.ok()) {
    std::fprintf(stderr, "train_bench: %s\n", times.status().ToString().c_str());
    return 1;
  }
  if (flags.rank == 0) Report(flags, *times, roof);
  return 0;
}

}  // namespace
}  // namespace attune

int main(int argc, char** argv) {
  return attune::Main(argc, argv);
}
