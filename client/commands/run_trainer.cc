#include "client/commands/run_trainer.h"

#include <errno.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace attune {

CliExit RunTrainer(const Invocation& invocation, const std::vector<std::string>& arguments) {
  std::vector<char*> pointers = {const_cast<char*>(invocation.trainer.c_str())};
  for (const std::string& argument : arguments) {
    pointers.push_back(const_cast<char*>(argument.c_str()));
  }
  pointers.push_back(nullptr);
  execv(invocation.trainer.c_str(), pointers.data());
  return Fail(absl::NotFoundError(
      absl::StrCat("cannot run ", invocation.trainer, ": ", std::strerror(errno),
                   ". Install attune-trainer beside attune, or name it in ATTUNE_TRAINER.")));
}

void AddPassedCommand(const std::string& mode, const std::string& description, CLI::App* app,
                      Invocation* invocation) {
  CLI::App* command = app->add_subcommand(mode, description);
  // Values may look like anything: the trainer reads them all.
  command->prefix_command();
  command->set_help_flag("");
  command->callback([=] {
    invocation->run = [=] {
      std::vector<std::string> arguments = {mode};
      for (const std::string& extra : command->remaining()) arguments.push_back(extra);
      return RunTrainer(*invocation, arguments);
    };
  });
}

void AddSpecCommand(const std::string& mode, const std::string& description, CLI::App* app,
                    Invocation* invocation) {
  CLI::App* command = app->add_subcommand(mode, description);
  command->footer("Further options are passed on: see `attune-trainer " + mode + " --help`.");
  auto file = std::make_shared<std::string>();
  command->add_option("job", *file, "the job as YAML")->required()->type_name("JOB.yaml");
  command->allow_extras();
  command->callback([=] {
    invocation->run = [=] {
      absl::StatusOr<ParsedJobSpec> parsed = LoadJobSpec(*file);
      if (!parsed.ok()) return Fail(parsed.status());
      std::vector<std::string> arguments = {mode, "--spec", *file};
      for (const std::string& extra : command->remaining()) arguments.push_back(extra);
      return RunTrainer(*invocation, arguments);
    };
  });
}

}  // namespace attune
