// AgentLink: the trainer's side of the channel to its agent (proto/attune/v1/trainer.proto).
//
// A thread receives; what the trainer says is sent from its own threads. When the agent is gone
// the process ends with ExitCode::kAgentLost: nobody would know what it does.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "attune/v1/trainer.pb.h"
#include "worker/io/message_channel.h"
#include "worker/shard/communicator.h"

namespace attune {

class AgentLink : public RendezvousStore {
 public:
  explicit AgentLink(int fd);
  ~AgentLink() override;

  // Errors are not reported: a channel that fails ends the process from the receiving thread.
  void Send(const v1::TrainerToAgent& message);
  void Progress(const char* phase);

  // RendezvousStore, through the coordinator.
  absl::Status Set(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override;

  // Whether the agent asked for a checkpoint and an end.
  bool stop_requested() const;
  // The last step whose checkpoint is stored elsewhere; -1 if there is none.
  int64_t released_step() const;

 private:
  void Receive();

  MessageChannel channel_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  bool stop_ = false;
  int64_t released_step_ = -1;
  bool closing_ = false;
  std::thread receiver_;
};

}  // namespace attune
