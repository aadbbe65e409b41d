#include "tests/sim/sim_agent.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace attune::sim {
namespace {

bool Trains(const v1::Lease& lease) {
  return lease.kind() == v1::LEASE_KIND_TRAIN;
}

int64_t TotalSteps(const v1::Lease& lease) {
  return lease.spec().schedule().steps();
}

}  // namespace

v1::Register SimAgent::MakeRegister() const {
  v1::Register message;
  message.set_worker(name_);
  for (int i = 0; i < devices_; ++i) {
    v1::Device* device = message.add_devices();
    device->set_id(absl::StrCat("cpu:", i));
    device->set_type(v1::DEVICE_TYPE_CPU);
  }
  for (const auto& [epoch, held] : held_) {
    v1::HeldLease* lease = message.add_held();
    lease->set_epoch(epoch);
    lease->set_job(held.lease.job());
    *lease->mutable_devices() = held.lease.devices();
  }
  return message;
}

void SimAgent::Report(Held* held, v1::Report report) {
  report.set_epoch(held->lease.epoch());
  report.set_sequence(held->next_sequence++);
  held->unacknowledged.push_back(std::move(report));
}

void SimAgent::Kill(Held* held) {
  if (held->loaded) {
    Gang& gang = ground_->gangs[held->lease.epoch()];
    gang.loaded.erase(name_);
    gang.loaded_ranks -= held->lease.devices_size();
  }
  held->alive = false;
  held->loaded = false;
  held->uploading.clear();
}

void SimAgent::End(Held* held, v1::LeaseOutcome outcome, v1::FailureCause cause) {
  if (held->ended) return;
  Kill(held);
  v1::Report report;
  report.mutable_ended()->set_outcome(outcome);
  report.mutable_ended()->set_cause(cause);
  report.mutable_ended()->set_message("simulated");
  held->ended = true;
  Report(held, std::move(report));
}

void SimAgent::OnMessage(const v1::CoordinatorMessage& message, absl::Time now, Random* random) {
  if (message.has_lease()) {
    if (held_.count(message.lease().epoch()) != 0) return;
    Held& held = held_[message.lease().epoch()];
    held.lease = message.lease();
    held.alive = true;
    held.busy_until = now + absl::Milliseconds(100 + Below(random, 1500));
    held.step_time = absl::Milliseconds(OneIn(random, 6) ? 1500 : 100 + Below(random, 400));
    return;
  }
  if (message.has_registered()) {
    for (int64_t epoch : message.registered().release()) {
      const auto it = held_.find(epoch);
      if (it != held_.end()) it->second.stop = v1::STOP_MODE_KILL;
    }
    return;
  }
  if (message.has_stale()) {
    const auto it = held_.find(message.stale().epoch());
    if (it == held_.end()) return;
    Kill(&it->second);
    held_.erase(it);
    return;
  }
  if (message.has_stop()) {
    const auto it = held_.find(message.stop().epoch());
    if (it != held_.end()) it->second.stop = message.stop().mode();
    return;
  }
  if (message.has_rendezvous_value()) {
    const auto it = held_.find(message.rendezvous_value().epoch());
    if (it != held_.end()) it->second.found_peer = true;
    return;
  }
  if (message.has_report_ack()) {
    const auto it = held_.find(message.report_ack().epoch());
    if (it == held_.end()) return;
    Held& held = it->second;
    while (!held.unacknowledged.empty() &&
           held.unacknowledged.front().sequence() <= message.report_ack().sequence()) {
      held.unacknowledged.pop_front();
      if (held.sent > 0) --held.sent;
    }
    if (held.ended && held.unacknowledged.empty()) held_.erase(it);
  }
}

void SimAgent::Advance(absl::Time now, Random* random) {
  if (!up_) return;
  for (auto& [epoch, held] : held_) {
    if (held.ended) continue;
    FinishUploads(&held, now, /*all=*/false);
    if (held.stop == v1::STOP_MODE_KILL) {
      End(&held, v1::LEASE_OUTCOME_STOPPED, v1::FAILURE_CAUSE_UNSPECIFIED);
    } else if (now < held.busy_until) {
      continue;
    } else if (!Trains(held.lease)) {
      Validate(&held, random);
    } else if (!held.loaded) {
      Load(&held, now, random);
    } else {
      Train(&held, now, random);
    }
  }
}

void SimAgent::Validate(Held* held, Random* random) {
  if (OneIn(random, 20)) {
    End(held, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
    return;
  }
  v1::Report report;
  if (held->lease.spec().model().source().path() == "broken") {
    report.mutable_validation()->add_errors("model.source: no such directory");
  } else {
    report.mutable_validation()->set_model_digest(std::string(64, 'd'));
    report.mutable_validation()->set_precision(v1::PRECISION_F32);
    report.mutable_validation()->set_total_steps(TotalSteps(held->lease));
  }
  Report(held, std::move(report));
  End(held, v1::LEASE_OUTCOME_COMPLETED, v1::FAILURE_CAUSE_UNSPECIFIED);
}

// Parts of a gang meet through the coordinator's rendezvous, as the real ones do.
void SimAgent::Load(Held* held, absl::Time now, Random* random) {
  const v1::Lease& lease = held->lease;
  if (lease.devices_size() < lease.world_size() && !held->found_peer) {
    if (held->asked_peer) return;
    held->asked_peer = true;
    v1::WorkerMessage message;
    if (lease.first_rank() == 0) {
      message.mutable_rendezvous_set()->set_epoch(lease.epoch());
      message.mutable_rendezvous_set()->set_key("address");
      message.mutable_rendezvous_set()->set_value(name_);
      outgoing_.push_back(message);
    }
    message.Clear();
    message.mutable_rendezvous_get()->set_epoch(lease.epoch());
    message.mutable_rendezvous_get()->set_key("address");
    outgoing_.push_back(message);
    return;
  }
  Gang& gang = ground_->gangs[lease.epoch()];
  gang.world_size = lease.world_size();
  gang.step = lease.checkpoint_step();
  gang.loaded.insert(name_);
  gang.loaded_ranks += lease.devices_size();
  held->loaded = true;
  held->busy_until = now + held->step_time;
  v1::Report report;
  report.mutable_running()->set_from_step(lease.checkpoint_step());
  report.mutable_running()->set_total_steps(TotalSteps(lease));
  Report(held, std::move(report));
}

void SimAgent::Train(Held* held, absl::Time now, Random* random) {
  const v1::Lease& lease = held->lease;
  Gang& gang = ground_->gangs[lease.epoch()];
  const bool done = gang.step >= TotalSteps(lease);
  if (lease.first_rank() != 0 && done) {
    End(held, v1::LEASE_OUTCOME_COMPLETED, v1::FAILURE_CAUSE_UNSPECIFIED);
    return;
  }
  if (lease.first_rank() != 0 && held->stop == v1::STOP_MODE_CHECKPOINT) {
    End(held, v1::LEASE_OUTCOME_STOPPED, v1::FAILURE_CAUSE_UNSPECIFIED);
    return;
  }
  if (lease.first_rank() == 0 && held->stop == v1::STOP_MODE_CHECKPOINT) {
    FinishUploads(held, now, /*all=*/true);
    if (gang.step > lease.checkpoint_step()) {
      Report(held, MakeCheckpoint(*held, gang.step, done));
    }
    End(held, v1::LEASE_OUTCOME_STOPPED, v1::FAILURE_CAUSE_UNSPECIFIED);
    return;
  }
  if (gang.loaded_ranks < gang.world_size) {  // the collective hangs, then breaks
    if (held->peer_missing_since == absl::InfiniteFuture()) held->peer_missing_since = now;
    if (now - held->peer_missing_since > absl::Seconds(20)) {
      End(held, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_PEER_LOST);
    }
    return;
  }
  held->peer_missing_since = absl::InfiniteFuture();
  if (lease.first_rank() == 0) Step(held, now, random);
}

void SimAgent::Step(Held* held, absl::Time now, Random* random) {
  const v1::Lease& lease = held->lease;
  Gang& gang = ground_->gangs[lease.epoch()];
  held->busy_until = now + held->step_time;
  if (gang.step < TotalSteps(lease)) {
    ++gang.step;
    v1::Report report;
    report.mutable_step()->set_step(gang.step);
    report.mutable_step()->set_total_steps(TotalSteps(lease));
    report.mutable_step()->set_trained_tokens(kTokensPerStep);
    report.mutable_step()->set_tokens_per_s(10);
    report.mutable_step()->set_step_s(1);
    Report(held, std::move(report));
    report.Clear();
    report.mutable_log()->set_text(absl::StrCat("step ", gang.step));
    Report(held, std::move(report));
  }
  const bool final = gang.step >= TotalSteps(lease);
  if (final) {
    FinishUploads(held, now, /*all=*/true);
    Report(held, MakeCheckpoint(*held, gang.step, true));
    End(held, v1::LEASE_OUTCOME_COMPLETED, v1::FAILURE_CAUSE_UNSPECIFIED);
  } else if (gang.step % lease.spec().checkpoints().every_steps() == 0) {
    held->uploading.emplace_back(now + absl::Milliseconds(Below(random, 1500)),
                                 MakeCheckpoint(*held, gang.step, false));
  }
}

// Reports checkpoints whose upload has ended, in order.
void SimAgent::FinishUploads(Held* held, absl::Time now, bool all) {
  while (!held->uploading.empty() && (all || held->uploading.front().first <= now)) {
    Report(held, held->uploading.front().second);
    held->uploading.erase(held->uploading.begin());
  }
}

// The epoch in the artifact's name lets the invariants see who wrote it.
v1::Report SimAgent::MakeCheckpoint(const Held& held, int64_t step, bool final) {
  v1::Report report;
  v1::CheckpointStored* stored = report.mutable_checkpoint();
  stored->set_step(step);
  stored->set_artifact(
      absl::StrCat("artifacts/", held.lease.job(), "/", held.lease.epoch(), "/", step));
  stored->set_bytes(1000);
  stored->set_final(final);
  ground_->artifacts.insert(stored->artifact());
  return report;
}

std::vector<v1::WorkerMessage> SimAgent::TakeOutgoing() {
  std::vector<v1::WorkerMessage> messages = std::move(outgoing_);
  outgoing_.clear();
  for (auto& [epoch, held] : held_) {
    for (; held.sent < held.unacknowledged.size(); ++held.sent) {
      v1::WorkerMessage message;
      *message.mutable_report() = held.unacknowledged[held.sent];
      messages.push_back(std::move(message));
    }
  }
  return messages;
}

void SimAgent::Reconnected() {
  outgoing_.clear();
  for (auto& [epoch, held] : held_) {
    held.sent = 0;
    held.asked_peer = false;
  }
}

void SimAgent::Crash(bool wiped) {
  up_ = false;
  outgoing_.clear();
  for (auto& [epoch, held] : held_) Kill(&held);
  if (wiped) held_.clear();
}

void SimAgent::Restart() {
  up_ = true;
  // What it finds on its disk: leases whose processes died with it.
  for (auto& [epoch, held] : held_) {
    End(&held, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_WORKER_LOST);
  }
}

void SimAgent::CrashTrainer(v1::FailureCause cause, Random* random) {
  if (held_.empty()) return;
  auto it = held_.begin();
  std::advance(it, Below(random, static_cast<int>(held_.size())));
  if (it->second.alive) End(&it->second, v1::LEASE_OUTCOME_FAILED, cause);
}

std::vector<std::pair<std::string, int64_t>> SimAgent::Processes() const {
  std::vector<std::pair<std::string, int64_t>> processes;
  for (const auto& [epoch, held] : held_) {
    if (!held.alive || !Trains(held.lease)) continue;
    for (const std::string& device : held.lease.devices()) processes.emplace_back(device, epoch);
  }
  return processes;
}

}  // namespace attune::sim
