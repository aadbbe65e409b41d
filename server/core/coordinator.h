// The coordinator as a deterministic state machine: (state, event, now) -> (state, effects,
// actions). No clock, socket, thread or random number: the same events give the same run, so
// tests/sim replays a failure from its seed. The caller (Runner) commits a step's effects before
// it performs its actions; a crash between steps therefore loses nothing that anybody was told.
//
// Who owns a device: a lease (epoch, worker) of kind TRAIN that has not ended holds its devices.
// A lease ends when its worker says so (LeaseEnded), or registers again without it. Losing a
// worker only abandons its leases: the job goes on elsewhere, the devices stay blocked.
//
// Fencing: a job has at most one current epoch. Reports of a lease that is not current move
// nothing but the lease itself; reports of an unknown or ended lease are answered Stale.
//
// Not thread-safe; cost of a step is O(log jobs) except Register, loss of a worker, lists.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/core/events.h"
#include "server/sched/plan.h"
#include "server/store/records.h"

namespace attune {

struct CoordinatorOptions {
  // A worker from which nothing was heard for so long is lost.
  absl::Duration lease_timeout = absl::Seconds(15);
  // How often workers are asked to send a heartbeat.
  absl::Duration heartbeat_interval = absl::Seconds(3);
  // Validations that one worker does at the same time.
  int validations_per_worker = 2;
  // Whether an artifact is there and READY. Must not block.
  std::function<bool(const std::string& artifact)> artifact_ready;
};

// Gauges, at one moment.
struct CoordinatorStats {
  std::map<v1::JobState, int64_t> jobs;
  std::map<std::pair<v1::DeviceType, std::string>, int64_t> devices;  // (type, use) -> count
  double tokens_per_s = 0;
  int64_t sessions = 0;
  std::vector<std::pair<std::string, v1::DeviceStatus>> gpus;  // of connected workers, with names
};

struct JobPage {
  std::vector<v1::Job> jobs;
  int64_t next = 0;  // `before` of the next page; 0 at the end
};

class Coordinator {
 public:
  // `now`: workers that hold leases get lease_timeout from now on to come back.
  Coordinator(CoordinatorOptions options, StoredState stored, absl::Time now);

  StepResult Step(const CoordinatorEvent& event, absl::Time now);

  // Gives validations to workers and starts queued jobs. Cheap when nothing changed.
  StepResult Schedule(absl::Time now);

  // With attempts. NOT_FOUND.
  absl::StatusOr<v1::Job> GetJob(const std::string& name) const;
  // Newest first, created before `before` (0: from the newest); `states` empty: all.
  JobPage ListJobs(const std::set<v1::JobState>& states, int64_t before, int page_size) const;
  std::vector<v1::Worker> ListWorkers() const;
  absl::StatusOr<std::vector<v1::Checkpoint>> ListCheckpoints(const std::string& job) const;
  absl::StatusOr<v1::Checkpoint> GetCheckpoint(const std::string& name) const;
  bool ArtifactInUse(const std::string& artifact) const;
  CoordinatorStats Stats() const;

  // For the invariants of tests: every lease that may still have processes.
  std::vector<LeaseRecord> LiveLeases() const;

 private:
  struct JobEntry {
    JobRecord record;
    int64_t epoch = 0;            // of the current attempt or validation; 0: none
    std::vector<int64_t> epochs;  // of every lease that is known
    std::map<int64_t, CheckpointRecord> checkpoints;     // by step
    std::deque<StepTokens> steps;                        // since the last checkpoint
    double step_s = 0;                                   // smoothed; 0: unknown
    std::string pending_reason, pending_message;         // of QUEUED, from the last plan
    std::vector<std::pair<CallId, absl::Time>> waiters;  // (call, deadline)
    v1::Job& job() { return record.job; }
    const v1::Job& job() const { return record.job; }
  };
  struct WorkerEntry {
    v1::Worker worker;
    SessionId session = 0;  // 0: not connected
    absl::Time last_heard;
    bool lost = false;
    std::set<int64_t> live;                            // epochs of leases that have not ended
    std::map<std::string, v1::DeviceStatus> statuses;  // of its GPUs, as last heard, by Device.id

    bool Faulty(const std::string& device) const {
      const auto it = statuses.find(device);
      return it != statuses.end() && !it->second.fault().empty();
    }
  };
  using LeaseKey = std::pair<int64_t, std::string>;  // (epoch, worker)

  // coordinator_jobs.cc: what users ask for.
  void On(const CreateJobEvent& event);
  void On(const CancelJobEvent& event);
  void On(const PauseJobEvent& event);
  void On(const ResumeJobEvent& event);
  void On(const DeleteJobEvent& event);
  void On(const WaitJobEvent& event);
  void On(const ForgetCallEvent& event);
  void On(const DeleteCheckpointEvent& event);
  void On(const DeleteArtifactEvent& event);
  bool RepeatsRequest(const CreateJobEvent& event);
  absl::Status MissingArtifacts(const v1::JobSpec& spec) const;
  // The job that a call names, or null: the call is completed with the error.
  JobEntry* FindForCall(CallId call, const std::string& name, const std::string& etag);
  void CompleteWith(CallId call, const JobEntry& entry);
  void Fail(CallId call, absl::Status status);

  // coordinator_workers.cc: what workers say.
  void On(const RegisterEvent& event);
  void On(const HeartbeatEvent& event);
  void TakeStatuses(const google::protobuf::RepeatedPtrField<v1::DeviceStatus>& statuses,
                    WorkerEntry* worker);
  void On(const ReportEvent& event);
  void On(const RendezvousSetEvent& event);
  void On(const RendezvousGetEvent& event);
  void On(const SessionClosedEvent& event);
  void On(const TickEvent& event);
  WorkerEntry* HeardFrom(SessionId session);
  void ReconcileLeases(WorkerEntry* worker, const v1::Register& message);
  void ReconcileLease(LeaseRecord* lease, bool held, v1::Registered* registered,
                      std::vector<v1::CoordinatorMessage>* after);
  void MarkLost(WorkerEntry* worker);
  void ForgetOldWorkers();
  void ExpireWaits();
  void ExpireRequests();

  // coordinator_reports.cc: what happens under a lease.
  void ApplyReport(LeaseRecord* lease, JobEntry* entry, const v1::Report& report);
  void ApplyStep(JobEntry* entry, const v1::StepMetrics& metrics);
  void ApplyLog(JobEntry* entry, const v1::LogLine& line);
  void ApplyRunning(LeaseRecord* lease, JobEntry* entry, const v1::LeaseRunning& running);
  void ApplyCheckpoint(JobEntry* entry, const v1::CheckpointStored& stored);
  void ApplyValidation(JobEntry* entry, const v1::ValidationReport& report);
  void RetainCheckpoints(JobEntry* entry);
  // With the lowest evaluation loss; null if there was no evaluation.
  static const v1::Checkpoint* BestCheckpoint(const JobEntry& entry);
  // The best or the last, as the spec says; null if there is none.
  static const v1::Checkpoint* ResultCheckpoint(const JobEntry& entry);
  void DropCheckpoint(JobEntry* entry, int64_t step);

  // coordinator_attempts.cc: attempts begin and end.
  void AssignValidation(JobEntry* entry);
  void StartAttempt(JobEntry* entry, const sched::Decision& decision);
  void AddLease(JobEntry* entry, LeaseRecord lease);
  void SendLease(LeaseRecord* lease, const JobEntry& entry, SessionId session);
  void EndLease(LeaseRecord* lease, const v1::LeaseEnded& ended);
  void PartGone(JobEntry* entry, const LeaseRecord& lease, const v1::LeaseEnded& ended);
  void ValidationGone(JobEntry* entry, const v1::LeaseEnded& ended);
  void NoteFailure(JobEntry* entry, v1::FailureCause cause, const std::string& message);
  void FinishAttempt(JobEntry* entry);
  void FinishRecovery(JobEntry* entry, const v1::Attempt& attempt);
  void OutOfRestarts(JobEntry* entry, v1::FailureCause cause, const std::string& message);
  void FailJob(JobEntry* entry, v1::FailureCause cause, const std::string& message);
  void GoBackToCheckpoint(JobEntry* entry);
  // Asks every part of the current epoch to stop. An earlier KILL is not weakened.
  void StopParts(JobEntry* entry, v1::StopMode mode);
  void AbandonValidation(JobEntry* entry);
  std::vector<LeaseRecord*> Parts(const JobEntry& entry);
  sched::Snapshot MakeSnapshot() const;

  // coordinator.cc: state, bookkeeping of a step.
  void LoadJob(JobRecord record);
  void BeginStep(absl::Time now);
  StepResult EndStep();
  JobEntry* FindJob(const std::string& name);
  LeaseRecord* FindLease(int64_t epoch, const std::string& worker);
  // The job for which the lease counts, or null.
  JobEntry* CurrentJob(const LeaseRecord& lease);
  void SetState(JobEntry* entry, v1::JobState state, const std::string& reason,
                const std::string& message);
  void Touch(JobEntry* entry);  // a change that the etag shows
  void MarkDirty(const JobEntry& entry) { dirty_jobs_.insert(entry.record.job.name()); }
  void MarkDirty(const LeaseRecord& lease) { dirty_leases_.insert({lease.epoch, lease.worker}); }
  void AddEvent(const JobEntry& entry, v1::EventKind kind, const std::string& reason,
                const std::string& message, int64_t step);
  void Send(SessionId session, v1::CoordinatorMessage message);
  void CountArtifacts(const v1::JobSpec& spec, int by);
  void CountArtifact(const std::string& artifact, int by);
  v1::Job View(const JobEntry& entry, bool with_attempts) const;

  const CoordinatorOptions options_;
  std::map<std::string, JobEntry> jobs_;        // by name
  std::map<int64_t, std::string> jobs_by_seq_;  // creation order
  std::set<std::string> pending_;               // VALIDATING without a lease, and QUEUED
  std::map<std::string, RequestRecord> requests_;
  std::map<std::string, WorkerEntry> workers_;
  std::map<SessionId, std::string> sessions_;  // -> worker
  std::map<LeaseKey, LeaseRecord> leases_;
  std::map<std::pair<int64_t, std::string>, std::string> rendezvous_;
  std::map<std::pair<int64_t, std::string>, std::set<SessionId>> rendezvous_waiters_;
  std::map<CallId, std::string> waiting_calls_;   // -> job
  std::map<std::string, int64_t> artifact_refs_;  // from jobs not final and checkpoints
  PutCounters counters_{0, 0, 0};
  absl::Time last_tick_;
  bool schedule_needed_ = true;

  // Of the step in progress.
  absl::Time now_;
  StepResult out_;
  std::set<std::string> dirty_jobs_;
  std::set<LeaseKey> dirty_leases_;
  PutCounters counters_before_{0, 0, 0};
};

}  // namespace attune
