// attune checkpoints JOB
#include "absl/time/clock.h"
#include "client/commands/command.h"
#include "client/lib/job_view.h"

namespace attune {
namespace {

CliExit RunCheckpoints(Invocation* invocation, const std::string& given) {
  absl::StatusOr<std::string> name = JobName(given);
  if (!name.ok()) return Fail(name.status());
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  v1::ListCheckpointsRequest request;
  request.set_job(*name);
  v1::ListCheckpointsResponse response;
  const auto context = (*connection)->NewContext();
  const absl::Status status = (*connection)->Explain(
      (*connection)->checkpoints().ListCheckpoints(context.get(), request, &response));
  if (!status.ok()) return Fail(status);
  Print(Render(invocation->output, response, CheckpointsTable(response, absl::Now())));
  return CliExit::kOk;
}

}  // namespace

void AddCheckpointsCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("checkpoints", "List a job's checkpoints");
  auto job = std::make_shared<std::string>();
  command->add_option("job", *job, "id of the job")->required()->type_name("JOB");
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
  command->callback([=] { invocation->run = [=] { return RunCheckpoints(invocation, *job); }; });
}

}  // namespace attune
