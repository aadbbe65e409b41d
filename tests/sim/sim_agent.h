// A model of the agent and its trainers, as the coordinator sees them: holds leases, keeps what
// it reports until it is acknowledged, starts and kills processes, dies and comes back. Trainers
// of one epoch step together (Gang), so that a dead part stops the rest, as a collective does.
// Deterministic: all chance comes from the generator that is passed in.
#pragma once

#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "attune/v1/worker_service.pb.h"

namespace attune::sim {

using Random = std::mt19937_64;

// True once in `n`.
inline bool OneIn(Random* random, int n) {
  return (*random)() % static_cast<uint64_t>(n) == 0;
}
inline int Below(Random* random, int n) {
  return static_cast<int>((*random)() % static_cast<uint64_t>(n));
}

inline constexpr int64_t kTokensPerStep = 10;

// The processes of one epoch, on all its workers. Physical truth, whatever anybody believes.
struct Gang {
  int32_t world_size = 0;
  int64_t step = 0;
  std::set<std::string> loaded;  // workers whose part is alive and has loaded
  int32_t loaded_ranks = 0;
};

// What agents share: gangs, and the artifacts that are uploaded.
struct Ground {
  std::map<int64_t, Gang> gangs;
  std::set<std::string> artifacts;
};

class SimAgent {
 public:
  SimAgent(std::string name, int devices, Ground* ground)
      : name_(std::move(name)), devices_(devices), ground_(ground) {}

  const std::string& name() const { return name_; }
  int devices() const { return devices_; }
  bool up() const { return up_; }

  v1::Register MakeRegister() const;
  void OnMessage(const v1::CoordinatorMessage& message, absl::Time now, Random* random);
  // Trainers make progress.
  void Advance(absl::Time now, Random* random);
  // Messages for the session, in order.
  std::vector<v1::WorkerMessage> TakeOutgoing();
  // A new session: everything that is not acknowledged goes again.
  void Reconnected();
  // As Reconnected, without the link having broken: duplicates.
  void SendAgain() { Reconnected(); }

  // The agent and its trainers die. `wiped`: it also forgets all that it kept on disk.
  void Crash(bool wiped);
  void Restart();
  // One trainer dies.
  void CrashTrainer(v1::FailureCause cause, Random* random);

  // (device, epoch) of every trainer process that is alive here.
  std::vector<std::pair<std::string, int64_t>> Processes() const;

 private:
  struct Held {
    v1::Lease lease;
    bool alive = false;   // its processes
    bool loaded = false;  // and in the gang
    bool ended = false;   // LeaseEnded is among the reports
    absl::Time busy_until;
    absl::Time peer_missing_since = absl::InfiniteFuture();
    absl::Duration step_time;
    v1::StopMode stop = v1::STOP_MODE_UNSPECIFIED;
    bool asked_peer = false;
    bool found_peer = false;
    int64_t next_sequence = 1;
    std::deque<v1::Report> unacknowledged;
    size_t sent = 0;                                           // of unacknowledged, in this session
    std::vector<std::pair<absl::Time, v1::Report>> uploading;  // checkpoints on their way
  };

  void Report(Held* held, v1::Report report);
  void End(Held* held, v1::LeaseOutcome outcome, v1::FailureCause cause);
  void Kill(Held* held);
  void Load(Held* held, absl::Time now, Random* random);
  void Train(Held* held, absl::Time now, Random* random);
  void Step(Held* held, absl::Time now, Random* random);
  void Validate(Held* held, Random* random);
  void FinishUploads(Held* held, absl::Time now, bool all);
  v1::Report MakeCheckpoint(const Held& held, int64_t step, bool final);

  const std::string name_;
  const int devices_;
  Ground* const ground_;
  bool up_ = true;
  std::map<int64_t, Held> held_;
  std::vector<v1::WorkerMessage> outgoing_;
};

}  // namespace attune::sim
