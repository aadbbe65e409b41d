// attune workers
#include "absl/time/clock.h"
#include "client/commands/command.h"
#include "client/lib/job_view.h"

namespace attune {
namespace {

CliExit RunWorkers(Invocation* invocation) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  v1::ListWorkersResponse response;
  const auto context = (*connection)->NewContext();
  const absl::Status status =
      (*connection)->Explain((*connection)->jobs().ListWorkers(context.get(), {}, &response));
  if (!status.ok()) return Fail(status);
  Print(Render(invocation->output, response, WorkersTable(response, absl::Now())));
  return CliExit::kOk;
}

}  // namespace

void AddWorkersCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("workers", "List workers and their devices");
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
  command->callback([=] { invocation->run = [=] { return RunWorkers(invocation); }; });
}

}  // namespace attune
