// Attempts: how they begin, what a part's end means for the rest, what comes after them.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/check.h"
#include "server/core/coordinator.h"
#include "server/core/job_state.h"
#include "server/core/names.h"
#include "server/core/times.h"

namespace attune {
namespace {

// Trying again would give the same: wrong input, a plan that does not fit, a diverged loss.
bool NeverRetried(v1::FailureCause cause) {
  return cause == v1::FAILURE_CAUSE_INVALID || cause == v1::FAILURE_CAUSE_OUT_OF_MEMORY ||
         cause == v1::FAILURE_CAUSE_DIVERGED;
}

// Of several causes in one attempt the one that explains the others counts: a lost peer is a
// consequence, a crash or a wrong input is a reason.
int Weight(v1::FailureCause cause) {
  if (NeverRetried(cause)) return 3;
  if (cause == v1::FAILURE_CAUSE_UNSPECIFIED) return 0;
  return cause == v1::FAILURE_CAUSE_PEER_LOST ? 1 : 2;
}

v1::DeviceType ToProtoType(sched::DeviceType type) {
  return type == sched::DeviceType::kCuda ? v1::DEVICE_TYPE_CUDA : v1::DEVICE_TYPE_CPU;
}

sched::DeviceType ToSchedType(v1::DeviceType type) {
  if (type == v1::DEVICE_TYPE_CPU) return sched::DeviceType::kCpu;
  return type == v1::DEVICE_TYPE_CUDA ? sched::DeviceType::kCuda : sched::DeviceType::kAny;
}

}  // namespace

sched::Snapshot Coordinator::MakeSnapshot() const {
  sched::Snapshot snapshot;
  for (const auto& [name, entry] : workers_) {
    if (entry.lost) continue;
    std::set<std::string> leased;
    for (int64_t epoch : entry.live) {
      const LeaseRecord& lease = leases_.at({epoch, name});
      leased.insert(lease.devices.begin(), lease.devices.end());
    }
    sched::Worker worker{.name = name, .connected = entry.session != 0};
    for (const v1::Device& device : entry.worker.devices()) {
      if (entry.Faulty(device.id())) continue;  // as if it were not there
      worker.devices.push_back(
          {device.id(), ToSchedType(device.type()), leased.count(device.id()) == 0});
    }
    snapshot.workers.push_back(std::move(worker));
  }
  for (const std::string& name : pending_) {
    const JobEntry& entry = jobs_.at(name);
    if (entry.job().state() != v1::JOB_STATE_QUEUED) continue;
    const v1::JobSpec& spec = entry.job().spec();
    snapshot.pending.push_back({.name = name,
                                .age = entry.record.seq,
                                .priority = spec.priority(),
                                .devices = spec.resources().devices(),
                                .type = ToSchedType(spec.resources().device_type())});
  }
  return snapshot;
}

// The least busy connected worker, one with devices of the job's type if there is any. A job for
// any type is meant for GPUs where there are some: so does the scheduler, and what validation
// resolves (precision) is of the device.
void Coordinator::AssignValidation(JobEntry* entry) {
  v1::DeviceType wanted = entry->job().spec().resources().device_type();
  if (wanted == v1::DEVICE_TYPE_ANY) wanted = v1::DEVICE_TYPE_CUDA;
  WorkerEntry* best = nullptr;
  std::pair<bool, int64_t> best_key;  // (lacks the type, validations)
  for (auto& [name, worker] : workers_) {
    if (worker.session == 0) continue;
    int64_t validations = 0;
    for (int64_t epoch : worker.live) {
      validations += leases_.at({epoch, name}).kind == v1::LEASE_KIND_VALIDATE ? 1 : 0;
    }
    if (validations >= options_.validations_per_worker) continue;
    const auto& devices = worker.worker.devices();
    const bool has_type = std::any_of(
        devices.begin(), devices.end(), [&, &worker = worker](const v1::Device& device) {
          return device.type() == wanted && !worker.Faulty(device.id());
        });
    const std::pair<bool, int64_t> key{!has_type, validations};
    if (best == nullptr || key < best_key) {
      best = &worker;
      best_key = key;
    }
  }
  if (best == nullptr) return;
  LeaseRecord lease;
  lease.epoch = ++counters_.epoch;
  lease.worker = best->worker.name();
  lease.kind = v1::LEASE_KIND_VALIDATE;
  lease.world_size = 1;
  entry->job().set_reason("VALIDATING_ON_WORKER");
  entry->job().set_message(absl::StrCat(lease.worker, " reads model and data"));
  Touch(entry);
  pending_.erase(entry->job().name());
  entry->epoch = lease.epoch;
  entry->epochs.push_back(lease.epoch);
  AddLease(entry, std::move(lease));
}

void Coordinator::StartAttempt(JobEntry* entry, const sched::Decision& decision) {
  v1::Job& job = entry->job();
  const int64_t epoch = ++counters_.epoch;
  entry->epoch = epoch;
  entry->epochs.push_back(epoch);
  entry->step_s = 0;
  job.set_attempt(job.attempt() + 1);
  // Later attempts stay on the type of the first: another one computes other numbers.
  job.mutable_spec()->mutable_resources()->set_device_type(ToProtoType(decision.type));
  v1::Attempt* attempt = job.add_attempts();
  attempt->set_attempt(job.attempt());
  attempt->set_epoch(epoch);
  *attempt->mutable_start_time() = ToProto(now_);
  LeaseRecord lease;
  lease.epoch = epoch;
  lease.kind = v1::LEASE_KIND_TRAIN;
  lease.world_size = job.spec().resources().devices();
  if (!entry->checkpoints.empty()) {
    const v1::Checkpoint& from = entry->checkpoints.rbegin()->second.checkpoint;
    lease.checkpoint_artifact = from.artifact();
    lease.checkpoint_step = from.step();
    attempt->set_from_step(from.step());
  }
  job.clear_devices();
  for (const sched::Placement& placement : decision.placements) {
    for (const std::string& device : placement.devices) {
      const std::string id = placement.worker.substr(placement.worker.find('/') + 1);
      job.add_devices(absl::StrCat(id, "/", device));
    }
  }
  *attempt->mutable_devices() = job.devices();
  out_.actions.push_back(ObserveQueueWait{absl::ToDoubleSeconds(now_ - entry->record.queued_time)});
  SetState(
      entry, v1::JOB_STATE_STARTING, "LOADING",
      absl::StrCat("attempt ", job.attempt(), " loads on ", absl::StrJoin(job.devices(), ", ")));
  for (const sched::Placement& placement : decision.placements) {
    lease.worker = placement.worker;
    lease.devices = placement.devices;
    AddLease(entry, lease);
    lease.first_rank += static_cast<int32_t>(placement.devices.size());
  }
}

void Coordinator::AddLease(JobEntry* entry, LeaseRecord lease) {
  lease.job = entry->job().name();
  lease.attempt = entry->job().attempt();
  WorkerEntry& worker = workers_.at(lease.worker);
  worker.live.insert(lease.epoch);
  const LeaseKey key{lease.epoch, lease.worker};
  LeaseRecord& kept = leases_[key] = std::move(lease);
  SendLease(&kept, *entry, worker.session);
}

void Coordinator::SendLease(LeaseRecord* lease, const JobEntry& entry, SessionId session) {
  ++lease->deliveries;
  MarkDirty(*lease);
  v1::CoordinatorMessage message;
  v1::Lease* out = message.mutable_lease();
  out->set_epoch(lease->epoch);
  out->set_job(lease->job);
  out->set_attempt(lease->attempt);
  out->set_kind(lease->kind);
  *out->mutable_spec() = entry.job().spec();
  *out->mutable_devices() = {lease->devices.begin(), lease->devices.end()};
  out->set_first_rank(lease->first_rank);
  out->set_world_size(lease->world_size);
  out->set_checkpoint_artifact(lease->checkpoint_artifact);
  out->set_checkpoint_step(lease->checkpoint_step);
  Send(session, std::move(message));
}

std::vector<LeaseRecord*> Coordinator::Parts(const JobEntry& entry) {
  std::vector<LeaseRecord*> parts;
  if (entry.epoch == 0) return parts;
  for (auto it = leases_.lower_bound({entry.epoch, ""}); it != leases_.end(); ++it) {
    if (it->first.first != entry.epoch) break;
    parts.push_back(&it->second);
  }
  return parts;
}

void Coordinator::StopParts(JobEntry* entry, v1::StopMode mode) {
  for (LeaseRecord* part : Parts(*entry)) {
    if (part->phase == LeasePhase::kEnded || part->abandoned) continue;
    if (part->stop == v1::STOP_MODE_KILL || part->stop == mode) continue;
    part->stop = mode;
    MarkDirty(*part);
    v1::CoordinatorMessage message;
    message.mutable_stop()->set_epoch(part->epoch);
    message.mutable_stop()->set_mode(mode);
    Send(workers_.at(part->worker).session, std::move(message));
  }
}

void Coordinator::AbandonValidation(JobEntry* entry) {
  StopParts(entry, v1::STOP_MODE_KILL);
  for (LeaseRecord* part : Parts(*entry)) {
    part->abandoned = true;
    MarkDirty(*part);
  }
  entry->epoch = 0;
}

void Coordinator::EndLease(LeaseRecord* lease, const v1::LeaseEnded& ended) {
  JobEntry* entry = CurrentJob(*lease);
  lease->phase = LeasePhase::kEnded;
  lease->outcome = ended.outcome();
  MarkDirty(*lease);
  workers_.at(lease->worker).live.erase(lease->epoch);
  schedule_needed_ = true;
  bool live = false;
  for (auto it = leases_.lower_bound({lease->epoch, ""}); it != leases_.end(); ++it) {
    if (it->first.first != lease->epoch) break;
    live = live || it->second.phase != LeasePhase::kEnded;
  }
  const auto first = rendezvous_.lower_bound({lease->epoch, ""});
  const auto last = rendezvous_.lower_bound({lease->epoch + 1, ""});
  if (!live) {
    rendezvous_waiters_.erase(rendezvous_waiters_.lower_bound({lease->epoch, ""}),
                              rendezvous_waiters_.lower_bound({lease->epoch + 1, ""}));
    if (first != last) {
      rendezvous_.erase(first, last);
      out_.effects.push_back(DeleteRendezvous{lease->epoch});
    }
  }
  if (entry != nullptr && lease->kind == v1::LEASE_KIND_VALIDATE) {
    ValidationGone(entry, ended);
  } else if (entry != nullptr) {
    PartGone(entry, *lease, ended);
  } else if (FindJob(lease->job) == nullptr) {  // the job was deleted before its processes ended
    const LeaseKey key{lease->epoch, lease->worker};
    dirty_leases_.erase(key);
    out_.effects.push_back(DeleteLease{key.first, key.second});
    leases_.erase(key);
  }
}

// The validator is gone without having said whether the job can run.
void Coordinator::ValidationGone(JobEntry* entry, const v1::LeaseEnded& ended) {
  v1::Job& job = entry->job();
  entry->epoch = 0;
  v1::FailureCause cause = ended.cause();
  if (ended.outcome() != v1::LEASE_OUTCOME_FAILED || cause == v1::FAILURE_CAUSE_UNSPECIFIED) {
    cause = v1::FAILURE_CAUSE_TRAINER_CRASH;
  }
  const std::string message =
      ended.message().empty() ? "the validator ended without a report" : ended.message();
  if (NeverRetried(cause)) {
    FailJob(entry, cause, message);
    return;
  }
  if (job.restarts() >= job.spec().retry().max_restarts()) {
    OutOfRestarts(entry, cause, message);
    return;
  }
  job.set_restarts(job.restarts() + 1);
  job.set_reason("WAITING_FOR_WORKER");
  job.set_message("waits for a worker that reads model and data");
  Touch(entry);
  AddEvent(*entry, v1::EVENT_KIND_RECOVERY, CauseLabel(cause),
           absl::StrCat("validation is started again: ", message), 0);
  out_.actions.push_back(ObserveRestart{cause});
  pending_.insert(job.name());
  schedule_needed_ = true;
}

void Coordinator::NoteFailure(JobEntry* entry, v1::FailureCause cause, const std::string& message) {
  v1::Attempt* attempt = &*entry->job().mutable_attempts()->rbegin();
  if (Weight(cause) <= Weight(attempt->failure_cause())) return;
  attempt->set_failure_cause(cause);
  attempt->set_message(message);
  Touch(entry);
}

void Coordinator::PartGone(JobEntry* entry, const LeaseRecord& lease, const v1::LeaseEnded& ended) {
  v1::FailureCause cause = ended.cause();
  if (cause == v1::FAILURE_CAUSE_UNSPECIFIED) cause = v1::FAILURE_CAUSE_TRAINER_CRASH;
  std::string message = ended.message();
  bool failed = ended.outcome() == v1::LEASE_OUTCOME_FAILED;
  if (ended.outcome() == v1::LEASE_OUTCOME_UNSPECIFIED ||
      (ended.outcome() == v1::LEASE_OUTCOME_STOPPED && lease.stop == v1::STOP_MODE_UNSPECIFIED)) {
    failed = true;
    message = absl::StrCat("ended without being asked to. ", message);
  }
  // What a part says after it was killed is a consequence, unless its own input was wrong.
  if (failed && (lease.stop != v1::STOP_MODE_KILL || NeverRetried(cause))) {
    NoteFailure(entry, cause, message);
  }
  const v1::JobState state = entry->job().state();
  if (failed && (state == v1::JOB_STATE_STARTING || state == v1::JOB_STATE_RUNNING ||
                 state == v1::JOB_STATE_PREEMPTING)) {
    SetState(entry, v1::JOB_STATE_RECOVERING, CauseLabel(cause), message);
    StopParts(entry, v1::STOP_MODE_KILL);
  } else if (failed && state == v1::JOB_STATE_PAUSING) {
    StopParts(entry, v1::STOP_MODE_KILL);
  }
  for (const LeaseRecord* part : Parts(*entry)) {
    if (part->phase != LeasePhase::kEnded && !part->abandoned) return;
  }
  FinishAttempt(entry);
}

void Coordinator::FinishAttempt(JobEntry* entry) {
  v1::Job& job = entry->job();
  v1::Attempt* attempt = &*job.mutable_attempts()->rbegin();
  *attempt->mutable_end_time() = ToProto(now_);
  entry->epoch = 0;
  job.clear_devices();
  if (job.state() == v1::JOB_STATE_CANCELLING) {
    SetState(entry, v1::JOB_STATE_CANCELLED, "CANCELLED_BY_USER", "cancelled");
    return;
  }
  const auto& checkpoints = entry->checkpoints;
  if (!checkpoints.empty() && checkpoints.rbegin()->second.checkpoint.final()) {
    if (job.state() == v1::JOB_STATE_STARTING) {
      SetState(entry, v1::JOB_STATE_RUNNING, "TRAINING", "trained");
    }
    job.set_final_checkpoint(ResultCheckpoint(*entry)->name());
    SetState(entry, v1::JOB_STATE_SUCCEEDED, "COMPLETED",
             absl::StrCat("trained; the result is ", job.final_checkpoint()));
    return;
  }
  if (job.state() == v1::JOB_STATE_PAUSING) {
    if (NeverRetried(attempt->failure_cause())) {
      FailJob(entry, attempt->failure_cause(), attempt->message());
      return;
    }
    GoBackToCheckpoint(entry);
    SetState(entry, v1::JOB_STATE_PAUSED, "PAUSED_BY_USER",
             absl::StrCat("paused at step ", job.progress().step()));
    return;
  }
  if (job.state() != v1::JOB_STATE_RECOVERING) {
    NoteFailure(entry, v1::FAILURE_CAUSE_STORAGE, "ended, but its final checkpoint is not stored");
    SetState(entry, v1::JOB_STATE_RECOVERING, CauseLabel(attempt->failure_cause()),
             attempt->message());
  }
  FinishRecovery(entry, *attempt);
}

void Coordinator::FinishRecovery(JobEntry* entry, const v1::Attempt& attempt) {
  v1::Job& job = entry->job();
  const v1::FailureCause cause = attempt.failure_cause();
  if (NeverRetried(cause)) {
    FailJob(entry, cause, attempt.message());
    return;
  }
  if (job.restarts() >= job.spec().retry().max_restarts()) {
    OutOfRestarts(entry, cause, attempt.message());
    return;
  }
  job.set_restarts(job.restarts() + 1);
  const int64_t reached = job.progress().step();
  GoBackToCheckpoint(entry);
  SetState(entry, v1::JOB_STATE_QUEUED, "RESTARTING", "waits for devices again");
  AddEvent(
      *entry, v1::EVENT_KIND_RECOVERY, CauseLabel(cause),
      absl::StrCat("attempt ", job.attempt(), " ended at step ", reached,
                   "; the job goes back to step ", job.progress().step(), ": ", attempt.message()),
      job.progress().step());
  out_.actions.push_back(ObserveRestart{cause});
}

// A full disk is no fault of the job's: with room it goes on from its last checkpoint.
void Coordinator::OutOfRestarts(JobEntry* entry, v1::FailureCause cause,
                                const std::string& message) {
  const std::string used = absl::StrCat(message, " (no restarts left of retry.max_restarts = ",
                                        entry->job().spec().retry().max_restarts(), ")");
  if (cause != v1::FAILURE_CAUSE_STORAGE) {
    FailJob(entry, cause, used);
    return;
  }
  GoBackToCheckpoint(entry);
  SetState(entry, v1::JOB_STATE_PAUSED, kPausedByStorage,
           absl::StrCat(used, "; make room, then resume the job"));
}

void Coordinator::FailJob(JobEntry* entry, v1::FailureCause cause, const std::string& message) {
  entry->job().set_failure_cause(cause);
  SetState(entry, v1::JOB_STATE_FAILED, CauseLabel(cause), message);
  out_.actions.push_back(ObserveFailure{cause});
}

void Coordinator::GoBackToCheckpoint(JobEntry* entry) {
  v1::Progress* progress = entry->job().mutable_progress();
  int64_t step = 0;
  int64_t tokens = 0;
  if (!entry->checkpoints.empty()) {
    const CheckpointRecord& last = entry->checkpoints.rbegin()->second;
    step = last.checkpoint.step();
    tokens = last.trained_tokens;
  }
  progress->set_step(step);
  progress->set_trained_tokens(tokens);
  progress->set_tokens_per_s(0);
  progress->set_remaining_s(0);
  entry->steps.clear();
  MarkDirty(*entry);
}

}  // namespace attune
