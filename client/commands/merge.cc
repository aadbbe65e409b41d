// attune merge --model DIR --adapter DIR -o DIR ...
#include "client/commands/run_trainer.h"

namespace attune {

void AddMergeCommand(CLI::App* app, Invocation* invocation) {
  AddPassedCommand("merge", "Make base model and adapter one checkpoint, on this machine", app,
                   invocation);
}

}  // namespace attune
