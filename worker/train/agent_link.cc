#include "worker/train/agent_link.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "worker/train/exit_code.h"

namespace attune {

AgentLink::AgentLink(int fd) : channel_(fd), receiver_([this] { Receive(); }) {}

AgentLink::~AgentLink() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  channel_.Shutdown();
  receiver_.join();
}

void AgentLink::Send(const v1::TrainerToAgent& message) {
  channel_.Send(message).IgnoreError();
}

void AgentLink::Progress(const char* phase) {
  v1::TrainerToAgent message;
  message.mutable_progress()->set_phase(phase);
  Send(message);
}

absl::Status AgentLink::Set(const std::string& key, const std::string& value) {
  v1::TrainerToAgent message;
  message.mutable_rendezvous_set()->set_key(key);
  message.mutable_rendezvous_set()->set_value(value);
  return channel_.Send(message);
}

absl::StatusOr<std::string> AgentLink::Get(const std::string& key, absl::Duration timeout) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key);
    if (found != values_.end()) return found->second;
  }
  v1::TrainerToAgent message;
  message.mutable_rendezvous_get()->set_key(key);
  if (absl::Status s = channel_.Send(message); !s.ok()) return s;
  std::unique_lock<std::mutex> lock(mutex_);
  const bool found = changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                                       [&] { return values_.count(key) > 0; });
  if (!found) {
    return absl::DeadlineExceededError(absl::StrCat("no rank has set `", key, "`"));
  }
  return values_[key];
}

bool AgentLink::stop_requested() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stop_;
}

int64_t AgentLink::released_step() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return released_step_;
}

void AgentLink::Receive() {
  for (;;) {
    v1::AgentToTrainer message;
    const absl::Status status = channel_.Receive(absl::InfiniteDuration(), &message);
    std::lock_guard<std::mutex> lock(mutex_);
    if (!status.ok()) {
      if (closing_) return;
      std::fprintf(stderr, "the agent is gone (%s); ending\n", status.ToString().c_str());
      _exit(static_cast<int>(ExitCode::kAgentLost));
    }
    switch (message.message_case()) {
      case v1::AgentToTrainer::kRendezvousValue:
        values_[message.rendezvous_value().key()] = message.rendezvous_value().value();
        break;
      case v1::AgentToTrainer::kStop:
        if (message.stop().mode() == v1::STOP_MODE_KILL) {
          _exit(static_cast<int>(ExitCode::kOk));
        }
        stop_ = true;
        break;
      case v1::AgentToTrainer::kCheckpointRelease:
        released_step_ = std::max(released_step_, message.checkpoint_release().step());
        break;
      case v1::AgentToTrainer::MESSAGE_NOT_SET:
        break;
    }
    changed_.notify_all();
  }
}

}  // namespace attune
