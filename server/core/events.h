// What comes into the coordinator and what leaves it, as values. Ids, tokens and times come with
// the event, so that the same events give the same state.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "attune/v1/job.pb.h"
#include "attune/v1/job_spec.pb.h"
#include "attune/v1/worker_service.pb.h"
#include "server/store/records.h"

namespace attune {

// A client's call that is answered by one CompleteCall. 0: nobody waits.
using CallId = uint64_t;
// A worker's connection. Never used twice in one life of the coordinator.
using SessionId = uint64_t;

struct CreateJobEvent {
  CallId call = 0;
  std::string job;         // the name that it shall have; unique
  v1::JobSpec spec;        // defaults filled in, valid
  std::string request_id;  // may be empty
  std::string digest;      // of the request's spec as it came
};
struct CancelJobEvent {
  CallId call = 0;
  std::string job;
  std::string etag;
};
struct PauseJobEvent {
  CallId call = 0;
  std::string job;
  std::string etag;
};
struct ResumeJobEvent {
  CallId call = 0;
  std::string job;
  std::string etag;
  std::optional<int32_t> devices;
};
struct DeleteJobEvent {
  CallId call = 0;
  std::string job;
  std::string etag;
};
struct WaitJobEvent {
  CallId call = 0;
  std::string job;
  absl::Time deadline;
};
// The caller is gone: its call is completed with CANCELLED if it still waits.
struct ForgetCallEvent {
  CallId call = 0;
};
struct DeleteCheckpointEvent {
  CallId call = 0;
  std::string name;
};
struct DeleteArtifactEvent {
  CallId call = 0;
  std::string artifact;
};

struct RegisterEvent {
  SessionId session = 0;
  v1::Register message;
};
struct HeartbeatEvent {
  SessionId session = 0;
  v1::Heartbeat message = {};
};
struct ReportEvent {
  SessionId session = 0;
  v1::Report report;
};
struct RendezvousSetEvent {
  SessionId session = 0;
  v1::RendezvousSet message;
};
struct RendezvousGetEvent {
  SessionId session = 0;
  v1::RendezvousGet message;
};
struct SessionClosedEvent {
  SessionId session = 0;
};
// Time has passed: deadlines are looked at.
struct TickEvent {};

using CoordinatorEvent =
    std::variant<CreateJobEvent, CancelJobEvent, PauseJobEvent, ResumeJobEvent, DeleteJobEvent,
                 WaitJobEvent, ForgetCallEvent, DeleteCheckpointEvent, DeleteArtifactEvent,
                 RegisterEvent, HeartbeatEvent, ReportEvent, RendezvousSetEvent, RendezvousGetEvent,
                 SessionClosedEvent, TickEvent>;

struct SendToSession {
  SessionId session;
  v1::CoordinatorMessage message;
};
struct CloseSession {
  SessionId session;
  absl::Status status;
};
struct CompleteCall {
  CallId call;
  absl::Status status;
  v1::Job job;
};
// No job and no checkpoint refers to it any more; deleting it may be repeated or fail.
struct RemoveArtifact {
  std::string artifact;
  CallId call = 0;
};

// Numbers for monitoring, reported when they are durable.
struct ObserveQueueWait {
  double wait_s;
};
struct ObserveFailure {
  v1::FailureCause cause;
};
struct ObserveRestart {
  v1::FailureCause cause;
};
struct ObserveStep {
  int64_t trained_tokens;
};
struct ObserveCheckpoint {
  int64_t bytes;
};

using Action =
    std::variant<SendToSession, CloseSession, CompleteCall, RemoveArtifact, ObserveQueueWait,
                 ObserveFailure, ObserveRestart, ObserveStep, ObserveCheckpoint>;

// `effects` must be durable before any of `actions` is performed.
struct StepResult {
  std::vector<Effect> effects;
  std::vector<Action> actions;
};

}  // namespace attune
