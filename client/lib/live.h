// Following a job before a person's eyes: events as lines, progress as a bar, until it ends.
#pragma once

#include <functional>
#include <string>
#include <thread>

#include "client/lib/connection.h"
#include "client/lib/exit_code.h"
#include "client/lib/output.h"

namespace attune {

// Ctrl-C and SIGTERM as a function call, from a thread, for as long as this lives: the first time
// `on_interrupt`, the second time the process ends at once with exit code 130. Make it before any
// other thread, so that no other takes the signal.
class Interrupt {
 public:
  explicit Interrupt(std::function<void()> on_interrupt);
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

 private:
  int signal_fd_;
  int stop_fds_[2];
  std::thread thread_;
};

struct LiveOptions {
  bool logs = false;
  bool ascii = false;
  // kTable: for people, on standard output. kJson: a JSON object a line, {"event": ...},
  // {"metrics": ...} or {"line": ...}. kYaml: documents of the same.
  OutputFormat format = OutputFormat::kTable;
};

// Blocks until the job is in a final state or PAUSED; then `*job` is what it came to.
// CANCELLED when cancelled.
absl::Status FollowLive(const Connection& connection, const std::string& job_name,
                        const LiveOptions& options, Cancellation* cancellation, v1::Job* job);

}  // namespace attune
