// Commands that need the engine run attune-trainer in that mode.
#pragma once

#include <string>
#include <vector>

#include "client/commands/command.h"

namespace attune {

// Replaces this process by the trainer. Returns only if that fails.
CliExit RunTrainer(const Invocation& invocation, const std::vector<std::string>& arguments);

// `attune <mode> ...`: runs `attune-trainer <mode>` with all that follows.
void AddPassedCommand(const std::string& mode, const std::string& description, CLI::App* app,
                      Invocation* invocation);

// `attune <mode> JOB.yaml`: refuses a spec that is wrong by itself, with file and line, as `submit`
// does, then runs `attune-trainer <mode> --spec JOB.yaml` with the further options.
void AddSpecCommand(const std::string& mode, const std::string& description, CLI::App* app,
                    Invocation* invocation);

}  // namespace attune
