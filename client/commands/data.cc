// attune data inspect JOB.yaml
#include "client/commands/run_trainer.h"

namespace attune {

void AddDataCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* data = app->add_subcommand("data", "Look at training data");
  data->require_subcommand(1);
  AddSpecCommand("inspect",
                 "Show lengths, tokens, the share that is trained, and the first examples", data,
                 invocation);
}

}  // namespace attune
