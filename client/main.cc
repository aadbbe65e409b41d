// attune: the command line.
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "client/commands/command.h"

namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool TerminalIsAscii() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const std::string value = absl::AsciiStrToLower(Environment(name));
    if (!value.empty()) {
      return !absl::StrContains(value, "utf-8") && !absl::StrContains(value, "utf8");
    }
  }
  return true;
}

constexpr char kFooter[] = R"(
Exit codes: 0 done, job succeeded; 1 wrong usage or spec; 2 coordinator not reached; 3 job failed;
4 job cancelled; 5 not found; 6 job paused; 7 refused in this state; 8 not allowed; 9 other error;
130 interrupted.)";

}  // namespace

int main(int argc, char** argv) {
  attune::Invocation invocation;
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  invocation.program_directory = self.parent_path().string();
  invocation.trainer = Environment("ATTUNE_TRAINER");
  if (invocation.trainer.empty()) {
    invocation.trainer = invocation.program_directory + "/attune-trainer";
  }
  invocation.endpoint.address = Environment("ATTUNE_COORDINATOR");
  invocation.endpoint.data_directory =
      attune::DefaultDataDirectory(std::getenv("XDG_DATA_HOME"), std::getenv("HOME"));
  invocation.cache_directory =
      attune::DefaultCacheDirectory(std::getenv("XDG_CACHE_HOME"), std::getenv("HOME"));
  invocation.ascii = TerminalIsAscii();
  // A reader of our output that goes away is an error of write, not a reason to die of.
  signal(SIGPIPE, SIG_IGN);

  CLI::App app(
      "Fine-tunes large language models: submits jobs to an attune coordinator and "
      "follows them.",
      "attune");
  app.set_version_flag("--version", ATTUNE_VERSION);
  app.require_subcommand(1);
  app.footer(kFooter);
  attune::AddSubmitCommand(&app, &invocation);
  attune::AddListCommand(&app, &invocation);
  attune::AddGetCommand(&app, &invocation);
  attune::AddWatchCommand(&app, &invocation);
  attune::AddLogsCommand(&app, &invocation);
  attune::AddCancelCommand(&app, &invocation);
  attune::AddPauseCommand(&app, &invocation);
  attune::AddResumeCommand(&app, &invocation);
  attune::AddDeleteCommand(&app, &invocation);
  attune::AddCheckpointsCommand(&app, &invocation);
  attune::AddDownloadCommand(&app, &invocation);
  attune::AddWorkersCommand(&app, &invocation);
  attune::AddDataCommand(&app, &invocation);
  attune::AddEstimateCommand(&app, &invocation);
  attune::AddValidateCommand(&app, &invocation);
  attune::AddGenerateCommand(&app, &invocation);
  attune::AddMergeCommand(&app, &invocation);
  attune::AddLocalCommand(&app, &invocation);
  attune::AddCompletionCommand(&app, &invocation);
  try {
    app.parse(argc, argv);
  } catch (const CLI::RequiredError& e) {
    // The parser would say that a command is required, also of one that it does not know.
    if (argc > 1 && argv[1][0] != '-' &&
        app.get_subcommands([&](CLI::App* c) { return c->get_name() == argv[1]; }).empty()) {
      std::fprintf(stderr, "attune: there is no command `%s`; see `attune --help`\n", argv[1]);
      return static_cast<int>(attune::CliExit::kInvalid);
    }
    return app.exit(e) == 0 ? 0 : static_cast<int>(attune::CliExit::kInvalid);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(attune::CliExit::kInvalid);
  }
  return static_cast<int>(invocation.run());
}
