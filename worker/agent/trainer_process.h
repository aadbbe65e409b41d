// One trainer process in its own process group: started with a channel (message_channel.h) and
// pipes for what it prints, watched until its whole group is gone.
//
// Threads of its own deliver what happens; `exited` is the last call, made when no process of the
// group is alive, everything it said has been delivered, and its pid is free again.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attune/v1/trainer.pb.h"
#include "worker/agent/trainer_exit.h"
#include "worker/io/message_channel.h"

namespace attune {

struct TrainerProcessOptions {
  std::string program;                   // path
  std::string assignment_file;
  std::string working_directory;
  std::string record_file;               // process_table.h; written before Start returns
  std::string token;                     // of ATTUNE_TRAINER_TOKEN
  std::vector<std::string> environment;  // "NAME=value"
};

struct TrainerProcessEvents {
  std::function<void(v1::TrainerToAgent)> message;
  std::function<void(bool is_stderr, std::string line)> line;
  std::function<void(TrainerExit)> exited;
};

class TrainerProcess {
 public:
  // Runs `program --assignment FILE --channel-fd N`. To be called from a thread that lives longer
  // than the process: the kernel kills the process when that thread ends. Errors: no process is
  // left behind and no event will come.
  static absl::StatusOr<std::unique_ptr<TrainerProcess>> Start(
      const TrainerProcessOptions& options, TrainerProcessEvents events);

  // Kills the group and waits for it.
  ~TrainerProcess();
  TrainerProcess(const TrainerProcess&) = delete;
  TrainerProcess& operator=(const TrainerProcess&) = delete;

  // Waits at most one second for room in the socket. UNAVAILABLE if that fails.
  absl::Status Send(const v1::AgentToTrainer& message);

  // SIGKILL to the whole group; returns at once. Does nothing once it is gone.
  void Kill();

  pid_t pid() const { return pid_; }

 private:
  TrainerProcess(pid_t pid, int pid_handle, int channel_fd, int stdout_fd, int stderr_fd,
                 std::string token, TrainerProcessEvents events);
  void ReadMessages();
  void Watch();
  // Reads what is there; closes at the end of the stream.
  void ReadOutput(int stream);
  void WaitForGroup();

  const pid_t pid_;
  const int pid_handle_;
  const std::string token_;
  const TrainerProcessEvents events_;
  MessageChannel channel_;
  struct Output;
  std::unique_ptr<Output> output_;
  std::mutex mutex_;
  bool reaped_ = false;  // under mutex_: while false the pid is ours
  std::thread reader_;
  std::thread watcher_;
};

}  // namespace attune
