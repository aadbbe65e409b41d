// Commands that need the engine run attune-trainer in that mode.
#pragma once

#include <string>
#include <vector>

#include "client/commands/command.h"

namespace attune {

// Replaces this process by the trainer. Returns only if that fails.
CliExit RunTrainer(const Invocation& invocation, const std::vector<std::string>& arguments);

}  // namespace attune
