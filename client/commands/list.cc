// attune list
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/commands/command.h"
#include "client/lib/job_view.h"

namespace attune {
namespace {

struct ListOptions {
  std::vector<std::string> states;
  int limit = 50;
  bool names_only = false;
};

CliExit RunList(Invocation* invocation, const ListOptions& options) {
  v1::ListJobsRequest request;
  for (const std::string& state : options.states) {
    v1::JobState value;
    if (!v1::JobState_Parse("JOB_STATE_" + absl::AsciiStrToUpper(state), &value)) {
      return Fail(absl::InvalidArgumentError(
          absl::StrCat("`", state, "` is no state of a job, like running or failed")));
    }
    request.add_states(value);
  }
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  v1::ListJobsResponse all;
  do {
    request.set_page_size(std::min(1000, options.limit - all.jobs_size()));
    v1::ListJobsResponse page;
    const auto context = (*connection)->NewContext();
    const absl::Status status = (*connection)->Explain(
        (*connection)->jobs().ListJobs(context.get(), request, &page));
    if (!status.ok()) return Fail(status);
    all.mutable_jobs()->MergeFrom(page.jobs());
    all.set_next_page_token(page.next_page_token());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty() && all.jobs_size() < options.limit);
  if (options.names_only) {
    for (const v1::Job& job : all.jobs()) Print(IdOf(job.name()) + "\n");
    return CliExit::kOk;
  }
  std::string table = JobsTable(all, absl::Now());
  if (!all.next_page_token().empty()) table += "there are more: give a larger --limit\n";
  Print(Render(invocation->output, all, table));
  return CliExit::kOk;
}

}  // namespace

void AddListCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("list", "List jobs, newest first");
  auto options = std::make_shared<ListOptions>();
  command->add_option("-s,--state", options->states, "only jobs in this state (repeatable)")
      ->type_name("STATE");
  command->add_option("-n,--limit", options->limit, "at most so many jobs [50]")
      ->check(CLI::Range(1, 1000000))
      ->type_name("N");
  command->add_flag("-q,--quiet", options->names_only, "only ids, a line each");
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
  command->callback([=] { invocation->run = [=] { return RunList(invocation, *options); }; });
}

}  // namespace attune
