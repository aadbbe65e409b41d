// One lease as a deterministic state machine: what happened goes in, what must be done comes out.
// It knows no process, socket, disk or clock.
//
//   preparing --OnStarted--> running --every process gone, every checkpoint stored--> ended
//       `------- OnPrepareFailed, OnStop --------------------------------------------------^
//
// Invariants: LeaseEnded is the last report and comes exactly once, when no process is alive.
// A failure kills the lease's other trainers. What went wrong first is the cause, except that
// PEER_LOST gives way to any other: that rank only noticed.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "attune/v1/trainer.pb.h"
#include "attune/v1/worker_service.pb.h"
#include "worker/agent/trainer_exit.h"

namespace attune {

struct LeaseAction {
  enum class Kind {
    kReport,           // report, in this order (epoch filled in, sequence not)
    kKill,             // every process of the lease
    kAbandonUploads,   // nothing is to be stored any more
    kSendToRank,       // to_trainer, to local rank `rank`
    kUpload,           // checkpoint; answer with OnStored or OnStoreFailed, in order
    kRendezvousSet,    // rendezvous_set, to the coordinator
    kRendezvousGet,    // rendezvous_get, to the coordinator
  };
  Kind kind;
  int rank = -1;
  v1::Report report;
  v1::AgentToTrainer to_trainer;
  v1::CheckpointWritten checkpoint;
  v1::RendezvousSet rendezvous_set;
  v1::RendezvousGet rendezvous_get;
};

class LeaseMachine {
 public:
  using Actions = std::vector<LeaseAction>;

  explicit LeaseMachine(v1::Lease lease);

  const v1::Lease& lease() const { return lease_; }
  int trainers() const { return static_cast<int>(ranks_.size()); }
  bool preparing() const { return phase_ == Phase::kPreparing; }
  bool ended() const { return phase_ == Phase::kEnded; }

  // The sources cannot be had, or a trainer cannot be started. Trainers that were started must be
  // gone already.
  Actions OnPrepareFailed(v1::FailureCause cause, const std::string& message);
  // Every trainer's process runs.
  Actions OnStarted(absl::Time now);
  Actions OnMessage(int rank, const v1::TrainerToAgent& message, absl::Time now);
  Actions OnLine(int rank, bool is_stderr, const std::string& line, absl::Time now);
  // The process and all that it started are gone, and all that it said has been handed in.
  Actions OnExit(int rank, const TrainerExit& exit, absl::Time now);
  Actions OnStop(v1::StopMode mode);
  Actions OnStored(const std::string& artifact, int64_t bytes);
  Actions OnStoreFailed(const absl::Status& status);
  // The agent cannot go on with this lease for a reason of its own, e.g. its disk is full.
  Actions OnAgentFailure(v1::FailureCause cause, const std::string& message);
  Actions OnRendezvousValue(const v1::RendezvousValue& value);
  // A new session: the coordinator may not have got what was sent over the old one.
  Actions OnReconnected();
  Actions OnTick(absl::Time now);

 private:
  enum class Phase { kPreparing, kRunning, kEnded };
  struct Rank {
    bool exited = false;
    bool loaded = false;
    std::optional<v1::TrainerFailure> failure;
  };

  v1::Report NewReport() const;
  bool HoldsAllRanks() const;
  void Report(v1::Report report, Actions* actions);
  void OnRunning(int rank, const v1::LeaseRunning& running, Actions* actions);
  void OnRendezvousSet(v1::RendezvousSet set, Actions* actions);
  void OnRendezvousGet(int rank, v1::RendezvousGet get, Actions* actions);
  void AnswerGets(const std::string& key, Actions* actions);
  void Fail(v1::FailureCause cause, const std::string& message, Actions* actions);
  void Kill(Actions* actions);
  void MaybeEnd(Actions* actions);
  void End(v1::LeaseOutcome outcome, v1::FailureCause cause, const std::string& message,
           Actions* actions);
  std::string DescribeExit(int rank, const TrainerExit& exit) const;

  const v1::Lease lease_;
  Phase phase_ = Phase::kPreparing;
  std::vector<Rank> ranks_;
  bool running_reported_ = false;
  std::optional<v1::LeaseRunning> first_running_;  // rank 0's, or the first
  bool validation_reported_ = false;
  bool final_stored_ = false;
  bool killed_ = false;
  v1::StopMode stop_ = v1::STOP_MODE_UNSPECIFIED;
  std::optional<v1::LeaseEnded> failure_;
  absl::Time peer_lost_until_ = absl::InfiniteFuture();  // wait so long for the real reason
  absl::Time last_progress_ = absl::InfiniteFuture();
  std::deque<v1::CheckpointWritten> uploads_;
  std::map<std::string, std::string> set_;                 // by trainers of this lease
  std::map<std::string, std::string> known_;               // values that may be answered at once
  std::map<std::string, std::vector<int>> waiting_gets_;   // key -> local ranks
};

}  // namespace attune
