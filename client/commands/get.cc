// attune get JOB
#include "absl/time/clock.h"
#include "client/commands/command.h"
#include "client/lib/job_view.h"

namespace attune {
namespace {

CliExit RunGet(Invocation* invocation, const std::string& given, bool spec) {
  absl::StatusOr<std::string> name = JobName(given);
  if (!name.ok()) return Fail(name.status());
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  v1::GetJobRequest request;
  request.set_name(*name);
  v1::Job job;
  const auto context = (*connection)->NewContext();
  const absl::Status status =
      (*connection)->Explain((*connection)->jobs().GetJob(context.get(), request, &job));
  if (!status.ok()) return Fail(status);
  Print(spec ? JobSpecToYaml(job.spec())
             : Render(invocation->output, job, JobDetails(job, absl::Now())));
  return CliExit::kOk;
}

}  // namespace

void AddGetCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("get", "Show one job");
  struct Options {
    std::string job;
    bool spec = false;
  };
  auto options = std::make_shared<Options>();
  command->add_option("job", options->job, "id of the job")->required()->type_name("JOB");
  command->add_flag("--spec", options->spec, "its spec as YAML, with every default filled in");
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
  command->callback([=] {
    invocation->run = [=] { return RunGet(invocation, options->job, options->spec); };
  });
}

}  // namespace attune
