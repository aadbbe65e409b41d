// attune validate JOB.yaml
#include "client/commands/run_trainer.h"

namespace attune {

void AddValidateCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand(
      "validate", "Read model and data and say what is wrong with a job (further options: those of `attune-trainer validate`)");
  auto file = std::make_shared<std::string>();
  command->add_option("job", *file, "the job as YAML")->required()->type_name("JOB.yaml");
  command->allow_extras();
  command->callback([=] {
    invocation->run = [=] {
      // A spec that is wrong by itself is refused here, with file and line, as `submit` does.
      absl::StatusOr<ParsedJobSpec> parsed = LoadJobSpec(*file);
      if (!parsed.ok()) return Fail(parsed.status());
      std::vector<std::string> arguments = {"validate", "--spec", *file};
      for (const std::string& extra : command->remaining()) arguments.push_back(extra);
      return RunTrainer(*invocation, arguments);
    };
  });
}

}  // namespace attune
