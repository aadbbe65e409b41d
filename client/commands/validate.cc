// attune validate JOB.yaml
#include "client/commands/run_trainer.h"

namespace attune {

void AddValidateCommand(CLI::App* app, Invocation* invocation) {
  AddSpecCommand("validate", "Read model and data and say what is wrong with a job", app,
                 invocation);
}

}  // namespace attune
