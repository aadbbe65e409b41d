#include "worker/train/trainer.h"

#include <time.h>  // NOLINT: clock_gettime
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "worker/io/file.h"
#include "worker/train/checkpoint.h"
#include "worker/train/schedule.h"

namespace attune {
namespace {

TrainerOutcome Fail(v1::FailureCause cause, const absl::Status& status) {
  return {status, cause};
}

v1::FailureCause CauseOfStart(const absl::Status& status) {
  return absl::IsResourceExhausted(status) ? v1::FAILURE_CAUSE_OUT_OF_MEMORY
                                           : v1::FAILURE_CAUSE_INVALID;
}

// Seconds since this process began; 0 where /proc does not say.
double ProcessAge() {
  const absl::StatusOr<std::string> stat = ReadFile("/proc/self/stat");
  timespec now;
  if (!stat.ok() || clock_gettime(CLOCK_BOOTTIME, &now) != 0) return 0;
  // After the name in parentheses come fields from the third on; the 22nd is the start, in ticks.
  const std::vector<std::string> fields = absl::StrSplit(stat->substr(stat->rfind(')') + 2), ' ');
  if (fields.size() < 20) return 0;
  const double start = std::stod(fields[19]) / static_cast<double>(sysconf(_SC_CLK_TCK));
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9 - start;
}

class TrainingRun {
 public:
  TrainingRun(PreparedJob* job, Communicator* comm, TrainerObserver* observer)
      : job_(job),
        comm_(comm),
        observer_(observer),
        monitor_(job->assignment.spec().evaluation().early_stopping()),
        stream_(&job->train, job->assignment.spec().batch().micro_batch_tokens(),
                job->assignment.spec().seed()),
        progress_([observer] { observer->Progress("train"); }) {}

  TrainerOutcome Run() {
    const double prepared = ProcessAge();
    if (TrainerOutcome outcome = Start(); !outcome.status.ok()) return outcome;
    const double loaded = ProcessAge();
    observer_->Running(state_.step, job_->total_steps);
    for (bool told = comm_->rank() > 0; !Done();) {
      TrainerOutcome outcome = Step();
      if (!outcome.status.ok() || stopped_) return outcome;
      if (told || first_step_s_ == 0) continue;
      told = true;
      std::fprintf(stderr,
                   "attune-trainer: prepared in %.2f s, loaded in %.2f s (%s), first step in %.2f "
                   "s; it ended %.2f s after the process began\n",
                   prepared, loaded - prepared, DescribeLoad().c_str(), first_step_s_,
                   loaded + first_step_s_);
    }
    return {};
  }

 private:
  const v1::JobSpec& spec() const { return job_->assignment.spec(); }
  const std::string& directory() const { return job_->assignment.work_directory(); }

  bool Done() const { return state_.step >= job_->total_steps || monitor_.stopped(); }

  std::string DescribeLoad() const {
    const LoadTimes& times = engine_->load_times();
    const double gb = static_cast<double>(job_->weights->checkpoint().data_bytes()) * 1e-9;
    return absl::StrFormat("memory %.2f, adapters %.2f, weights %.2f: %.3g GB at %.3g GB/s",
                           times.memory_s, times.adapters_s, times.weights_s, gb,
                           gb / times.weights_s);
  }

  TrainerOutcome Start() {
    observer_->Progress("load");
    auto engine = Engine::Create(job_->engine, *job_->weights, job_->report.memory().peak_bytes(),
                                 [this] { observer_->Progress("load"); });
    if (!engine.ok()) return Fail(CauseOfStart(engine.status()), engine.status());
    engine_ = *std::move(engine);
    if (absl::Status s = ShareWeights(); !s.ok()) return Fail(CauseOfStart(s), s);
    const std::string& from = job_->assignment.checkpoint_directory();
    if (!from.empty()) {
      absl::StatusOr<TrainerState> state =
          ReadCheckpoint(engine_->context(), from, engine_->optimizer(), engine_->adapters());
      if (!state.ok()) return Fail(v1::FAILURE_CAUSE_INVALID, state.status());
      if (state->run_digest != job_->run_digest) {
        return Fail(v1::FAILURE_CAUSE_INVALID,
                    absl::FailedPreconditionError(absl::StrCat(
                        from, " is of another run: spec, model or data have changed since")));
      }
      state_ = *state;
      monitor_.Restore(state_.monitor);
    }
    state_.run_digest = job_->run_digest;
    if (absl::Status s = BuildEvaluation(); !s.ok()) return Fail(v1::FAILURE_CAUSE_INVALID, s);
    return {};
  }

  // Ranks that share weights gather them together, as often as the placement wants.
  absl::Status ShareWeights() {
    if (job_->engine.shards == 1) return absl::OkStatus();
    const std::string& placement = job_->report.memory().placement();
    uint16_t number = 0;
    for (unsigned char c : placement) number = static_cast<uint16_t>(number * 31 + c);
    absl::StatusOr<bool> agree = engine_->RanksAgree(number, comm_);
    if (!agree.ok()) return agree.status();
    if (*agree) return engine_->ShareWeights(comm_);
    return absl::FailedPreconditionError(absl::StrCat(
        "parallelism.shard_weights: the trainers have not the same memory and chose different "
        "placements (this one: ",
        placement, "): set resources.device_memory_gib to what each of them has"));
  }

  // Held-out packs never change: built once. Each rank evaluates every world-th.
  absl::Status BuildEvaluation() {
    const ExampleSet& set = job_->evaluation;
    if (set.examples.empty()) return absl::OkStatus();
    std::vector<int64_t> lengths;
    for (int64_t i : set.examples) lengths.push_back(set.dataset->length(i));
    const int64_t T = spec().batch().micro_batch_tokens();
    auto packs =
        FormPacks(lengths, {.pack_tokens = T, .max_segments = MaxSegments(T), .shuffle = false});
    if (!packs.ok()) return packs.status();
    for (size_t i = comm_->rank(); i < packs->size(); i += comm_->size()) {
      std::vector<int64_t> examples;
      for (int64_t k : (*packs)[i]) examples.push_back(set.examples[k]);
      evaluation_packs_.push_back(BuildPack(*set.dataset, examples, T));
    }
    while (evaluation_packs_.size() < PassesOf(packs->size())) {
      evaluation_packs_.push_back(IdlePack(T));
    }
    return absl::OkStatus();
  }

  // How many packs each rank runs of so many: ranks that share weights need each other in all.
  size_t PassesOf(size_t packs) const {
    const size_t ranks = comm_->size();
    return spec().parallelism().shard_weights() ? (packs + ranks - 1) / ranks : 0;
  }

  // Puts the next step on its way. With run_ahead the step before is read only when the device has
  // the first pass of this one to go on with, so it does not wait for the host. If the run ends
  // with the step before, this one is left: nothing of it shows.
  TrainerOutcome Step() {
    StepOnItsWay step{.begin = absl::Now()};
    step.input.step = state_.step + (unread_.has_value() ? 1 : 0);
    if (step.input.step == job_->total_steps) return ReadStep();
    step.input.learning_rate = LearningRate(spec().schedule(), spec().optimizer().learning_rate(),
                                            step.input.step, job_->total_steps);
    std::vector<Pack> packs;
    std::vector<PackRef> mine;
    if (absl::Status s = BuildPacks(&packs, &mine, &step.input, &step.metrics); !s.ok()) {
      return Fail(v1::FAILURE_CAUSE_INVALID, s);
    }
    engine_->BeginStep(step.input);
    for (const PackRef& pack : mine) {
      engine_->TrainPass(pack, comm_);
      progress_();
      TrainerOutcome outcome = ReadStep();
      if (!outcome.status.ok() || stopped_) return outcome;
    }
    TrainerOutcome outcome = mine.empty() ? ReadStep() : TrainerOutcome();
    if (!outcome.status.ok() || stopped_) return outcome;
    if (absl::Status s = engine_->EndStep(observer_->StopRequested(), comm_); !s.ok()) {
      return Fail(v1::FAILURE_CAUSE_PEER_LOST, s);
    }
    unread_ = std::move(step);
    const bool wait = !job_->engine.run_ahead || IsEvaluated(unread_->input.step + 1) ||
                      IsSaved(unread_->input.step + 1);
    return wait ? ReadStep() : TrainerOutcome();
  }

  // Of steps counted from 1.
  bool IsEvaluated(int64_t step) const {
    return !job_->evaluation.examples.empty() &&
           (step == job_->total_steps || step % spec().evaluation().every_steps() == 0);
  }
  bool IsSaved(int64_t step) const { return step % spec().checkpoints().every_steps() == 0; }

  // Waits for the step that is on its way, if there is one, and does what follows from it.
  TrainerOutcome ReadStep() {
    if (!unread_.has_value()) return {};
    StepOnItsWay step = *std::move(unread_);
    unread_.reset();
    const StepResult result = engine_->ReadStep();
    // On a GPU a lost peer leaves rubbish in what has been reduced: none of it may get out.
    if (absl::Status s = comm_->Wait(); !s.ok()) return Fail(v1::FAILURE_CAUSE_PEER_LOST, s);
    if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
      return Fail(v1::FAILURE_CAUSE_DIVERGED,
                  absl::OutOfRangeError(absl::StrCat(
                      "step ", state_.step + 1, ": loss ", result.loss, ", gradient norm ",
                      result.grad_norm, "; lower optimizer.learning_rate or raise warm-up")));
    }
    state_.step += 1;
    state_.trained_tokens += step.input.trained_tokens;
    // It had the device from when the one before had been done.
    const absl::Time now = absl::Now();
    const double step_s = absl::ToDoubleSeconds(now - std::max(step.begin, last_read_));
    last_read_ = now;
    if (first_step_s_ == 0) first_step_s_ = step_s;
    v1::StepMetrics& metrics = step.metrics;
    metrics.set_step(state_.step);
    metrics.set_loss(result.loss);
    metrics.set_learning_rate(step.input.learning_rate);
    metrics.set_grad_norm(result.grad_norm);
    metrics.set_trained_tokens(step.input.trained_tokens);
    metrics.set_step_s(step_s);
    metrics.set_tokens_per_s(static_cast<double>(metrics.tokens()) / step_s);
    metrics.set_total_steps(job_->total_steps);
    metrics.set_peak_bytes(engine_->peak_bytes());
    return EndStep(result, &metrics);
  }

  // Evaluation, report and checkpoint, in this order: the report holds the evaluation, and a
  // checkpoint is only told of once its step has been. Every rank decides alike.
  TrainerOutcome EndStep(const StepResult& result, v1::StepMetrics* metrics) {
    std::vector<Notice> notices = monitor_.OnStep(state_.step, result.loss, result.grad_norm);
    bool best = false;
    if (IsEvaluated(state_.step)) {
      observer_->Progress("evaluate");
      absl::StatusOr<EvaluationResult> evaluation = Evaluate();
      if (!evaluation.ok()) return Fail(v1::FAILURE_CAUSE_PEER_LOST, evaluation.status());
      if (absl::Status s = comm_->Wait(); !s.ok()) return Fail(v1::FAILURE_CAUSE_PEER_LOST, s);
      if (!std::isfinite(evaluation->loss)) {
        return Fail(v1::FAILURE_CAUSE_DIVERGED,
                    absl::OutOfRangeError(
                        absl::StrCat("step ", state_.step, ": evaluation loss ", evaluation->loss,
                                     "; lower optimizer.learning_rate or raise warm-up")));
      }
      metrics->set_evaluation_loss(evaluation->loss);
      metrics->set_evaluation_perplexity(std::exp(evaluation->loss));
      metrics->set_evaluation_accuracy(evaluation->accuracy);
      RunMonitor::Verdict verdict = monitor_.OnEvaluation(state_.step, evaluation->loss);
      best = verdict.best;
      for (Notice& notice : verdict.notices) notices.push_back(std::move(notice));
    }
    state_.monitor = monitor_.state();
    stopped_ = result.stop && !Done();
    if (comm_->rank() != 0) return {};
    observer_->Step(*metrics);
    for (const Notice& notice : notices) Tell(v1::EVENT_KIND_WARNING, notice);
    if (Done() && state_.step < job_->total_steps) TellOfEarlyStop();
    if (!Done() && !stopped_ && !IsSaved(state_.step) && !best) return {};
    observer_->Progress("checkpoint");
    return Checkpoint(*metrics, best);
  }

  void Tell(v1::EventKind kind, const Notice& notice) {
    v1::Event event;
    event.set_kind(kind);
    event.set_reason(notice.reason);
    event.set_message(notice.message);
    event.set_step(state_.step);
    observer_->Event(event);
  }

  void TellOfEarlyStop() {
    const RunMonitor::State& s = state_.monitor;
    Tell(v1::EVENT_KIND_INFO,
         {"EARLY_STOPPED",
          absl::StrCat("the run ends after step ", state_.step, " of ", job_->total_steps, ": ",
                       s.without_improvement, " evaluations in a row were no improvement on ",
                       s.best_loss, " at step ", s.best_step)});
  }

  // The packs of this step that are this rank's, and what the whole step counts.
  absl::Status BuildPacks(std::vector<Pack>* packs, std::vector<PackRef>* mine, StepInput* input,
                          v1::StepMetrics* metrics) {
    const PreparedJob::Range range = job_->PacksOfStep(input->step);
    packs->reserve(range.count + 1);
    int64_t tokens = 0;
    for (int64_t i = 0; i < range.count; ++i) {
      absl::StatusOr<PackStream::Entry> entry = stream_.At(range.first + i);
      if (!entry.ok()) return entry.status();
      packs->push_back(
          BuildPack(*job_->train.dataset, entry->examples, spec().batch().micro_batch_tokens()));
      const Pack& pack = packs->back();
      input->trained_tokens += pack.trained_tokens;
      tokens += pack.q_begin[pack.num_segments];
      metrics->set_epoch(entry->epoch);
      if (i % comm_->size() == comm_->rank()) mine->push_back({&pack, i});
    }
    metrics->set_tokens(tokens);
    if (mine->size() < PassesOf(range.count)) {
      packs->push_back(IdlePack(spec().batch().micro_batch_tokens()));
      mine->push_back({&packs->back(), range.count});
    }
    return absl::OkStatus();
  }

  absl::StatusOr<EvaluationResult> Evaluate() {
    std::vector<PackRef> refs;
    for (const Pack& pack : evaluation_packs_) {
      refs.push_back({&pack, static_cast<int64_t>(refs.size())});
    }
    return engine_->Evaluate(refs, job_->evaluation.trained_tokens, comm_,
                             [this] { observer_->Progress("evaluate"); });
  }

  TrainerOutcome Checkpoint(const v1::StepMetrics& metrics, bool best) {
    CheckpointContent content = {.state = state_,
                                 .dropout = spec().lora().dropout(),
                                 .base_model = job_->assignment.model_directory(),
                                 .model_directory = job_->assignment.model_directory()};
    absl::StatusOr<std::string> path = WriteCheckpoint(engine_->context(), *engine_->adapters(),
                                                       engine_->optimizer(), content, directory());
    if (!path.ok()) return Fail(v1::FAILURE_CAUSE_STORAGE, path.status());
    v1::CheckpointWritten written;
    written.set_step(state_.step);
    written.set_directory(*path);
    written.set_loss(metrics.loss());
    written.set_evaluation_loss(metrics.evaluation_loss());
    written.set_final(Done());
    written.set_best(best);
    observer_->CheckpointWritten(written);
    return Retain();
  }

  // Removes the oldest checkpoints beyond `keep`, but for the best, that are safe elsewhere.
  TrainerOutcome Retain() {
    absl::StatusOr<std::vector<std::string>> all = ListCheckpoints(directory());
    if (!all.ok()) return Fail(v1::FAILURE_CAUSE_STORAGE, all.status());
    const int64_t excess = static_cast<int64_t>(all->size()) - spec().checkpoints().keep();
    for (int64_t i = 0; i < excess; ++i) {
      const std::string& path = (*all)[i];
      const int64_t step = std::stoll(path.substr(path.rfind('-') + 1));
      if (step > observer_->ReleasedStep()) break;
      if (step == state_.monitor.best_step) continue;
      if (absl::Status s = RemoveTree(path); !s.ok()) return Fail(v1::FAILURE_CAUSE_STORAGE, s);
    }
    return {};
  }

  // Enqueued to its end, its results not read yet.
  struct StepOnItsWay {
    StepInput input;
    v1::StepMetrics metrics;  // as far as they are known
    absl::Time begin;
  };

  PreparedJob* job_;
  Communicator* comm_;
  TrainerObserver* observer_;
  RunMonitor monitor_;
  PackStream stream_;
  std::function<void()> progress_;
  std::unique_ptr<Engine> engine_;
  TrainerState state_;
  std::vector<Pack> evaluation_packs_;
  std::optional<StepOnItsWay> unread_;
  absl::Time last_read_ = absl::InfinitePast();
  double first_step_s_ = 0;
  bool stopped_ = false;
};

}  // namespace

TrainerOutcome Train(PreparedJob* job, Communicator* comm, TrainerObserver* observer) {
  return TrainingRun(job, comm, observer).Run();
}

}  // namespace attune
