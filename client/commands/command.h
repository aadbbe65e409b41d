// A command of `attune`: adds itself to the parser, and is run when it was chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "client/lib/connection.h"
#include "client/lib/exit_code.h"
#include "client/lib/output.h"
#include "proto/job_spec.h"

namespace attune {

// Options and facts that all commands share.
struct Invocation {
  EndpointOptions endpoint;
  OutputFormat output = OutputFormat::kTable;
  bool verbose = false;
  bool ascii = false;             // the terminal shows no UTF-8
  std::string program_directory;  // of this program
  std::string trainer;            // ATTUNE_TRAINER, or beside this program
  std::string cache_directory;    // of this user; may be empty
  std::function<CliExit()> run;   // of the command that was chosen
};

// Adds --output to a command that prints a resource.
void AddOutputOption(CLI::App* command, Invocation* invocation);
// Adds --coordinator, --data-dir and --token-file.
void AddConnectionOptions(CLI::App* command, Invocation* invocation);

// "attune: message" on standard error, and the exit code.
CliExit Fail(const absl::Status& status);
// On standard output.
void Print(const std::string& text);

// Reads a job spec with its defaults; every violation is in the status with file and line.
absl::StatusOr<ParsedJobSpec> LoadJobSpec(const std::string& file);

void AddSubmitCommand(CLI::App* app, Invocation* invocation);
void AddListCommand(CLI::App* app, Invocation* invocation);
void AddGetCommand(CLI::App* app, Invocation* invocation);
void AddWatchCommand(CLI::App* app, Invocation* invocation);
void AddLogsCommand(CLI::App* app, Invocation* invocation);
void AddCancelCommand(CLI::App* app, Invocation* invocation);
void AddPauseCommand(CLI::App* app, Invocation* invocation);
void AddResumeCommand(CLI::App* app, Invocation* invocation);
void AddDeleteCommand(CLI::App* app, Invocation* invocation);
void AddCheckpointsCommand(CLI::App* app, Invocation* invocation);
void AddDownloadCommand(CLI::App* app, Invocation* invocation);
void AddWorkersCommand(CLI::App* app, Invocation* invocation);
void AddDataCommand(CLI::App* app, Invocation* invocation);
void AddEstimateCommand(CLI::App* app, Invocation* invocation);
void AddValidateCommand(CLI::App* app, Invocation* invocation);
void AddGenerateCommand(CLI::App* app, Invocation* invocation);
void AddMergeCommand(CLI::App* app, Invocation* invocation);
void AddLocalCommand(CLI::App* app, Invocation* invocation);
void AddCompletionCommand(CLI::App* app, Invocation* invocation);

}  // namespace attune
