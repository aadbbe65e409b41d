#include "worker/train/engine.h"

#include <chrono>
#include <utility>

#include "kernels/elementwise/elementwise.h"
#include "kernels/optimizer/optimizer.h"
#include "worker/model/peft_adapter.h"

namespace attune {
namespace {

// Places in AdapterSet::tail().
constexpr int64_t kTailLoss = 0;
constexpr int64_t kTailStop = 1;

WeightStorage StorageOf(const v1::QuantizationSpec& spec) {
  if (spec.weights() != v1::WEIGHT_FORMAT_NF4) return WeightStorage::kDense;
  return spec.double_quantization() ? WeightStorage::kNf4Double : WeightStorage::kNf4;
}

// Seconds since it was made or last asked.
class Lap {
 public:
  double operator()() {
    const Clock::time_point before = std::exchange(begin_, Clock::now());
    return std::chrono::duration<double>(begin_ - before).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_ = Clock::now();
};

// Writes host numbers into a view of f32 or f64.
void Upload(const Exec& exec, std::vector<double> values, const TensorView& to) {
  if (to.dtype == DType::kF64) return CopyToDevice(exec, values.data(), to);
  const std::vector<float> narrow(values.begin(), values.end());
  CopyToDevice(exec, narrow.data(), to);
}

std::vector<double> Download(const Exec& exec, const TensorView& from) {
  std::vector<double> values(from.size());
  if (from.dtype == DType::kF64) {
    CopyToHost(exec, from, values.data());
    return values;
  }
  std::vector<float> narrow(from.size());
  CopyToHost(exec, from, narrow.data());
  return std::vector<double>(narrow.begin(), narrow.end());
}

}  // namespace

Engine::Engine(const EngineOptions& options, Arena arena, bool plan)
    : options_(options), arena_(std::move(arena)) {
  ctx_ = {.exec = {.device = options.device,
                   .plan = plan,
                   .stream = plan ? nullptr : NewStream(options.device),
                   .deterministic = options.deterministic},
          .arena = &arena_,
          .dtype = options.dtype,
          .fused_lora = options.fused_lora && options.spec.lora().dropout() == 0 &&
                        !options.adapters.use_dora};
  adapters_ = std::make_unique<AdapterSet>(ctx_, options.adapters, /*train=*/true);
  optimizer_ = std::make_unique<Optimizer>(ctx_, *adapters_, options.spec);
  model_ = std::make_unique<Model>(ctx_, options.model,
                                   ModelOptions{.storage = StorageOf(options.spec.quantization()),
                                                .resident = options.resident,
                                                .prefetch = options.prefetch,
                                                .fp8 = options.spec.quantization().fp8_products(),
                                                .shards = options.shards,
                                                .shard = options.shard,
                                                .embedding_on_host = options.embedding_on_host,
                                                .activations = options.activations,
                                                .logits_bytes = options.logits_bytes},
                                   adapters_.get());
  method_ = NewMethod(options.spec);
  buffers_ = std::make_unique<PackBuffers>(ctx_, options.spec.batch().micro_batch_tokens(),
                                           model_->ropes());
  const auto scalar = [&](DType dtype, int64_t n) {
    return arena_.New(ArenaEnd::kBottom, MemoryClass::kWorkspace, dtype, {n});
  };
  grad_scale_ = scalar(ctx_.accumulator(), 1);
  step_pack_ = scalar(DType::kI32, 2);
  norm_sq_ = scalar(DType::kF64, 1);
  clip_scale_ = scalar(ctx_.accumulator(), 1);
  norm_ = scalar(ctx_.accumulator(), 1);
  evaluation_ = scalar(ctx_.accumulator(), 2);
  ctx_.dropout.seed = options.spec.seed();
  ctx_.dropout.step_pack = step_pack_;
}

absl::Status Engine::Load(const WeightSource& weights, const std::function<void()>& progress) {
  arena_.BeginPhase("load");
  const int64_t tokens = options_.spec.batch().micro_batch_tokens();
  Lap lap;
  if (absl::Status s = model_->TakeHostMemory(ctx_, tokens); !s.ok()) return s;
  if (!ctx_.exec.plan) {
    absl::Status s = results_.Allocate(options_.device, adapters_->tail().bytes() + norm_.bytes());
    if (!s.ok()) return s;
  }
  load_times_.memory_s += lap();
  adapters_->Initialise(ctx_, options_.spec.seed());
  optimizer_->Reset(ctx_);
  load_times_.adapters_s = lap();
  if (absl::Status s = model_->Load(ctx_, options_.names, weights, progress); !s.ok()) return s;
  Synchronize(ctx_.exec);
  load_times_.weights_s = lap();
  if (options_.adapter_directory.empty()) return absl::OkStatus();
  return ReadPeftAdapter(ctx_, options_.adapter_directory, adapters_.get());
}

absl::StatusOr<v1::MemoryEstimate> Engine::Plan(const EngineOptions& options,
                                                const WeightSource& weights) {
  Engine engine(options, Arena::Plan(), /*plan=*/true);
  const auto no_progress = [] {};
  if (absl::Status s = engine.Load(weights, no_progress); !s.ok()) return s;
  const Pack pack;
  const PackRef ref = {&pack, 0};
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  StepInput input{.trained_tokens = 1};
  if (auto step = engine.TrainStep(input, {&ref, 1}, self.get(), no_progress); !step.ok()) {
    return step.status();
  }
  if (auto result = engine.Evaluate({&ref, 1}, 1, self.get(), no_progress); !result.ok()) {
    return result.status();
  }
  const ArenaPeak& peak = engine.arena_.peak();
  const auto of = [&](MemoryClass c) { return peak.by_class[static_cast<int>(c)]; };
  v1::MemoryEstimate estimate;
  estimate.set_weights_bytes(of(MemoryClass::kWeights));
  estimate.set_adapter_bytes(of(MemoryClass::kAdapter));
  estimate.set_optimizer_bytes(of(MemoryClass::kOptimizer));
  estimate.set_activations_bytes(of(MemoryClass::kActivations));
  estimate.set_workspace_bytes(of(MemoryClass::kWorkspace));
  estimate.set_peak_bytes(peak.total);
  estimate.set_peak_phase(peak.phase);
  estimate.set_host_bytes(
      engine.model_->HostBytes(engine.ctx_, options.spec.batch().micro_batch_tokens()));
  return estimate;
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                                       const WeightSource& weights,
                                                       int64_t arena_bytes,
                                                       const std::function<void()>& progress) {
  Lap lap;
  absl::StatusOr<Arena> arena = Arena::Allocate(options.device, arena_bytes);
  if (!arena.ok()) return arena.status();
  std::unique_ptr<Engine> engine(new Engine(options, *std::move(arena), /*plan=*/false));
  engine->load_times_.memory_s = lap();
  if (absl::Status s = engine->Load(weights, progress); !s.ok()) return s;
  return engine;
}

absl::StatusOr<bool> Engine::RanksAgree(uint16_t number, Communicator* comm) {
  // Of whole numbers the sums are exact. Where they differ some rank sees it, and ends.
  Upload(ctx_.exec, {static_cast<double>(number), 0.0}, evaluation_);
  if (absl::Status s = comm->AllReduceSum(ctx_.exec, evaluation_); !s.ok()) return s;
  if (absl::Status s = comm->Wait(); !s.ok()) return s;
  return Download(ctx_.exec, evaluation_)[0] == static_cast<double>(number) * comm->size();
}

absl::Status Engine::ShareWeights(Communicator* comm) {
  absl::StatusOr<std::unique_ptr<PeerMemory>> memory =
      PeerMemory::Open(ctx_.exec, comm, arena_.memory());
  if (!memory.ok()) return memory.status();
  weight_memory_ = *std::move(memory);
  ctx_.weight_memory = weight_memory_.get();
  return absl::OkStatus();
}

void Engine::BeginStep(const StepInput& input) {
  arena_.BeginPhase("train");
  step_ = input;
  Fill(ctx_.exec, {.x = adapters_->grad_with_tail(), .value = 0});
  Fill(ctx_.exec, {.x = grad_scale_, .value = 1.0 / static_cast<double>(input.trained_tokens)});
  Fill(ctx_.exec, {.x = step_pack_.Slice(0, 0, 1), .value = static_cast<double>(input.step)});
}

void Engine::TrainPass(const PackRef& ref, Communicator* comm) {
  StreamEvent& passed = passed_[passes_++ % 2];
  passed.Wait();
  arena_.BeginPhase("train");
  LayerContext train = ctx_;
  train.weight_ranks = comm;
  train.dropout.p = options_.spec.lora().dropout();
  Fill(ctx_.exec, {.x = step_pack_.Slice(0, 1, 2), .value = static_cast<double>(ref.index)});
  const PackBatch batch = buffers_->Upload(ctx_, *ref.pack);
  method_->Train(
      train, *model_, batch,
      {.grad_scale = grad_scale_, .loss = adapters_->tail().Slice(0, kTailLoss, kTailLoss + 1)});
  passed.Record(ctx_.exec);
}

absl::Status Engine::EndStep(bool stop_requested, Communicator* comm) {
  const TensorView tail = adapters_->tail();
  if (stop_requested) {
    Fill(ctx_.exec, {.x = tail.Slice(0, kTailStop, kTailStop + 1), .value = 1});
  }
  if (absl::Status s = comm->AllReduceSum(ctx_.exec, adapters_->grad_with_tail()); !s.ok()) {
    return s;
  }
  OptimizerStep();
  if (!ctx_.exec.plan) {
    CopyToPinned(ctx_.exec, tail, results_.data());
    CopyToPinned(ctx_.exec, norm_, results_.data() + tail.bytes());
  }
  results_there_.Record(ctx_.exec);
  results_tokens_ = step_.trained_tokens;
  return absl::OkStatus();
}

StepResult Engine::ReadStep() {
  results_there_.Wait();
  const TensorView results(results_.data(), norm_.dtype, {adapters_->tail().size() + 1});
  const auto number = [&](int64_t i) -> double {
    if (ctx_.exec.plan) return 0;
    return results.dtype == DType::kF64 ? results.As<double>()[i] : results.As<float>()[i];
  };
  return {.loss = number(kTailLoss) / static_cast<double>(results_tokens_),
          .grad_norm = number(adapters_->tail().size()),
          .stop = number(kTailStop) > 0};
}

absl::StatusOr<StepResult> Engine::TrainStep(const StepInput& input,
                                             absl::Span<const PackRef> packs, Communicator* comm,
                                             const std::function<void()>& progress) {
  BeginStep(input);
  for (const PackRef& ref : packs) {
    TrainPass(ref, comm);
    progress();
  }
  if (absl::Status s = EndStep(/*stop_requested=*/false, comm); !s.ok()) return s;
  return ReadStep();
}

void Engine::OptimizerStep() {
  const TensorView grad = adapters_->grad();
  ArenaScope scope(&arena_);
  GradNormArgs norm = {.grads = {&grad, 1}, .norm_sq = norm_sq_};
  norm.workspace = arena_.NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                   GradNormWorkspaceBytes(ctx_.exec, norm));
  GradNorm(ctx_.exec, norm);
  ClipScale(ctx_.exec, {.norm_sq = norm_sq_,
                        .scale = clip_scale_,
                        .norm = norm_,
                        .max_norm = options_.spec.optimizer().max_grad_norm()});
  optimizer_->Step(
      ctx_, *adapters_,
      {.step = step_.step + 1, .learning_rate = step_.learning_rate, .grad_scale = clip_scale_});
  adapters_->RefreshCompute(ctx_);
}

absl::StatusOr<EvaluationResult> Engine::Evaluate(absl::Span<const PackRef> packs,
                                                  int64_t trained_tokens, Communicator* comm,
                                                  const std::function<void()>& progress) {
  arena_.BeginPhase("evaluate");
  Fill(ctx_.exec, {.x = evaluation_, .value = 0});
  LayerContext evaluate = ctx_;
  evaluate.weight_ranks = comm;
  for (const PackRef& ref : packs) {
    const PackBatch batch = buffers_->Upload(ctx_, *ref.pack);
    method_->Evaluate(evaluate, *model_, batch,
                      {.loss = evaluation_.Slice(0, 0, 1), .correct = evaluation_.Slice(0, 1, 2)});
    progress();
  }
  if (absl::Status s = comm->AllReduceSum(ctx_.exec, evaluation_); !s.ok()) return s;
  const std::vector<double> sums = Download(ctx_.exec, evaluation_);
  return EvaluationResult{.loss = sums[0] / static_cast<double>(trained_tokens),
                          .accuracy = sums[1] / static_cast<double>(trained_tokens)};
}

}  // namespace attune
