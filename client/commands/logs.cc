// attune logs JOB
#include "absl/strings/str_cat.h"
#include "client/commands/command.h"
#include "client/lib/follow.h"
#include "client/lib/job_view.h"
#include "client/lib/live.h"

namespace attune {
namespace {

struct LogsOptions {
  std::string job;
  bool follow = false;
  int rank = -2;
};

// Lines come at once, so a pause of this length means that all that there are have come.
constexpr absl::Duration kIdle = absl::Seconds(1);

CliExit RunLogs(Invocation* invocation, const LogsOptions& options) {
  absl::StatusOr<std::string> name = JobName(options.job);
  if (!name.ok()) return Fail(name.status());
  Cancellation cancellation;
  Interrupt interrupt([&] { cancellation.Cancel(); });
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  FollowOptions follow;
  follow.job = *name;
  if (!options.follow) follow.idle_limit = kIdle;
  FollowHandlers handlers;
  handlers.line = [&](const v1::LogLine& line) {
    if (options.rank >= -1 && line.rank() != options.rank) return;
    Print(LogText(line, absl::LocalTimeZone()) + "\n");
  };
  handlers.notice = [](const std::string& text) {
    std::fprintf(stderr, "attune: %s\n", text.c_str());
  };
  const absl::Status status = Follow(**connection, follow, handlers, &cancellation);
  if (absl::IsCancelled(status) && cancellation.cancelled()) return CliExit::kInterrupted;
  return status.ok() ? CliExit::kOk : Fail(status);
}

}  // namespace

void AddLogsCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("logs", "Print what a job's trainers printed");
  auto options = std::make_shared<LogsOptions>();
  command->add_option("job", options->job, "id of the job")->required()->type_name("JOB");
  command->add_flag("-f,--follow", options->follow, "go on until the job ends");
  command->add_option("--rank", options->rank, "only this rank's lines; -1: the agent's")
      ->type_name("RANK");
  AddConnectionOptions(command, invocation);
  command->callback([=] { invocation->run = [=] { return RunLogs(invocation, *options); }; });
}

}  // namespace attune
