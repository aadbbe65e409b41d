// attune estimate JOB.yaml
#include "client/commands/run_trainer.h"

namespace attune {

void AddEstimateCommand(CLI::App* app, Invocation* invocation) {
  AddSpecCommand("estimate", "Say how much memory a job needs, before any device is touched", app,
                 invocation);
}

}  // namespace attune
