#include "worker/agent/lease_machine.h"

#include <signal.h>
#include <string.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/agent/log_lines.h"

namespace attune {
namespace {

using Kind = LeaseAction::Kind;

// A rank that lost a peer may be heard before the peer whose fault it is.
// As kernels/core/cuda_error.h has it; the agent knows no CUDA.
constexpr int kCudaFailedExitCode = 17;
constexpr absl::Duration kPeerLostGrace = absl::Seconds(1);
constexpr size_t kMessageLines = 8;
constexpr size_t kMaxMessageBytes = 16384;

void SetTime(absl::Time now, google::protobuf::Timestamp* time) {
  const int64_t nanoseconds = absl::ToUnixNanos(now);
  time->set_seconds(nanoseconds / 1000000000);
  time->set_nanos(static_cast<int32_t>(nanoseconds % 1000000000));
}

// Messages of trainers carry no job; those without a time happened now.
template <typename Item>
void Stamp(const v1::Lease& lease, absl::Time now, Item* item) {
  item->set_job(lease.job());
  item->set_attempt(lease.attempt());
  if (!item->has_time()) SetTime(now, item->mutable_time());
}

}  // namespace

LeaseMachine::LeaseMachine(v1::Lease lease)
    : lease_(std::move(lease)), ranks_(std::max(1, lease_.devices_size())) {}

v1::Report LeaseMachine::NewReport() const {
  v1::Report report;
  report.set_epoch(lease_.epoch());
  return report;
}

// Then nobody else sets keys, and the coordinator need not be asked.
bool LeaseMachine::HoldsAllRanks() const {
  return lease_.first_rank() == 0 && trainers() >= lease_.world_size();
}

void LeaseMachine::Report(v1::Report report, Actions* actions) {
  actions->push_back({.kind = Kind::kReport, .report = std::move(report)});
}

LeaseMachine::Actions LeaseMachine::OnPrepareFailed(v1::FailureCause cause,
                                                    const std::string& message) {
  Actions actions;
  if (phase_ != Phase::kPreparing) return actions;
  for (Rank& rank : ranks_) rank.exited = true;
  phase_ = Phase::kRunning;
  if (lease_.kind() == v1::LEASE_KIND_VALIDATE && cause == v1::FAILURE_CAUSE_INVALID) {
    // That a source is not there is what validation is to find out.
    v1::Report report = NewReport();
    report.mutable_validation()->add_errors(ToUtf8(message, kMaxMessageBytes));
    Report(std::move(report), &actions);
    validation_reported_ = true;
  } else {
    Fail(cause, message, &actions);
  }
  MaybeEnd(&actions);
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnStarted(absl::Time now) {
  Actions actions;
  phase_ = Phase::kRunning;
  last_progress_ = now;
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnMessage(int rank, const v1::TrainerToAgent& message,
                                              absl::Time now) {
  Actions actions;
  if (phase_ != Phase::kRunning) return actions;
  v1::Report report = NewReport();
  const bool first = lease_.first_rank() + rank == 0;
  switch (message.message_case()) {
    case v1::TrainerToAgent::kProgress:
      last_progress_ = now;
      break;
    case v1::TrainerToAgent::kStep:
      last_progress_ = now;
      if (!first) break;
      *report.mutable_step() = message.step();
      Stamp(lease_, now, report.mutable_step());
      Report(std::move(report), &actions);
      break;
    case v1::TrainerToAgent::kLog:
      *report.mutable_log() = message.log();
      Stamp(lease_, now, report.mutable_log());
      report.mutable_log()->set_rank(lease_.first_rank() + rank);
      Report(std::move(report), &actions);
      break;
    case v1::TrainerToAgent::kEvent:
      *report.mutable_event() = message.event();
      Stamp(lease_, now, report.mutable_event());
      Report(std::move(report), &actions);
      break;
    case v1::TrainerToAgent::kCheckpoint:
      last_progress_ = now;
      if (!first || stop_ == v1::STOP_MODE_KILL) break;
      uploads_.push_back(message.checkpoint());
      actions.push_back({.kind = Kind::kUpload, .checkpoint = message.checkpoint()});
      break;
    case v1::TrainerToAgent::kRendezvousSet:
      OnRendezvousSet(message.rendezvous_set(), &actions);
      break;
    case v1::TrainerToAgent::kRendezvousGet:
      OnRendezvousGet(rank, message.rendezvous_get(), &actions);
      break;
    case v1::TrainerToAgent::kValidation:
      last_progress_ = now;
      validation_reported_ = true;
      *report.mutable_validation() = message.validation();
      Report(std::move(report), &actions);
      break;
    case v1::TrainerToAgent::kFailure:
      ranks_[rank].failure = message.failure();
      break;
    case v1::TrainerToAgent::kRunning:
      last_progress_ = now;
      OnRunning(rank, message.running(), &actions);
      break;
    case v1::TrainerToAgent::MESSAGE_NOT_SET:
      break;
  }
  return actions;
}

void LeaseMachine::OnRunning(int rank, const v1::LeaseRunning& running, Actions* actions) {
  ranks_[rank].loaded = true;
  if (rank == 0 || !first_running_.has_value()) first_running_ = running;
  const bool all =
      std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.loaded; });
  if (!all || running_reported_) return;
  running_reported_ = true;
  v1::Report report = NewReport();
  *report.mutable_running() = *first_running_;
  Report(std::move(report), actions);
}

LeaseMachine::Actions LeaseMachine::OnLine(int rank, bool is_stderr, const std::string& line,
                                           absl::Time now) {
  Actions actions;
  if (phase_ != Phase::kRunning) return actions;
  v1::Report report = NewReport();
  v1::LogLine* log = report.mutable_log();
  Stamp(lease_, now, log);
  log->set_rank(rank < 0 ? -1 : lease_.first_rank() + rank);
  log->set_level(is_stderr ? v1::LOG_LEVEL_WARNING : v1::LOG_LEVEL_INFO);
  log->set_text(line);
  Report(std::move(report), &actions);
  return actions;
}

void LeaseMachine::OnRendezvousSet(v1::RendezvousSet set, Actions* actions) {
  set.set_epoch(lease_.epoch());
  if (!set_.emplace(set.key(), set.value()).second) return;
  if (HoldsAllRanks()) {
    known_[set.key()] = set.value();
    AnswerGets(set.key(), actions);
  }
  actions->push_back({.kind = Kind::kRendezvousSet, .rendezvous_set = std::move(set)});
}

void LeaseMachine::OnRendezvousGet(int rank, v1::RendezvousGet get, Actions* actions) {
  const bool asked = waiting_gets_.count(get.key()) > 0;
  waiting_gets_[get.key()].push_back(rank);
  if (known_.count(get.key()) > 0) {
    AnswerGets(get.key(), actions);
    return;
  }
  if (asked || HoldsAllRanks()) return;
  get.set_epoch(lease_.epoch());
  actions->push_back({.kind = Kind::kRendezvousGet, .rendezvous_get = std::move(get)});
}

void LeaseMachine::AnswerGets(const std::string& key, Actions* actions) {
  const auto waiting = waiting_gets_.find(key);
  if (waiting == waiting_gets_.end()) return;
  for (const int rank : waiting->second) {
    if (ranks_[rank].exited) continue;
    LeaseAction action = {.kind = Kind::kSendToRank, .rank = rank};
    v1::RendezvousValue* value = action.to_trainer.mutable_rendezvous_value();
    value->set_epoch(lease_.epoch());
    value->set_key(key);
    value->set_value(known_[key]);
    actions->push_back(std::move(action));
  }
  waiting_gets_.erase(waiting);
}

LeaseMachine::Actions LeaseMachine::OnRendezvousValue(const v1::RendezvousValue& value) {
  Actions actions;
  if (phase_ != Phase::kRunning) return actions;
  known_.emplace(value.key(), value.value());
  AnswerGets(value.key(), &actions);
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnReconnected() {
  Actions actions;
  if (phase_ != Phase::kRunning || HoldsAllRanks()) return actions;
  for (const auto& [key, value] : set_) {
    LeaseAction action = {.kind = Kind::kRendezvousSet};
    action.rendezvous_set.set_epoch(lease_.epoch());
    action.rendezvous_set.set_key(key);
    action.rendezvous_set.set_value(value);
    actions.push_back(std::move(action));
  }
  for (const auto& [key, ranks] : waiting_gets_) {
    LeaseAction action = {.kind = Kind::kRendezvousGet};
    action.rendezvous_get.set_epoch(lease_.epoch());
    action.rendezvous_get.set_key(key);
    actions.push_back(std::move(action));
  }
  return actions;
}

std::string LeaseMachine::DescribeExit(int rank, const TrainerExit& exit) const {
  std::string text =
      exit.signaled
          ? absl::StrCat("rank ", lease_.first_rank() + rank, " was killed by signal ", exit.code,
                         " (", strsignal(exit.code), ")")
          : absl::StrCat("rank ", lease_.first_rank() + rank, " ended with exit code ", exit.code);
  if (ranks_[rank].failure.has_value()) {
    return absl::StrCat(text, ": ", ranks_[rank].failure->message());
  }
  if (exit.last_lines.empty()) return absl::StrCat(text, " and printed nothing");
  const size_t from =
      exit.last_lines.size() > kMessageLines ? exit.last_lines.size() - kMessageLines : 0;
  return absl::StrCat(text, "; its last lines:\n",
                      absl::StrJoin(exit.last_lines.begin() + from, exit.last_lines.end(), "\n"));
}

LeaseMachine::Actions LeaseMachine::OnExit(int rank, const TrainerExit& exit, absl::Time now) {
  Actions actions;
  Rank& r = ranks_[rank];
  if (r.exited || phase_ == Phase::kEnded) return actions;
  r.exited = true;
  last_progress_ = std::max(last_progress_, now);
  const bool failed = exit.signaled || exit.code != 0 || r.failure.has_value();
  // Whoever was killed by us, is no reason for anything.
  const bool by_us = killed_ && exit.signaled && exit.code == SIGKILL && !r.failure.has_value();
  if (failed && !by_us) {
    v1::FailureCause cause = v1::FAILURE_CAUSE_TRAINER_CRASH;
    if (r.failure.has_value() && r.failure->cause() != v1::FAILURE_CAUSE_UNSPECIFIED) {
      cause = r.failure->cause();
    } else if (!exit.signaled && exit.code == kCudaFailedExitCode) {
      cause = v1::FAILURE_CAUSE_DEVICE;
    }
    const bool first = !failure_.has_value();
    Fail(cause, DescribeExit(rank, exit), &actions);
    if (first && cause == v1::FAILURE_CAUSE_PEER_LOST) peer_lost_until_ = now + kPeerLostGrace;
  }
  MaybeEnd(&actions);
  return actions;
}

void LeaseMachine::Fail(v1::FailureCause cause, const std::string& message, Actions* actions) {
  const bool replaces =
      !failure_.has_value() ||
      (failure_->cause() == v1::FAILURE_CAUSE_PEER_LOST && cause != v1::FAILURE_CAUSE_PEER_LOST);
  if (replaces) {
    failure_.emplace();
    failure_->set_cause(cause);
    failure_->set_message(message);
  }
  if (failure_->cause() != v1::FAILURE_CAUSE_PEER_LOST) Kill(actions);
}

void LeaseMachine::Kill(Actions* actions) {
  if (killed_) return;
  killed_ = true;
  actions->push_back({.kind = Kind::kKill});
}

LeaseMachine::Actions LeaseMachine::OnStop(v1::StopMode mode) {
  Actions actions;
  if (phase_ == Phase::kEnded || stop_ == v1::STOP_MODE_KILL) return actions;
  const bool again = stop_ == mode;
  stop_ = mode;
  if (phase_ == Phase::kPreparing) {
    for (Rank& rank : ranks_) rank.exited = true;
    phase_ = Phase::kRunning;
    actions.push_back({.kind = Kind::kAbandonUploads});
    MaybeEnd(&actions);
    return actions;
  }
  if (mode == v1::STOP_MODE_KILL) {
    uploads_.clear();
    actions.push_back({.kind = Kind::kAbandonUploads});
    Kill(&actions);
    MaybeEnd(&actions);
  } else if (!again) {
    for (int rank = 0; rank < trainers(); ++rank) {
      if (ranks_[rank].exited) continue;
      LeaseAction action = {.kind = Kind::kSendToRank, .rank = rank};
      action.to_trainer.mutable_stop()->set_epoch(lease_.epoch());
      action.to_trainer.mutable_stop()->set_mode(mode);
      actions.push_back(std::move(action));
    }
  }
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnStored(const std::string& artifact, int64_t bytes) {
  Actions actions;
  if (phase_ != Phase::kRunning || uploads_.empty()) return actions;
  const v1::CheckpointWritten written = uploads_.front();
  uploads_.pop_front();
  v1::Report report = NewReport();
  v1::CheckpointStored* stored = report.mutable_checkpoint();
  stored->set_step(written.step());
  stored->set_artifact(artifact);
  stored->set_bytes(bytes);
  stored->set_loss(written.loss());
  stored->set_evaluation_loss(written.evaluation_loss());
  stored->set_final(written.final());
  stored->set_best(written.best());
  final_stored_ = final_stored_ || written.final();
  Report(std::move(report), &actions);
  if (!ranks_[0].exited) {
    LeaseAction action = {.kind = Kind::kSendToRank, .rank = 0};
    action.to_trainer.mutable_checkpoint_release()->set_step(written.step());
    actions.push_back(std::move(action));
  }
  MaybeEnd(&actions);
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnStoreFailed(const absl::Status& status) {
  Actions actions;
  if (phase_ != Phase::kRunning || uploads_.empty()) return actions;
  const int64_t step = uploads_.front().step();
  uploads_.pop_front();
  Fail(v1::FAILURE_CAUSE_STORAGE,
       absl::StrCat("the checkpoint of step ", step, " could not be stored: ", status.message()),
       &actions);
  MaybeEnd(&actions);
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnAgentFailure(v1::FailureCause cause,
                                                   const std::string& message) {
  Actions actions;
  if (phase_ == Phase::kEnded) return actions;
  if (phase_ == Phase::kPreparing) {
    for (Rank& rank : ranks_) rank.exited = true;
    phase_ = Phase::kRunning;
  }
  uploads_.clear();
  actions.push_back({.kind = Kind::kAbandonUploads});
  Fail(cause, message, &actions);
  MaybeEnd(&actions);
  return actions;
}

LeaseMachine::Actions LeaseMachine::OnTick(absl::Time now) {
  Actions actions;
  if (phase_ != Phase::kRunning || killed_) return actions;
  if (now >= peer_lost_until_) {
    Kill(&actions);
    return actions;
  }
  const bool alive =
      std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return !rank.exited; });
  const double limit_s = lease_.spec().retry().stall_timeout_s();
  if (!alive || limit_s <= 0 || now - last_progress_ <= absl::Seconds(limit_s)) return actions;
  Fail(v1::FAILURE_CAUSE_STALLED,
       absl::StrCat("no step and no other progress for ", limit_s,
                    " s (retry.stall_timeout_s); the trainers were killed"),
       &actions);
  return actions;
}

void LeaseMachine::MaybeEnd(Actions* actions) {
  const bool all_exited =
      std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.exited; });
  if (phase_ != Phase::kRunning || !all_exited || !uploads_.empty()) return;
  const auto none = v1::FAILURE_CAUSE_UNSPECIFIED;
  if (stop_ == v1::STOP_MODE_KILL) {
    End(v1::LEASE_OUTCOME_STOPPED, none, "", actions);
  } else if (failure_.has_value()) {
    End(v1::LEASE_OUTCOME_FAILED, failure_->cause(), failure_->message(), actions);
  } else if (lease_.kind() == v1::LEASE_KIND_VALIDATE ? validation_reported_ : final_stored_) {
    End(v1::LEASE_OUTCOME_COMPLETED, none, "", actions);
  } else if (stop_ == v1::STOP_MODE_CHECKPOINT) {
    End(v1::LEASE_OUTCOME_STOPPED, none, "", actions);
  } else if (lease_.kind() != v1::LEASE_KIND_VALIDATE && lease_.first_rank() > 0) {
    // Rank 0 is elsewhere: whether training is complete is said there.
    End(v1::LEASE_OUTCOME_COMPLETED, none, "", actions);
  } else {
    End(v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH,
        lease_.kind() == v1::LEASE_KIND_VALIDATE
            ? "the trainer ended without a validation report"
            : "the trainers ended with exit code 0 before training was complete",
        actions);
  }
}

void LeaseMachine::End(v1::LeaseOutcome outcome, v1::FailureCause cause, const std::string& message,
                       Actions* actions) {
  phase_ = Phase::kEnded;
  v1::Report report = NewReport();
  report.mutable_ended()->set_outcome(outcome);
  report.mutable_ended()->set_cause(cause);
  report.mutable_ended()->set_message(ToUtf8(message, kMaxMessageBytes));
  Report(std::move(report), actions);
}

}  // namespace attune
