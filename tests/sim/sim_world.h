// The world around one coordinator under virtual time: its store, the network, agents, clients,
// and faults drawn from a seed. Everything is deterministic, so a seed replays a run.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/core/coordinator.h"
#include "server/store/store.h"
#include "tests/sim/invariants.h"
#include "tests/sim/sim_agent.h"

namespace attune::sim {

// What a run did, to see that the faults really happened.
struct Tally {
  int64_t commits = 0;
  int64_t coordinator_crashes = 0;
  int64_t agent_crashes = 0;
  int64_t sessions_lost = 0;
  int64_t attempts = 0;
  std::map<v1::JobState, int64_t> ended;
};

class World {
 public:
  World(uint64_t seed, bool trace);

  // Runs with faults, then without until every job ended. "" if every invariant held, else what
  // broke and when.
  std::string Run();
  const Tally& tally() const { return tally_; }

 private:
  struct Link {             // an agent's connection
    SessionId session = 0;  // 0: none
    absl::Time dial_at;
    absl::Time down_until;  // of the agent
    std::deque<std::pair<absl::Time, v1::CoordinatorMessage>> to_agent;
  };
  struct Client {  // wants one job
    std::string request_id;
    v1::JobSpec spec;
    std::string job;  // once acknowledged
    absl::Time next_try;
    bool deleted = false;
  };
  struct Call {
    std::function<void(const absl::Status&, const v1::Job&)> answer;
    absl::Time deadline = absl::InfiniteFuture();
  };

  std::string RunPhase(absl::Duration length, bool faults);
  std::string Turn(bool faults);
  void StartCoordinator();
  void CrashCoordinator();
  void MakeFaults();
  void FaultAgent(size_t i);
  void MakeRequests(bool faults);
  void ActOnJob(const std::string& job);
  void Resume(const std::string& job);
  void TryCreate(Client* client);
  void MoveMessages();
  void Dial(size_t i);
  void DropSession(size_t i);
  std::string RunBatch(bool faults);
  std::string Commit(const std::vector<Effect>& effects);
  std::string Perform(const std::vector<Action>& actions);
  void Trace(const std::string& text);
  std::string Broken(const std::string& what) const;
  bool AllEnded();
  template <typename Event>
  void Post(Event event, std::function<void(const absl::Status&, const v1::Job&)> answer);
  absl::Duration Delay();

  const uint64_t seed_;
  const bool trace_;
  Random random_;
  absl::Time now_;
  Ground ground_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Coordinator> coordinator_;  // null: it is down
  absl::Time up_at_;
  absl::Time stopped_until_;  // the coordinator's process stands still, as under SIGSTOP
  std::multimap<absl::Time, CoordinatorEvent> inbox_;
  std::vector<SimAgent> agents_;
  std::vector<Link> links_;
  std::vector<Client> clients_;
  std::map<CallId, Call> calls_;
  std::string failure_;  // found by an answer to a call
  CallId next_call_ = 1;
  SessionId next_session_ = 1;
  int64_t next_job_ = 1;
  Invariants invariants_;
  Tally tally_;
};

}  // namespace attune::sim
