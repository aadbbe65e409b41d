// What users ask for: create, cancel, pause, resume, delete, wait.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/coordinator.h"
#include "server/core/errors.h"
#include "server/core/job_state.h"
#include "server/core/names.h"
#include "server/core/times.h"

namespace attune {
namespace {

absl::Status IllegalState(const v1::Job& job, const std::string& verb, const std::string& need) {
  return ErrorWithReason(absl::StatusCode::kFailedPrecondition, "ILLEGAL_STATE",
                         absl::StrCat(job.name(), " is ", StateLabel(job.state()),
                                      ": it cannot be ", verb, "; ", need),
                         {{"job", job.name()}, {"state", StateLabel(job.state())}});
}

}  // namespace

void Coordinator::Fail(CallId call, absl::Status status) {
  if (call != 0) out_.actions.push_back(CompleteCall{call, std::move(status), v1::Job()});
}

void Coordinator::CompleteWith(CallId call, const JobEntry& entry) {
  if (call == 0) return;
  out_.actions.push_back(CompleteCall{call, absl::OkStatus(), View(entry, /*with_attempts=*/true)});
}

Coordinator::JobEntry* Coordinator::FindForCall(CallId call, const std::string& name,
                                                const std::string& etag) {
  JobEntry* entry = FindJob(name);
  if (entry == nullptr) {
    Fail(call, GetJob(name).status());
    return nullptr;
  }
  if (!etag.empty() && etag != absl::StrCat(entry->record.change)) {
    Fail(call, ErrorWithReason(absl::StatusCode::kAborted, "ETAG_MISMATCH",
                               absl::StrCat(name, " has changed since it was read; read it again"),
                               {{"job", name}}));
    return nullptr;
  }
  return entry;
}

bool Coordinator::RepeatsRequest(const CreateJobEvent& event) {
  const auto it = requests_.find(event.request_id);
  if (event.request_id.empty() || it == requests_.end()) return false;
  const RequestRecord& request = it->second;
  if (request.digest != event.digest) {
    Fail(event.call,
         ErrorWithReason(absl::StatusCode::kAlreadyExists, "REQUEST_ID_REUSED",
                         absl::StrCat("request_id ", event.request_id, " created ", request.job,
                                      " from another spec; use a new request_id"),
                         {{"job", request.job}}));
  } else if (const JobEntry* entry = FindJob(request.job)) {
    CompleteWith(event.call, *entry);
  } else {
    Fail(event.call, ErrorWithReason(absl::StatusCode::kNotFound, "JOB_DELETED",
                                     absl::StrCat("request_id ", event.request_id, " created ",
                                                  request.job, ", which was deleted since"),
                                     {{"job", request.job}}));
  }
  return true;
}

absl::Status Coordinator::MissingArtifacts(const v1::JobSpec& spec) const {
  std::vector<FieldViolation> violations;
  const auto check = [&](const v1::Source& source, const std::string& field) {
    if (source.artifact().empty() || options_.artifact_ready(source.artifact())) return;
    violations.push_back({absl::StrCat(field, ".artifact"),
                          absl::StrCat("'", source.artifact(),
                                       "' is not a finished upload; upload it, then create the "
                                       "job")});
  };
  check(spec.model().source(), "model.source");
  check(spec.lora().init_from(), "lora.init_from");
  for (int i = 0; i < spec.datasets_size(); ++i) {
    check(spec.datasets(i).source(), absl::StrCat("datasets[", i, "].source"));
  }
  for (int i = 0; i < spec.evaluation().datasets_size(); ++i) {
    check(spec.evaluation().datasets(i).source(),
          absl::StrCat("evaluation.datasets[", i, "].source"));
  }
  return violations.empty() ? absl::OkStatus() : InvalidFields(violations, "spec.");
}

void Coordinator::On(const CreateJobEvent& event) {
  if (RepeatsRequest(event)) return;
  if (absl::Status missing = MissingArtifacts(event.spec); !missing.ok()) {
    Fail(event.call, missing);
    return;
  }
  JobEntry& entry = jobs_[event.job];
  entry.record.seq = ++counters_.job_seq;
  jobs_by_seq_[entry.record.seq] = event.job;
  v1::Job& job = entry.job();
  job.set_name(event.job);
  job.set_display_name(event.spec.name());
  *job.mutable_spec() = event.spec;
  job.set_state(v1::JOB_STATE_VALIDATING);
  job.set_reason("WAITING_FOR_WORKER");
  job.set_message("waits for a worker that reads model and data");
  *job.mutable_create_time() = ToProto(now_);
  CountArtifacts(event.spec, 1);
  Touch(&entry);
  AddEvent(entry, v1::EVENT_KIND_STATE, "CREATED", "created", 0);
  if (!event.request_id.empty()) {
    RequestRecord request{event.request_id, event.job, event.digest, now_};
    out_.effects.push_back(PutRequest{request});
    requests_[event.request_id] = std::move(request);
  }
  pending_.insert(event.job);
  schedule_needed_ = true;
  CompleteWith(event.call, entry);
}

void Coordinator::On(const CancelJobEvent& event) {
  JobEntry* entry = FindForCall(event.call, event.job, event.etag);
  if (entry == nullptr) return;
  const v1::JobState state = entry->job().state();
  if (state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED) {
    Fail(event.call, IllegalState(entry->job(), "cancelled", "it has ended"));
    return;
  }
  if (state == v1::JOB_STATE_CANCELLED || state == v1::JOB_STATE_CANCELLING) {
    CompleteWith(event.call, *entry);
    return;
  }
  if (HoldsDevices(state)) {
    SetState(entry, v1::JOB_STATE_CANCELLING, "CANCEL_REQUESTED", "its trainers are being stopped");
    StopParts(entry, v1::STOP_MODE_KILL);
  } else {
    if (state == v1::JOB_STATE_VALIDATING) AbandonValidation(entry);
    SetState(entry, v1::JOB_STATE_CANCELLED, "CANCELLED_BY_USER", "cancelled");
  }
  CompleteWith(event.call, *entry);
}

void Coordinator::On(const PauseJobEvent& event) {
  JobEntry* entry = FindForCall(event.call, event.job, event.etag);
  if (entry == nullptr) return;
  const v1::JobState state = entry->job().state();
  switch (state) {
    case v1::JOB_STATE_PAUSED:
    case v1::JOB_STATE_PAUSING:
      break;
    case v1::JOB_STATE_VALIDATING:
      AbandonValidation(entry);
      SetState(entry, v1::JOB_STATE_PAUSED, "PAUSED_BY_USER", "paused before it was validated");
      break;
    case v1::JOB_STATE_QUEUED:
      SetState(entry, v1::JOB_STATE_PAUSED, "PAUSED_BY_USER", "paused while it waited");
      break;
    case v1::JOB_STATE_RUNNING:
    case v1::JOB_STATE_PREEMPTING:
      SetState(entry, v1::JOB_STATE_PAUSING, "PAUSE_REQUESTED", "writes a checkpoint, then stops");
      StopParts(entry, v1::STOP_MODE_CHECKPOINT);
      break;
    case v1::JOB_STATE_STARTING:  // made no step yet: there is nothing to write
    case v1::JOB_STATE_RECOVERING:
      SetState(entry, v1::JOB_STATE_PAUSING, "PAUSE_REQUESTED", "its trainers are being stopped");
      StopParts(entry, v1::STOP_MODE_KILL);
      break;
    default:
      Fail(event.call, IllegalState(entry->job(), "paused", "only a job that has not ended can"));
      return;
  }
  CompleteWith(event.call, *entry);
}

void Coordinator::On(const ResumeJobEvent& event) {
  JobEntry* entry = FindForCall(event.call, event.job, event.etag);
  if (entry == nullptr) return;
  if (entry->job().state() != v1::JOB_STATE_PAUSED) {
    Fail(event.call, IllegalState(entry->job(), "resumed", "only a PAUSED job can"));
    return;
  }
  if (event.devices.has_value()) {
    v1::JobSpec spec = entry->job().spec();
    spec.mutable_resources()->set_devices(*event.devices);
    spec.mutable_parallelism()->set_data(*event.devices);
    const auto violations = ValidateJobSpec(spec, {.on_coordinator = true});
    if (!violations.empty()) {
      Fail(event.call, InvalidFields({{"devices", violations[0].description}}, ""));
      return;
    }
    *entry->job().mutable_spec() = spec;
  }
  // The restarts went on a disk that somebody has seen to since.
  if (entry->job().reason() == kPausedByStorage) entry->job().set_restarts(0);
  if (entry->job().has_validation()) {
    SetState(entry, v1::JOB_STATE_QUEUED, "RESUMED", "waits for devices again");
  } else {
    SetState(entry, v1::JOB_STATE_VALIDATING, "WAITING_FOR_WORKER",
             "waits for a worker that reads model and data");
  }
  CompleteWith(event.call, *entry);
}

void Coordinator::On(const DeleteJobEvent& event) {
  JobEntry* entry = FindForCall(event.call, event.job, event.etag);
  if (entry == nullptr) return;
  if (!IsFinal(entry->job().state())) {
    Fail(event.call, IllegalState(entry->job(), "deleted", "cancel it first"));
    return;
  }
  while (!entry->checkpoints.empty()) DropCheckpoint(entry, entry->checkpoints.begin()->first);
  for (int64_t epoch : entry->epochs) {
    for (auto it = leases_.lower_bound({epoch, ""}); it != leases_.end();) {
      if (it->first.first != epoch) break;
      it = it->second.phase == LeasePhase::kEnded ? leases_.erase(it) : std::next(it);
    }
  }
  jobs_by_seq_.erase(entry->record.seq);
  jobs_.erase(event.job);
  out_.effects.push_back(DeleteJob{event.job});
  if (event.call != 0) {
    out_.actions.push_back(CompleteCall{event.call, absl::OkStatus(), v1::Job()});
  }
}

void Coordinator::On(const WaitJobEvent& event) {
  JobEntry* entry = FindForCall(event.call, event.job, "");
  if (entry == nullptr) return;
  const v1::JobState state = entry->job().state();
  if (IsFinal(state) || state == v1::JOB_STATE_PAUSED || event.deadline <= now_) {
    CompleteWith(event.call, *entry);
    return;
  }
  entry->waiters.emplace_back(event.call, event.deadline);
  waiting_calls_[event.call] = event.job;
}

void Coordinator::On(const ForgetCallEvent& event) {
  const auto it = waiting_calls_.find(event.call);
  if (it == waiting_calls_.end()) return;
  if (JobEntry* entry = FindJob(it->second)) {
    auto& waiters = entry->waiters;
    waiters.erase(std::remove_if(waiters.begin(), waiters.end(),
                                 [&](const auto& waiter) { return waiter.first == event.call; }),
                  waiters.end());
  }
  waiting_calls_.erase(it);
  Fail(event.call, absl::CancelledError("the caller is gone"));
}

void Coordinator::On(const DeleteCheckpointEvent& event) {
  const absl::StatusOr<v1::Checkpoint> checkpoint = GetCheckpoint(event.name);
  if (!checkpoint.ok()) {
    Fail(event.call, checkpoint.status());
    return;
  }
  JobEntry* entry = FindJob(ParseCheckpointName(checkpoint->name())->job);
  const bool last = entry->checkpoints.rbegin()->first == checkpoint->step();
  if (last && !IsFinal(entry->job().state())) {
    Fail(event.call,
         ErrorWithReason(absl::StatusCode::kFailedPrecondition, "LAST_CHECKPOINT",
                         absl::StrCat(checkpoint->name(), " is the last checkpoint of a job that ",
                                      "has not ended: it would start from there")));
    return;
  }
  if (entry->job().final_checkpoint() == checkpoint->name()) {
    entry->job().clear_final_checkpoint();
    Touch(entry);
  }
  DropCheckpoint(entry, checkpoint->step());
  CompleteWith(event.call, *entry);
}

void Coordinator::On(const DeleteArtifactEvent& event) {
  if (ArtifactInUse(event.artifact)) {
    Fail(event.call,
         ErrorWithReason(absl::StatusCode::kFailedPrecondition, "ARTIFACT_IN_USE",
                         absl::StrCat(event.artifact, " is used by a job or is a checkpoint"),
                         {{"artifact", event.artifact}}));
    return;
  }
  out_.actions.push_back(RemoveArtifact{event.artifact, event.call});
}

}  // namespace attune
