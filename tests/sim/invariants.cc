#include "tests/sim/invariants.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/core/job_state.h"

namespace attune::sim {

std::string Invariants::NextRevision(int64_t revision) {
  if (revision <= revision_) {
    return absl::StrCat("revision ", revision, " comes after ", revision_);
  }
  revision_ = revision;
  return "";
}

std::string Invariants::AfterCommit(const std::vector<Effect>& effects) {
  for (const Effect& effect : effects) {
    const std::string broken = std::visit([this](const auto& e) { return On(e); }, effect);
    if (!broken.empty()) return broken;
  }
  // What begins in one transaction begins whole: leases for all its devices, or none.
  for (const auto& [epoch, parts] : begun_) {
    size_t devices = 0;
    for (const auto& [worker, lease] : parts) devices += lease.devices.size();
    const auto world = static_cast<size_t>(parts.begin()->second.world_size);
    if (devices != world) {
      return absl::StrCat("epoch ", epoch, " begins with ", devices, " of ", world, " devices");
    }
  }
  begun_.clear();
  return "";
}

std::string Invariants::On(const PutLease& effect) {
  const LeaseRecord& lease = effect.record;
  if (lease.kind != v1::LEASE_KIND_TRAIN) return "";
  if (lease.epoch > newest_epoch_ || begun_.count(lease.epoch) != 0) {
    newest_epoch_ = std::max(newest_epoch_, lease.epoch);
    begun_[lease.epoch][lease.worker] = lease;
  }
  return "";
}

std::string Invariants::On(const PutJob& effect) {
  const v1::Job& job = effect.record.job;
  JobTruth& truth = jobs_[job.name()];
  if (job.restarts() > job.spec().retry().max_restarts()) {
    return absl::StrCat(job.name(), " used ", job.restarts(), " restarts");
  }
  if (job.state() != truth.state) {
    return absl::StrCat(job.name(), " is ", StateLabel(job.state()), " but its last event says ",
                        StateLabel(truth.state));
  }
  if (job.attempts_size() > 0) {
    const int64_t epoch = job.attempts().rbegin()->epoch();
    if (epoch < truth.epoch) return absl::StrCat(job.name(), ": the epoch fell");
    truth.epoch = epoch;
  }
  if (job.state() == v1::JOB_STATE_SUCCEEDED) {
    const int64_t total = job.spec().schedule().steps();
    if (job.progress().step() != total ||
        job.progress().trained_tokens() != total * kTokensPerStep) {
      return absl::StrCat(job.name(), " succeeded at step ", job.progress().step(), " of ", total,
                          " with ", job.progress().trained_tokens(), " tokens");
    }
    if (job.final_checkpoint().empty() && truth.checkpoints.count(total) != 0) {
      return absl::StrCat(job.name(), " succeeded without a result");
    }
  }
  return "";
}

std::string Invariants::On(const AppendEvent& effect) {
  const v1::Event& event = effect.event;
  if (std::string broken = NextRevision(event.revision()); !broken.empty()) return broken;
  if (event.kind() != v1::EVENT_KIND_STATE) return "";
  JobTruth& truth = jobs_[event.job()];
  const bool created =
      truth.state == v1::JOB_STATE_UNSPECIFIED && event.state() == v1::JOB_STATE_VALIDATING;
  if (!created && !IsLegalTransition(truth.state, event.state())) {
    return absl::StrCat(event.job(), " went from ", StateLabel(truth.state), " to ",
                        StateLabel(event.state()));
  }
  truth.state = event.state();
  if (event.state() == v1::JOB_STATE_STARTING) {
    truth.attempt = event.attempt();
    truth.from_step = truth.checkpoints.empty() ? 0 : truth.checkpoints.rbegin()->first;
    truth.last_step = truth.from_step;
    truth.tokens = truth.from_step == 0 ? 0 : truth.tokens_at[truth.from_step];
  }
  return "";
}

// Steps of an attempt follow each other: nothing is lost, nothing comes twice.
std::string Invariants::On(const AppendMetrics& effect) {
  const v1::StepMetrics& metrics = effect.metrics;
  if (std::string broken = NextRevision(metrics.revision()); !broken.empty()) return broken;
  JobTruth& truth = jobs_[metrics.job()];
  if (metrics.attempt() != truth.attempt || metrics.step() != truth.last_step + 1) {
    return absl::StrCat(metrics.job(), ": step ", metrics.step(), " of attempt ", metrics.attempt(),
                        " after step ", truth.last_step, " of attempt ", truth.attempt);
  }
  truth.last_step = metrics.step();
  truth.tokens += metrics.trained_tokens();
  truth.tokens_at[metrics.step()] = truth.tokens;
  if (effect.cumulative_tokens != truth.tokens) {
    return absl::StrCat(metrics.job(), ": ", effect.cumulative_tokens, " tokens after step ",
                        metrics.step(), ", not ", truth.tokens);
  }
  return "";
}

std::string Invariants::On(const AppendLog& effect) {
  return NextRevision(effect.line.revision());
}

// The artifact's name says which epoch wrote it: artifacts/{job}/{epoch}/{step}.
std::string Invariants::On(const PutCheckpoint& effect) {
  const v1::Checkpoint& checkpoint = effect.record.checkpoint;
  JobTruth& truth = jobs_[effect.record.job];
  if (truth.checkpoints.count(checkpoint.step()) != 0) {
    return absl::StrCat(checkpoint.name(), " was committed twice");
  }
  if (IsFinal(truth.state)) return absl::StrCat(checkpoint.name(), " was committed after the end");
  if (checkpoint.attempt() != truth.attempt) {
    return absl::StrCat(checkpoint.name(), " was committed by an old attempt");
  }
  const std::string want =
      absl::StrCat("artifacts/", effect.record.job, "/", truth.epoch, "/", checkpoint.step());
  if (checkpoint.artifact() != want) {
    return absl::StrCat(checkpoint.name(), " holds ", checkpoint.artifact(), ", not ", want);
  }
  if (effect.record.trained_tokens != truth.tokens_at[checkpoint.step()]) {
    return absl::StrCat(checkpoint.name(), " says ", effect.record.trained_tokens, " tokens, not ",
                        truth.tokens_at[checkpoint.step()]);
  }
  truth.checkpoints[checkpoint.step()] = checkpoint.artifact();
  return "";
}

std::string Invariants::On(const DeleteCheckpoint& effect) {
  jobs_[effect.job].checkpoints.erase(effect.step);
  return "";
}

std::string Invariants::On(const DeleteJob& effect) {
  if (!IsFinal(jobs_[effect.job].state))
    return absl::StrCat(effect.job, " vanished before its end");
  jobs_.erase(effect.job);
  return "";
}

std::string Invariants::Removed(const std::string& artifact) const {
  for (const auto& [job, truth] : jobs_) {
    for (const auto& [step, held] : truth.checkpoints) {
      if (held == artifact) return absl::StrCat("the checkpoint ", artifact, " was removed");
    }
  }
  return "";
}

std::string Invariants::OfState(const Coordinator& coordinator) {
  std::set<std::pair<std::string, std::string>> leased;
  for (const LeaseRecord& lease : coordinator.LiveLeases()) {
    for (const std::string& device : lease.devices) {
      if (!leased.insert({lease.worker, device}).second) {
        return absl::StrCat(lease.worker, "/", device, " is leased twice");
      }
    }
  }
  for (const std::string& job : acknowledged_) {
    if (!coordinator.GetJob(job).ok()) return absl::StrCat(job, " was acknowledged and is lost");
  }
  for (const v1::Job& listed : coordinator.ListJobs({}, 0, 10000).jobs) {
    const v1::Job job = *coordinator.GetJob(listed.name());
    if (!IsFinal(job.state()) && job.reason().empty()) {
      return absl::StrCat(job.name(), " is ", StateLabel(job.state()), " without a reason");
    }
    const int64_t holds = job.devices_size();
    const int64_t wants = HoldsDevices(job.state()) ? job.spec().resources().devices() : 0;
    if (holds != wants) {
      return absl::StrCat(job.name(), " is ", StateLabel(job.state()), " and holds ", holds,
                          " devices, not ", wants);
    }
    const JobTruth& truth = jobs_[job.name()];
    if (job.state() != truth.state) {
      return absl::StrCat(job.name(), " is ", StateLabel(job.state()), ", last event says ",
                          StateLabel(truth.state));
    }
  }
  return "";
}

std::string Invariants::OfProcesses(const std::vector<SimAgent>& agents) const {
  for (const SimAgent& agent : agents) {
    std::map<std::string, int64_t> owner;
    for (const auto& [device, epoch] : agent.Processes()) {
      const auto [it, is_new] = owner.emplace(device, epoch);
      if (!is_new) {
        return absl::StrCat(agent.name(), "/", device, " runs trainers of epochs ", it->second,
                            " and ", epoch);
      }
    }
  }
  return "";
}

}  // namespace attune::sim
