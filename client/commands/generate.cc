// attune generate --model DIR [--adapter DIR] --prompt TEXT ...
#include "client/commands/run_trainer.h"

namespace attune {

void AddGenerateCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand(
      "generate",
      "Let a model, with or without an adapter, answer on this machine: --model DIR "
      "[--adapter DIR] --prompt TEXT | --messages FILE [--max-tokens N] [--temperature T] "
      "[--top-p P] [--seed N]; everything is passed to `attune-trainer generate`");
  // Values such as --prompt's may look like anything: the trainer reads them all.
  command->prefix_command();
  command->set_help_flag("");
  command->callback([=] {
    invocation->run = [=] {
      std::vector<std::string> arguments = {"generate"};
      for (const std::string& extra : command->remaining()) arguments.push_back(extra);
      return RunTrainer(*invocation, arguments);
    };
  });
}

}  // namespace attune
