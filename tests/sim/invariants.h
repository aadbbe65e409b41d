// What must hold after every committed batch, whatever happened before it.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "server/core/coordinator.h"
#include "tests/sim/sim_agent.h"

namespace attune::sim {

class Invariants {
 public:
  // Looks at what was just made durable. "" if all holds, else what is broken.
  std::string AfterCommit(const std::vector<Effect>& effects);
  // Looks at the state of a coordinator that has nothing uncommitted.
  std::string OfState(const Coordinator& coordinator);
  // No two trainers on one device.
  std::string OfProcesses(const std::vector<SimAgent>& agents) const;

  // A client was told that this job exists.
  void Acknowledged(const std::string& job) { acknowledged_.insert(job); }
  // A client asked for its deletion: it may be gone from now on.
  void MayBeDeleted(const std::string& job) { acknowledged_.erase(job); }
  // An artifact was removed.
  std::string Removed(const std::string& artifact) const;

 private:
  struct JobTruth {
    v1::JobState state = v1::JOB_STATE_UNSPECIFIED;
    int64_t epoch = 0;  // of the newest attempt
    int32_t attempt = 0;
    int64_t from_step = 0;
    int64_t last_step = 0;  // reported in this attempt
    int64_t tokens = 0;
    std::map<int64_t, std::string> checkpoints;  // step -> artifact
    std::map<int64_t, int64_t> tokens_at;        // step -> tokens trained until then
  };

  std::string On(const PutJob& effect);
  std::string On(const PutLease& effect);
  std::string On(const AppendEvent& effect);
  std::string On(const AppendMetrics& effect);
  std::string On(const AppendLog& effect);
  std::string On(const PutCheckpoint& effect);
  std::string On(const DeleteCheckpoint& effect);
  std::string On(const DeleteJob& effect);
  template <typename Other>
  std::string On(const Other& effect) {
    return "";
  }
  std::string NextRevision(int64_t revision);

  int64_t revision_ = 0;
  int64_t newest_epoch_ = 0;
  std::map<int64_t, std::map<std::string, LeaseRecord>> begun_;  // in this commit
  std::map<std::string, JobTruth> jobs_;
  std::set<std::string> acknowledged_;
};

}  // namespace attune::sim
