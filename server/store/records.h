// What is durable, as values: the records that the coordinator keeps in memory and the store on
// disk, and the effects (changes of records) of one step. Names are resource names: jobs are
// "jobs/{id}", workers "workers/{id}".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "attune/v1/job.pb.h"
#include "attune/v1/worker_service.pb.h"

namespace attune {

struct JobRecord {
  int64_t seq = 0;     // order of creation, from 1
  int64_t change = 0;  // counts changes of the job other than progress: the etag
  absl::Time queued_time = absl::InfinitePast();  // last entry into QUEUED
  v1::Job job;         // etag is empty; attempts are all there
};

// The answer to a repeated CreateJob.
struct RequestRecord {
  std::string request_id;
  std::string job;
  std::string digest;  // of the request's spec
  absl::Time time;
};

enum class LeasePhase { kLeased = 0, kRunning = 1, kEnded = 2 };

// One worker's part of an attempt, or of a validation. Key: (epoch, worker).
struct LeaseRecord {
  int64_t epoch = 0;
  std::string worker;
  std::string job;
  v1::LeaseKind kind = v1::LEASE_KIND_UNSPECIFIED;
  int32_t attempt = 0;
  std::vector<std::string> devices;  // by rank
  int32_t first_rank = 0;
  int32_t world_size = 0;
  std::string checkpoint_artifact;
  int64_t checkpoint_step = 0;
  LeasePhase phase = LeasePhase::kLeased;
  // The job no longer counts on it, but its processes may live: the devices stay blocked until
  // the worker says that it ended.
  bool abandoned = false;
  v1::StopMode stop = v1::STOP_MODE_UNSPECIFIED;
  v1::LeaseOutcome outcome = v1::LEASE_OUTCOME_UNSPECIFIED;
  int32_t deliveries = 0;     // how often the Lease message was sent
  int64_t last_sequence = 0;  // reports up to this one are applied
};

struct CheckpointRecord {
  std::string job;
  int64_t trained_tokens = 0;  // of the job when this step ended
  v1::Checkpoint checkpoint;
};

// Cumulative trained tokens after a step, to know them again when a job goes back to it.
struct StepTokens {
  int64_t step = 0;
  int64_t trained_tokens = 0;
};

struct PutJob { JobRecord record; };
// Also deletes its checkpoints, ended leases, and in the background its streams.
struct DeleteJob { std::string job; };
struct PutRequest { RequestRecord record; };
struct DeleteRequest { std::string request_id; };
struct PutLease { LeaseRecord record; };
struct DeleteLease { int64_t epoch; std::string worker; };
struct PutWorker { v1::Worker worker; };  // without connected, last_heartbeat_time and uses
struct DeleteWorker { std::string worker; };
struct PutCheckpoint { CheckpointRecord record; };
struct DeleteCheckpoint { std::string job; int64_t step; };
struct AppendEvent { v1::Event event; };
struct AppendMetrics { v1::StepMetrics metrics; int64_t cumulative_tokens; };
struct AppendLog { v1::LogLine line; };
struct PutRendezvous { int64_t epoch; std::string key; std::string value; };
struct DeleteRendezvous { int64_t epoch; };
// Numbers that only rise; kept apart from the rows so that deleting rows never repeats one.
struct PutCounters { int64_t revision; int64_t epoch; int64_t job_seq; };

using Effect =
    std::variant<PutJob, DeleteJob, PutRequest, DeleteRequest, PutLease, DeleteLease, PutWorker,
                 DeleteWorker, PutCheckpoint, DeleteCheckpoint, AppendEvent, AppendMetrics,
                 AppendLog, PutRendezvous, DeleteRendezvous, PutCounters>;

// Everything that the coordinator needs at its start.
struct StoredState {
  std::vector<JobRecord> jobs;
  std::vector<RequestRecord> requests;
  std::vector<LeaseRecord> leases;
  std::vector<v1::Worker> workers;
  std::vector<CheckpointRecord> checkpoints;
  std::map<std::pair<int64_t, std::string>, std::string> rendezvous;  // (epoch, key) -> value
  std::map<std::string, std::vector<StepTokens>> steps;  // of jobs that are not final, since
                                                         // their last checkpoint
  PutCounters counters{0, 0, 0};
};

enum class StreamKind { kEvents = 0, kMetrics = 1, kLogs = 2 };

}  // namespace attune
