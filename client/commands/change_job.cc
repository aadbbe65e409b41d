#include "client/commands/change_job.h"

#include "absl/strings/str_cat.h"
#include "client/lib/text.h"

namespace attune {
namespace {

constexpr double kWaitSeconds = 60;

bool IsAtRest(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED ||
         state == v1::JOB_STATE_CANCELLED || state == v1::JOB_STATE_PAUSED;
}

absl::Status WaitUntilAtRest(Connection* connection, const std::string& name, v1::Job* job) {
  while (!IsAtRest(job->state())) {
    v1::WaitJobRequest request;
    request.set_name(name);
    request.set_timeout_s(kWaitSeconds);
    const auto context = connection->NewContext(absl::Seconds(kWaitSeconds + 30));
    const grpc::Status status = connection->jobs().WaitJob(context.get(), request, job);
    if (!status.ok()) return connection->Explain(status);
  }
  return absl::OkStatus();
}

}  // namespace

void AddChangeOptions(CLI::App* command, Invocation* invocation, const std::string& what_for,
                      ChangeOptions* options) {
  command->add_option("jobs", options->jobs, "ids of jobs")->required()->type_name("JOB");
  if (!what_for.empty()) {
    command->add_flag("-w,--wait", options->wait, absl::StrCat("return when ", what_for));
  }
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
}

CliExit ChangeJobs(Invocation* invocation, const ChangeOptions& options, const Change& change) {
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  CliExit exit = CliExit::kOk;
  for (const std::string& given : options.jobs) {
    v1::Job job;
    absl::StatusOr<std::string> name = JobName(given);
    absl::Status status = name.status();
    if (status.ok()) {
      status = (*connection)->Explain(change(connection->get(), *name, &job));
    }
    if (status.ok() && options.wait) status = WaitUntilAtRest(connection->get(), *name, &job);
    if (!status.ok()) {
      const CliExit failed =
          Fail(absl::Status(status.code(), absl::StrCat(given, ": ", status.message())));
      if (exit == CliExit::kOk) exit = failed;
      continue;
    }
    if (job.name().empty()) job.set_name(*name);  // Deleted: there is nothing to show.
    Print(Render(invocation->output, job,
                 absl::StrCat(job.name(), " ",
                              job.state() == v1::JOB_STATE_UNSPECIFIED ? "is deleted"
                                                                       : FormatState(job.state()),
                              "\n")));
  }
  return exit;
}

}  // namespace attune
