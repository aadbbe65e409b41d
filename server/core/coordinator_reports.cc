// What happens under a lease: reports are applied once, in order, and only while the lease is
// the one that its job counts on.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/core/coordinator.h"
#include "server/core/job_state.h"
#include "server/core/names.h"
#include "server/core/times.h"

namespace attune {
namespace {

constexpr size_t kTextBytesMax = 4096;
// Weight of the newest step in smoothed rates.
constexpr double kSmoothing = 0.1;

double Smooth(double before, double value) {
  return before == 0 ? value : before + kSmoothing * (value - before);
}

std::string Shorten(const std::string& text) {
  if (text.size() <= kTextBytesMax) return text;
  size_t end = kTextBytesMax;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end);  // never in the middle of a UTF-8 character
}

}  // namespace

void Coordinator::On(const ReportEvent& event) {
  const WorkerEntry* worker = HeardFrom(event.session);
  if (worker == nullptr) return;
  const v1::Report& report = event.report;
  LeaseRecord* lease = FindLease(report.epoch(), worker->worker.name());
  v1::CoordinatorMessage answer;
  const bool known = lease != nullptr && (lease->phase != LeasePhase::kEnded ||
                                          report.sequence() <= lease->last_sequence);
  if (!known) {
    answer.mutable_stale()->set_epoch(report.epoch());
    Send(event.session, std::move(answer));
    return;
  }
  answer.mutable_report_ack()->set_epoch(report.epoch());
  const bool next = report.sequence() == lease->last_sequence + 1;
  answer.mutable_report_ack()->set_sequence(lease->last_sequence + (next ? 1 : 0));
  if (next) {
    ++lease->last_sequence;
    MarkDirty(*lease);
    if (report.has_ended()) {
      EndLease(lease, report.ended());
    } else if (JobEntry* entry = CurrentJob(*lease)) {
      ApplyReport(lease, entry, report);
    }
  }
  Send(event.session, std::move(answer));
}

void Coordinator::ApplyReport(LeaseRecord* lease, JobEntry* entry, const v1::Report& report) {
  const bool trains = lease->kind == v1::LEASE_KIND_TRAIN;
  switch (report.item_case()) {
    case v1::Report::kStep:
      if (trains) ApplyStep(entry, report.step());
      break;
    case v1::Report::kLog:
      ApplyLog(entry, report.log());
      break;
    case v1::Report::kEvent: {
      const bool warning = report.event().kind() == v1::EVENT_KIND_WARNING;
      AddEvent(*entry, warning ? v1::EVENT_KIND_WARNING : v1::EVENT_KIND_INFO,
               Shorten(report.event().reason()), Shorten(report.event().message()),
               report.event().step());
      break;
    }
    case v1::Report::kRunning:
      if (trains) ApplyRunning(lease, entry, report.running());
      break;
    case v1::Report::kCheckpoint:
      if (trains) ApplyCheckpoint(entry, report.checkpoint());
      break;
    case v1::Report::kValidation:
      if (!trains) ApplyValidation(entry, report.validation());
      break;
    case v1::Report::kEnded:
    case v1::Report::ITEM_NOT_SET:
      break;
  }
}

void Coordinator::ApplyStep(JobEntry* entry, const v1::StepMetrics& reported) {
  v1::Progress* progress = entry->job().mutable_progress();
  v1::StepMetrics metrics = reported;
  metrics.set_revision(++counters_.revision);
  metrics.set_job(entry->job().name());
  metrics.set_attempt(entry->job().attempt());
  if (!metrics.has_time()) *metrics.mutable_time() = ToProto(now_);
  progress->set_step(metrics.step());
  if (metrics.total_steps() > 0) progress->set_total_steps(metrics.total_steps());
  progress->set_epoch(metrics.epoch());
  progress->set_loss(metrics.loss());
  progress->set_tokens_per_s(Smooth(progress->tokens_per_s(), metrics.tokens_per_s()));
  entry->step_s = Smooth(entry->step_s, metrics.step_s());
  const int64_t left = std::max<int64_t>(0, progress->total_steps() - metrics.step());
  progress->set_remaining_s(static_cast<double>(left) * entry->step_s);
  progress->set_trained_tokens(progress->trained_tokens() + metrics.trained_tokens());
  entry->steps.push_back({metrics.step(), progress->trained_tokens()});
  MarkDirty(*entry);
  out_.actions.push_back(ObserveStep{metrics.trained_tokens()});
  out_.effects.push_back(AppendMetrics{std::move(metrics), progress->trained_tokens()});
}

void Coordinator::ApplyLog(JobEntry* entry, const v1::LogLine& reported) {
  v1::LogLine line = reported;
  line.set_revision(++counters_.revision);
  line.set_job(entry->job().name());
  line.set_attempt(entry->job().attempt());
  if (!line.has_time()) *line.mutable_time() = ToProto(now_);
  line.set_text(Shorten(line.text()));
  out_.effects.push_back(AppendLog{std::move(line)});
}

void Coordinator::ApplyRunning(LeaseRecord* lease, JobEntry* entry,
                               const v1::LeaseRunning& running) {
  lease->phase = LeasePhase::kRunning;
  if (running.total_steps() > 0) {
    entry->job().mutable_progress()->set_total_steps(running.total_steps());
    MarkDirty(*entry);
  }
  if (entry->job().state() != v1::JOB_STATE_STARTING) return;
  for (const LeaseRecord* part : Parts(*entry)) {
    if (part->phase != LeasePhase::kRunning) return;
  }
  if (!entry->job().has_start_time()) *entry->job().mutable_start_time() = ToProto(now_);
  SetState(entry, v1::JOB_STATE_RUNNING, "TRAINING",
           absl::StrCat("trains from step ", running.from_step()));
}

void Coordinator::ApplyCheckpoint(JobEntry* entry, const v1::CheckpointStored& stored) {
  const std::string& job = entry->job().name();
  if (!options_.artifact_ready(stored.artifact())) {
    AddEvent(*entry, v1::EVENT_KIND_WARNING, "CHECKPOINT_INCOMPLETE",
             absl::StrCat("checkpoint of step ", stored.step(),
                          " was not committed: ", stored.artifact(), " is not whole"),
             stored.step());
    return;
  }
  CheckpointRecord record;
  record.job = job;
  record.trained_tokens = entry->job().progress().trained_tokens();
  for (const StepTokens& step : entry->steps) {
    if (step.step == stored.step()) record.trained_tokens = step.trained_tokens;
  }
  if (const auto it = entry->checkpoints.find(stored.step()); it != entry->checkpoints.end()) {
    record.trained_tokens = it->second.trained_tokens;
  }
  v1::Checkpoint& checkpoint = record.checkpoint;
  checkpoint.set_name(CheckpointName(job, stored.step()));
  checkpoint.set_step(stored.step());
  checkpoint.set_attempt(entry->job().attempt());
  checkpoint.set_artifact(stored.artifact());
  checkpoint.set_bytes(stored.bytes());
  *checkpoint.mutable_create_time() = ToProto(now_);
  checkpoint.set_loss(stored.loss());
  checkpoint.set_evaluation_loss(stored.evaluation_loss());
  checkpoint.set_final(stored.final());
  checkpoint.set_best(stored.best());
  CountArtifact(stored.artifact(), 1);  // before the old one is dropped: it may be the same
  DropCheckpoint(entry, stored.step());
  out_.effects.push_back(PutCheckpoint{record});
  out_.actions.push_back(ObserveCheckpoint{stored.bytes()});
  entry->checkpoints[stored.step()] = std::move(record);
  while (!entry->steps.empty() && entry->steps.front().step <= stored.step()) {
    entry->steps.pop_front();
  }
  AddEvent(*entry, v1::EVENT_KIND_CHECKPOINT, stored.final() ? "FINAL_CHECKPOINT" : "CHECKPOINT",
           absl::StrCat("checkpoint of step ", stored.step(), " is stored"), stored.step());
  RetainCheckpoints(entry);
}

void Coordinator::RetainCheckpoints(JobEntry* entry) {
  const auto keep = static_cast<size_t>(std::max(1, entry->job().spec().checkpoints().keep()));
  const v1::Checkpoint* best = BestCheckpoint(*entry);
  const int64_t best_step = best == nullptr ? -1 : best->step();
  std::vector<int64_t> old;
  for (const auto& [step, record] : entry->checkpoints) {
    if (entry->checkpoints.size() - old.size() <= keep) break;
    old.push_back(step);
  }
  for (const int64_t step : old) {
    if (step != best_step) DropCheckpoint(entry, step);
  }
}

void Coordinator::DropCheckpoint(JobEntry* entry, int64_t step) {
  const auto it = entry->checkpoints.find(step);
  if (it == entry->checkpoints.end()) return;
  const std::string artifact = it->second.checkpoint.artifact();
  entry->checkpoints.erase(it);
  out_.effects.push_back(DeleteCheckpoint{entry->job().name(), step});
  CountArtifact(artifact, -1);
  if (!ArtifactInUse(artifact)) out_.actions.push_back(RemoveArtifact{artifact, 0});
}

void Coordinator::ApplyValidation(JobEntry* entry, const v1::ValidationReport& report) {
  if (entry->job().state() != v1::JOB_STATE_VALIDATING) return;
  *entry->job().mutable_validation() = report;
  entry->epoch = 0;  // what the validator still says changes nothing
  if (report.errors_size() > 0) {
    FailJob(entry, v1::FAILURE_CAUSE_INVALID, absl::StrJoin(report.errors(), "\n"));
    return;
  }
  v1::JobSpec* spec = entry->job().mutable_spec();
  if (report.precision() != v1::PRECISION_UNSPECIFIED) spec->set_precision(report.precision());
  spec->mutable_model()->set_digest(report.model_digest());
  entry->job().mutable_progress()->set_total_steps(report.total_steps());
  for (const std::string& warning : report.warnings()) {
    AddEvent(*entry, v1::EVENT_KIND_WARNING, "VALIDATION_WARNING", Shorten(warning), 0);
  }
  SetState(entry, v1::JOB_STATE_QUEUED, "VALIDATED", "model and data can be read");
}

}  // namespace attune
