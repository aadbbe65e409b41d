// attune generate --model DIR [--adapter DIR] --prompt TEXT ...
#include "client/commands/run_trainer.h"

namespace attune {

void AddGenerateCommand(CLI::App* app, Invocation* invocation) {
  AddPassedCommand("generate", "Let a model, with or without an adapter, answer on this machine",
                   app, invocation);
}

}  // namespace attune
