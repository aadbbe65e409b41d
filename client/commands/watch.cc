// attune watch JOB
#include "client/commands/command.h"
#include "client/commands/submit.h"
#include "client/lib/live.h"

namespace attune {
namespace {

CliExit RunWatch(Invocation* invocation, const std::string& given, bool logs) {
  absl::StatusOr<std::string> name = JobName(given);
  if (!name.ok()) return Fail(name.status());
  Cancellation cancellation;
  Interrupt interrupt([&] { cancellation.Cancel(); });
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  const LiveOptions live = {logs, invocation->ascii, invocation->output};
  return FollowToExit(*invocation, **connection, *name, live, &cancellation);
}

}  // namespace

void AddWatchCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand(
      "watch", "Follow a job to its end: events and progress; the exit code says how it ended");
  struct Options {
    std::string job;
    bool logs = false;
  };
  auto options = std::make_shared<Options>();
  command->add_option("job", options->job, "id of the job")->required()->type_name("JOB");
  command->add_flag("--logs", options->logs, "show the trainers' lines too");
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
  command->callback([=] {
    invocation->run = [=] { return RunWatch(invocation, options->job, options->logs); };
  });
}

}  // namespace attune
