// The commands that change jobs: cancel, pause, resume, delete.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "client/commands/command.h"

namespace attune {

struct ChangeOptions {
  std::vector<std::string> jobs;
  bool wait = false;
};

// The jobs' positional argument, --wait if `what_for` says for what, and the usual options.
void AddChangeOptions(CLI::App* command, Invocation* invocation, const std::string& what_for,
                      ChangeOptions* options);

// Calls `change` for each job and prints what became of it. The first error is the exit code;
// the other jobs are changed all the same.
using Change =
    std::function<grpc::Status(Connection*, const std::string& name, v1::Job* job)>;
CliExit ChangeJobs(Invocation* invocation, const ChangeOptions& options, const Change& change);

}  // namespace attune
