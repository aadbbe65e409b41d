// Engine: model, adapters, optimiser and their memory on one device, and what a rank does with
// them: an optimiser step, an evaluation.
//
// The same code runs on the plan device to find the peak (Engine::Plan) and for real in an arena
// of exactly that size (Engine::Create).
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "attune/v1/job.pb.h"
#include "attune/v1/job_spec.pb.h"
#include "worker/data/packing.h"
#include "worker/methods/method.h"
#include "worker/methods/pack_batch.h"
#include "worker/model/model.h"
#include "worker/shard/communicator.h"
#include "worker/shard/peer_memory.h"
#include "worker/train/optimizer.h"

namespace attune {

struct EngineOptions {
  DeviceKind device = DeviceKind::kCpu;
  DType dtype = DType::kF32;
  bool deterministic = true;
  // Base and adapter as one product; not with dropout or DoRA.
  bool fused_lora = true;
  bool resident = false;  // NF4 values kept expanded
  bool prefetch = false;  // else: expanded one ahead
  int shards = 1;         // ranks that share the NF4 weights, and which of them this is
  int shard = 0;
  bool embedding_on_host = false;
  // A trainer reads a step's results when the next one's first pass is on its way. For GPUs, which
  // need not wait then; of a CPU's it would only hear later.
  bool run_ahead = false;
  ActivationPolicy activations;
  int64_t logits_bytes = LmHead::kLogitsBytes;
  ModelConfig model;
  WeightNames names;
  AdapterLayout adapters;
  std::string adapter_directory;  // PEFT adapter to start from; empty: drawn
  v1::JobSpec spec;               // resolved
};

// What one optimiser step needs to know beside its packs.
struct StepInput {
  int64_t step = 0;  // from 0
  double learning_rate = 0;
  int64_t trained_tokens = 0;  // of the step, over all ranks
};

struct StepResult {
  double loss = 0;       // mean over trained_tokens
  double grad_norm = 0;  // before clipping
  bool stop = false;     // some rank was asked to stop: all ranks see the same
};

struct EvaluationResult {
  double loss = 0;
  double accuracy = 0;
};

// What the parts of Create took.
struct LoadTimes {
  double memory_s = 0;    // taking memory of the device and of the host
  double adapters_s = 0;  // first values of adapters and optimiser
  double weights_s = 0;
};

// A pack and its place among the packs of the optimiser step (or of the evaluation).
struct PackRef {
  const Pack* pack = nullptr;
  int64_t index = 0;
};

class Engine {
 public:
  // The peak memory of this job on one device, by running every phase on the plan device.
  static absl::StatusOr<v1::MemoryEstimate> Plan(const EngineOptions& options,
                                                 const WeightSource& weights);

  // Allocates `arena_bytes` (Plan's peak) and loads. `progress` is called now and then.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                        const WeightSource& weights,
                                                        int64_t arena_bytes,
                                                        const std::function<void()>& progress);
  ~Engine() { Synchronize(ctx_.exec); }  // a step may have been left

  // Whether all ranks call it with the same number (below 2^16).
  absl::StatusOr<bool> RanksAgree(uint16_t number, Communicator* comm);

  // Ranks that share weights read them out of each other's memory from now on, where they can.
  // Every rank calls it, or none; then they meet (EndStep, Evaluate) before one of them is
  // destroyed.
  absl::Status ShareWeights(Communicator* comm);

  // One optimiser step over this rank's packs and, through `comm`, those of the others: Begin, a
  // pass for each pack, End. Ranks that share weights need each other in every pass: as many packs
  // each. On a GPU they return before anything has run, but TrainPass waits until it is at most
  // two passes ahead: so who calls it learns that the device gets on. Nothing but End changes what
  // is trained: a step that has begun may be left for another, and evaluations and checkpoints may
  // come between its passes.
  void BeginStep(const StepInput& input);
  void TrainPass(const PackRef& pack, Communicator* comm);
  absl::Status EndStep(bool stop_requested, Communicator* comm);  // asked for by this rank's agent
  // Waits for the results of the last step that has ended, not for what came after it. Before the
  // next one ends.
  StepResult ReadStep();
  // The same in one call.
  absl::StatusOr<StepResult> TrainStep(const StepInput& input, absl::Span<const PackRef> packs,
                                       Communicator* comm, const std::function<void()>& progress);

  // Mean loss and accuracy over this rank's packs and those of the others.
  absl::StatusOr<EvaluationResult> Evaluate(absl::Span<const PackRef> packs, int64_t trained_tokens,
                                            Communicator* comm,
                                            const std::function<void()>& progress);

  AdapterSet* adapters() { return adapters_.get(); }
  const Optimizer& optimizer() const { return *optimizer_; }
  const Model& model() const { return *model_; }
  const LayerContext& context() const { return ctx_; }
  // Times every op from now on; null ends it.
  void SetTrace(OpTrace* trace) { ctx_.exec.trace = trace; }
  // See Model::SetReplay.
  void SetReplay(bool on) { model_->SetReplay(on); }
  int64_t peak_bytes() const { return arena_.peak().total; }
  const LoadTimes& load_times() const { return load_times_; }

 private:
  Engine(const EngineOptions& options, Arena arena, bool plan);
  absl::Status Load(const WeightSource& weights, const std::function<void()>& progress);
  void OptimizerStep();

  EngineOptions options_;
  LoadTimes load_times_;
  Arena arena_;
  std::unique_ptr<PeerMemory> weight_memory_;  // null: weights are gathered by collectives
  LayerContext ctx_;
  std::unique_ptr<AdapterSet> adapters_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Method> method_;
  std::unique_ptr<PackBuffers> buffers_;
  TensorView grad_scale_;  // (1) f32 (f64)
  TensorView step_pack_;   // (2) i32
  TensorView norm_sq_;     // (1) f64
  TensorView clip_scale_;  // (1) f32 (f64)
  TensorView norm_;        // (1) f32 (f64)
  TensorView evaluation_;  // (2) f32 (f64): loss, correct
  StepInput step_;         // that has begun
  StreamEvent passed_[2];  // the last two passes
  int64_t passes_ = 0;
  // Of the last step that has ended: tail and norm in host memory, and its trained tokens.
  PinnedMemory results_;
  StreamEvent results_there_;
  int64_t results_tokens_ = 0;
};

}  // namespace attune
