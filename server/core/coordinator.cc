#include "server/core/coordinator.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "server/core/errors.h"
#include "server/core/job_state.h"
#include "server/core/names.h"
#include "server/core/times.h"

namespace attune {

Coordinator::Coordinator(CoordinatorOptions options, StoredState stored, absl::Time now)
    : options_(std::move(options)), counters_(stored.counters), last_tick_(now), now_(now) {
  for (JobRecord& record : stored.jobs) LoadJob(std::move(record));
  for (RequestRecord& record : stored.requests) requests_[record.request_id] = std::move(record);
  for (v1::Worker& worker : stored.workers) {
    WorkerEntry& entry = workers_[worker.name()];
    entry.worker = std::move(worker);
    entry.last_heard = now;
  }
  for (CheckpointRecord& record : stored.checkpoints) {
    CountArtifact(record.checkpoint.artifact(), 1);
    JobEntry* entry = FindJob(record.job);
    CHECK(entry != nullptr);
    const int64_t step = record.checkpoint.step();
    entry->checkpoints[step] = std::move(record);
  }
  for (auto& [job, steps] : stored.steps) {
    if (JobEntry* entry = FindJob(job)) entry->steps.assign(steps.begin(), steps.end());
  }
  for (LeaseRecord& lease : stored.leases) {
    if (lease.phase != LeasePhase::kEnded) workers_.at(lease.worker).live.insert(lease.epoch);
    if (JobEntry* entry = FindJob(lease.job)) {
      entry->epochs.push_back(lease.epoch);
      const bool validates = lease.kind == v1::LEASE_KIND_VALIDATE &&
                             entry->job().state() == v1::JOB_STATE_VALIDATING &&
                             lease.phase != LeasePhase::kEnded && !lease.abandoned;
      if (validates) entry->epoch = lease.epoch;
    }
    const LeaseKey key{lease.epoch, lease.worker};
    leases_[key] = std::move(lease);
  }
  for (auto& [name, entry] : jobs_) {
    if (entry.job().state() == v1::JOB_STATE_VALIDATING && entry.epoch == 0) pending_.insert(name);
  }
  rendezvous_ = std::move(stored.rendezvous);
}

void Coordinator::LoadJob(JobRecord record) {
  const std::string name = record.job.name();
  JobEntry& entry = jobs_[name];
  entry.record = std::move(record);
  jobs_by_seq_[entry.record.seq] = name;
  const v1::JobState state = entry.job().state();
  if (!IsFinal(state)) CountArtifacts(entry.job().spec(), 1);
  if (state == v1::JOB_STATE_QUEUED) {
    pending_.insert(name);
    entry.pending_reason = "WAITING_FOR_DEVICES";
    entry.pending_message = "waits for its turn";
  }
  if (HoldsDevices(state)) entry.epoch = entry.job().attempts().rbegin()->epoch();
}

void Coordinator::BeginStep(absl::Time now) {
  now_ = std::max(now_, now);  // the clock of the host may go back
  out_ = StepResult();
  counters_before_ = counters_;
}

StepResult Coordinator::EndStep() {
  for (const std::string& name : dirty_jobs_) {
    if (const JobEntry* entry = FindJob(name)) out_.effects.push_back(PutJob{entry->record});
  }
  for (const auto& [epoch, worker] : dirty_leases_) {
    if (const LeaseRecord* lease = FindLease(epoch, worker)) {
      out_.effects.push_back(PutLease{*lease});
    }
  }
  dirty_jobs_.clear();
  dirty_leases_.clear();
  if (counters_.revision != counters_before_.revision ||
      counters_.epoch != counters_before_.epoch || counters_.job_seq != counters_before_.job_seq) {
    out_.effects.push_back(counters_);
  }
  return std::move(out_);
}

StepResult Coordinator::Step(const CoordinatorEvent& event, absl::Time now) {
  BeginStep(now);
  std::visit([this](const auto& e) { On(e); }, event);
  return EndStep();
}

StepResult Coordinator::Schedule(absl::Time now) {
  BeginStep(now);
  if (!schedule_needed_) return EndStep();
  schedule_needed_ = false;
  const std::set<std::string> pending = pending_;
  for (const std::string& name : pending) {
    JobEntry* entry = FindJob(name);
    if (entry->job().state() == v1::JOB_STATE_VALIDATING) AssignValidation(entry);
  }
  const sched::Plan plan = sched::MakePlan(MakeSnapshot(), now_);
  for (const sched::Decision& decision : plan.decisions) {
    JobEntry* entry = FindJob(decision.job);
    if (!decision.placements.empty()) {
      StartAttempt(entry, decision);
    } else {
      entry->pending_reason = decision.reason;
      entry->pending_message = decision.message;
    }
  }
  return EndStep();
}

Coordinator::JobEntry* Coordinator::FindJob(const std::string& name) {
  const auto it = jobs_.find(name);
  return it == jobs_.end() ? nullptr : &it->second;
}

LeaseRecord* Coordinator::FindLease(int64_t epoch, const std::string& worker) {
  const auto it = leases_.find({epoch, worker});
  return it == leases_.end() ? nullptr : &it->second;
}

Coordinator::JobEntry* Coordinator::CurrentJob(const LeaseRecord& lease) {
  JobEntry* entry = FindJob(lease.job);
  const bool current = entry != nullptr && entry->epoch == lease.epoch && !lease.abandoned;
  return current ? entry : nullptr;
}

void Coordinator::SetState(JobEntry* entry, v1::JobState state, const std::string& reason,
                           const std::string& message) {
  v1::Job& job = entry->job();
  CHECK(IsLegalTransition(job.state(), state));
  job.set_state(state);
  job.set_reason(reason);
  job.set_message(message);
  const bool waits = state == v1::JOB_STATE_QUEUED || state == v1::JOB_STATE_VALIDATING;
  if (waits) {
    pending_.insert(job.name());
  } else {
    pending_.erase(job.name());
  }
  if (state == v1::JOB_STATE_QUEUED) {
    entry->record.queued_time = now_;
    entry->pending_reason = "WAITING_FOR_DEVICES";
    entry->pending_message = "waits for its turn";
  }
  if (IsFinal(state)) {
    *job.mutable_end_time() = ToProto(now_);
    job.mutable_progress()->set_tokens_per_s(0);
    job.mutable_progress()->set_remaining_s(0);
    entry->steps.clear();
    CountArtifacts(job.spec(), -1);
  }
  Touch(entry);
  AddEvent(*entry, v1::EVENT_KIND_STATE, reason, message, job.progress().step());
  if (IsFinal(state) || state == v1::JOB_STATE_PAUSED) {
    for (const auto& [call, deadline] : entry->waiters) {
      waiting_calls_.erase(call);
      CompleteWith(call, *entry);
    }
    entry->waiters.clear();
  }
  schedule_needed_ = true;
}

void Coordinator::Touch(JobEntry* entry) {
  ++entry->record.change;
  MarkDirty(*entry);
}

void Coordinator::AddEvent(const JobEntry& entry, v1::EventKind kind, const std::string& reason,
                           const std::string& message, int64_t step) {
  v1::Event event;
  event.set_revision(++counters_.revision);
  event.set_job(entry.job().name());
  *event.mutable_time() = ToProto(now_);
  event.set_kind(kind);
  event.set_attempt(entry.job().attempt());
  event.set_state(entry.job().state());
  event.set_reason(reason);
  event.set_message(message);
  event.set_step(step);
  out_.effects.push_back(AppendEvent{std::move(event)});
}

void Coordinator::Send(SessionId session, v1::CoordinatorMessage message) {
  if (session != 0) out_.actions.push_back(SendToSession{session, std::move(message)});
}

void Coordinator::CountArtifact(const std::string& artifact, int by) {
  if (artifact.empty()) return;
  const auto it = artifact_refs_.emplace(artifact, 0).first;
  it->second += by;
  CHECK(it->second >= 0);
  if (it->second == 0) artifact_refs_.erase(it);
}

void Coordinator::CountArtifacts(const v1::JobSpec& spec, int by) {
  CountArtifact(spec.model().source().artifact(), by);
  CountArtifact(spec.lora().init_from().artifact(), by);
  for (const auto& dataset : spec.datasets()) CountArtifact(dataset.source().artifact(), by);
  for (const auto& dataset : spec.evaluation().datasets()) {
    CountArtifact(dataset.source().artifact(), by);
  }
}

bool Coordinator::ArtifactInUse(const std::string& artifact) const {
  return artifact_refs_.count(artifact) != 0;
}

v1::Job Coordinator::View(const JobEntry& entry, bool with_attempts) const {
  v1::Job job = entry.job();
  job.set_etag(absl::StrCat(entry.record.change));
  if (!with_attempts) job.clear_attempts();
  if (job.state() == v1::JOB_STATE_QUEUED) {
    job.set_reason(entry.pending_reason);
    job.set_message(entry.pending_message);
  }
  return job;
}

absl::StatusOr<v1::Job> Coordinator::GetJob(const std::string& name) const {
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) {
    return ErrorWithReason(absl::StatusCode::kNotFound, "JOB_NOT_FOUND",
                           absl::StrCat("there is no job '", name, "'"), {{"job", name}});
  }
  return View(it->second, /*with_attempts=*/true);
}

JobPage Coordinator::ListJobs(const std::set<v1::JobState>& states, int64_t before,
                              int page_size) const {
  JobPage page;
  auto it = before == 0 ? jobs_by_seq_.end() : jobs_by_seq_.lower_bound(before);
  while (it != jobs_by_seq_.begin()) {
    --it;
    const JobEntry& entry = jobs_.at(it->second);
    if (!states.empty() && states.count(entry.job().state()) == 0) continue;
    if (static_cast<int>(page.jobs.size()) == page_size) {
      page.next = it->first + 1;
      break;
    }
    page.jobs.push_back(View(entry, /*with_attempts=*/false));
  }
  return page;
}

std::vector<v1::Worker> Coordinator::ListWorkers() const {
  std::vector<v1::Worker> workers;
  for (const auto& [name, entry] : workers_) {
    v1::Worker worker = entry.worker;
    worker.set_connected(entry.session != 0);
    *worker.mutable_last_heartbeat_time() = ToProto(entry.last_heard);
    for (const auto& [device, status] : entry.statuses) *worker.add_statuses() = status;
    for (int64_t epoch : entry.live) {
      const LeaseRecord& lease = leases_.at({epoch, name});
      for (const std::string& device : lease.devices) {
        v1::DeviceUse* use = worker.add_uses();
        use->set_device(device);
        use->set_job(lease.job);
        use->set_epoch(epoch);
      }
    }
    workers.push_back(std::move(worker));
  }
  return workers;
}

absl::StatusOr<std::vector<v1::Checkpoint>> Coordinator::ListCheckpoints(
    const std::string& job) const {
  const absl::StatusOr<v1::Job> found = GetJob(job);
  if (!found.ok()) return found.status();
  std::vector<v1::Checkpoint> checkpoints;
  for (const auto& [step, record] : jobs_.at(job).checkpoints) {
    checkpoints.push_back(record.checkpoint);
  }
  return checkpoints;
}

absl::StatusOr<v1::Checkpoint> Coordinator::GetCheckpoint(const std::string& name) const {
  const absl::StatusOr<CheckpointId> id = ParseCheckpointName(name);
  if (!id.ok()) return id.status();
  const absl::StatusOr<v1::Job> job = GetJob(id->job);
  if (!job.ok()) return job.status();
  const JobEntry& entry = jobs_.at(id->job);
  const v1::Checkpoint* found = nullptr;
  if (id->step == kResultCheckpoint) {
    found = ResultCheckpoint(entry);
  } else if (id->step == kBestCheckpoint) {
    found = BestCheckpoint(entry);
  } else if (id->step == kLastCheckpoint) {
    if (!entry.checkpoints.empty()) found = &entry.checkpoints.rbegin()->second.checkpoint;
  } else if (const auto it = entry.checkpoints.find(id->step); it != entry.checkpoints.end()) {
    found = &it->second.checkpoint;
  }
  if (found == nullptr) {
    return ErrorWithReason(
        absl::StatusCode::kNotFound, "CHECKPOINT_NOT_FOUND",
        absl::StrCat("there is no checkpoint '", name, "'; list the checkpoints of ", id->job));
  }
  return *found;
}

const v1::Checkpoint* Coordinator::BestCheckpoint(const JobEntry& entry) {
  const v1::Checkpoint* best = nullptr;
  for (const auto& [step, record] : entry.checkpoints) {
    if (record.checkpoint.best()) best = &record.checkpoint;  // each is better than those before
  }
  return best;
}

const v1::Checkpoint* Coordinator::ResultCheckpoint(const JobEntry& entry) {
  if (entry.checkpoints.empty()) return nullptr;
  const v1::Checkpoint* best = BestCheckpoint(entry);
  const bool want_best = entry.job().spec().checkpoints().load_best_model_at_end();
  return want_best && best != nullptr ? best : &entry.checkpoints.rbegin()->second.checkpoint;
}

CoordinatorStats Coordinator::Stats() const {
  CoordinatorStats stats;
  for (int s = v1::JobState_MIN + 1; s <= v1::JobState_MAX; ++s) {
    stats.jobs[static_cast<v1::JobState>(s)] = 0;
  }
  for (const auto& [name, entry] : jobs_) {
    ++stats.jobs[entry.job().state()];
    if (entry.job().state() == v1::JOB_STATE_RUNNING) {
      stats.tokens_per_s += entry.job().progress().tokens_per_s();
    }
  }
  for (const auto& [name, entry] : workers_) {
    if (entry.session != 0) ++stats.sessions;
    std::set<std::string> leased;
    for (int64_t epoch : entry.live) {
      const LeaseRecord& lease = leases_.at({epoch, name});
      leased.insert(lease.devices.begin(), lease.devices.end());
    }
    for (const v1::Device& device : entry.worker.devices()) {
      const char* use = entry.session == 0               ? "away"
                        : leased.count(device.id()) != 0 ? "leased"
                        : entry.Faulty(device.id())      ? "faulty"
                                                         : "free";
      ++stats.devices[{device.type(), use}];
    }
    if (entry.session == 0) continue;
    for (const auto& [device, status] : entry.statuses) stats.gpus.emplace_back(name, status);
  }
  return stats;
}

std::vector<LeaseRecord> Coordinator::LiveLeases() const {
  std::vector<LeaseRecord> live;
  for (const auto& [key, lease] : leases_) {
    if (lease.phase != LeasePhase::kEnded) live.push_back(lease);
  }
  return live;
}

}  // namespace attune
