// attune submit JOB.yaml
#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "client/commands/command.h"
#include "client/commands/submit.h"
#include "client/lib/job_view.h"
#include "client/lib/live.h"
#include "client/lib/progress.h"
#include "client/lib/text.h"
#include "client/lib/upload_sources.h"

namespace attune {
namespace {

struct SubmitOptions {
  std::string file;
  std::string request_id;
  bool wait = false;
  bool detach = false;
  bool logs = false;
  bool validate_only = false;
};

absl::StatusOr<std::string> UploadWithProgress(const Invocation& invocation,
                                               const FileSource& source, Connection* connection,
                                               Cancellation* cancellation) {
  StatusLine status(STDERR_FILENO, invocation.ascii);
  TransferOptions options;
  options.cancellation = cancellation;
  options.progress = [&](int64_t done, int64_t total) {
    const double part = total > 0 ? static_cast<double>(done) / total : 1.0;
    status.Draw(absl::StrCat("uploading ", source.path, " [", Bar(part, 20, invocation.ascii),
                             "] ", FormatBytes(done), " of ", FormatBytes(total)));
  };
  absl::StatusOr<v1::Artifact> artifact =
      connection->NewArtifactClient().Upload(source.kind, source.files, options);
  if (!artifact.ok()) return artifact.status();
  status.Clear();
  if (invocation.verbose) {
    std::fprintf(stderr, "%s is %s\n", source.path.c_str(), artifact->name().c_str());
  }
  return artifact->name();
}

CliExit RunSubmit(Invocation* invocation, const SubmitOptions& options) {
  absl::StatusOr<ParsedJobSpec> parsed = LoadJobSpec(options.file);
  if (!parsed.ok()) return Fail(parsed.status());
  Cancellation cancellation;
  Interrupt interrupt([&] { cancellation.Cancel(); });
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  const std::string request_id =
      options.request_id.empty() ? NewRequestId() : options.request_id;
  if (invocation->verbose) std::fprintf(stderr, "request id: %s\n", request_id.c_str());
  const std::string directory = std::filesystem::path(options.file).parent_path().string();
  absl::StatusOr<v1::Job> job =
      SubmitJob(*invocation, directory, request_id, options.validate_only, connection->get(),
                &cancellation, &*parsed);
  if (!job.ok()) return Fail(job.status());
  if (options.validate_only) {
    Print(Render(invocation->output, *job, "the job is right, as far as can be told without "
                                           "reading model and data; nothing was stored\n"));
    return CliExit::kOk;
  }
  if (!options.wait) {
    const std::string id = IdOf(job->name());
    Print(Render(invocation->output, *job,
                 absl::StrCat(job->name(), "\n\n  attune watch ", id, "\n  attune logs -f ", id,
                              "\n  attune cancel ", id, "\n")));
    return CliExit::kOk;
  }
  if (invocation->output == OutputFormat::kTable) Print(job->name() + "\n");
  LiveOptions live = {options.logs, invocation->ascii, invocation->output};
  return FollowToExit(*invocation, **connection, job->name(), live, &cancellation);
}

}  // namespace

absl::StatusOr<v1::Job> SubmitJob(const Invocation& invocation, const std::string& directory,
                                  const std::string& request_id, bool validate_only,
                                  Connection* connection, Cancellation* cancellation,
                                  ParsedJobSpec* parsed) {
  absl::StatusOr<std::vector<FileSource>> sources = FindFileSources(directory, parsed);
  if (!sources.ok()) return sources.status();
  absl::Status status = ReplaceFileSources(
      [&](const FileSource& source) {
        return UploadWithProgress(invocation, source, connection, cancellation);
      },
      &*sources);
  if (!status.ok()) return status;
  v1::CreateJobRequest request;
  *request.mutable_spec() = parsed->spec;
  request.set_request_id(request_id);
  request.set_validate_only(validate_only);
  v1::Job job;
  // The request id makes it safe to try again when an answer was lost.
  for (int attempt = 0;; ++attempt) {
    const auto context = connection->NewContext();
    const grpc::Status created = connection->jobs().CreateJob(context.get(), request, &job);
    if (created.ok()) return job;
    const bool again = created.error_code() == grpc::StatusCode::UNAVAILABLE && attempt < 3;
    if (!again || cancellation->cancelled()) return connection->Explain(created);
  }
}

CliExit FollowToExit(const Invocation& invocation, const Connection& connection,
                     const std::string& job_name, const LiveOptions& live,
                     Cancellation* cancellation) {
  v1::Job job;
  const absl::Status status = FollowLive(connection, job_name, live, cancellation, &job);
  const std::string id = IdOf(job_name);
  if (absl::IsCancelled(status) && cancellation->cancelled()) {
    std::fprintf(stderr, "attune: no longer watching; the job goes on. `attune watch %s` goes on "
                         "watching, `attune cancel %s` ends it.\n", id.c_str(), id.c_str());
    return CliExit::kInterrupted;
  }
  if (!status.ok()) return Fail(status);
  if (live.format == OutputFormat::kTable) {
    if (job.state() == v1::JOB_STATE_SUCCEEDED) {
      Print(absl::StrCat("\n", job.name(), " succeeded: loss ", FormatNumber(job.progress().loss()),
                         " after ", job.progress().step(), " steps\n  attune download ", id,
                         " -o DIR\n"));
    } else {
      Print(absl::StrCat("\n", job.name(), " is ", FormatState(job.state()), ": ", job.message(),
                         "\n"));
    }
  }
  return ExitOf(job.state());
}

void AddSubmitCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("submit", "Submit a job");
  auto options = std::make_shared<SubmitOptions>();
  command->add_option("job", options->file, "the job as YAML")->required()->type_name("JOB.yaml");
  command->add_option("--request-id", options->request_id,
                      "a UUID: the same id submits the same job once [made anew]")
      ->type_name("UUID");
  auto* wait = command->add_flag("-w,--wait", options->wait,
                                 "follow the job to its end; the exit code says how it ended");
  command->add_flag("--detach", options->detach, "do not wait [default]")->excludes(wait);
  command->add_flag("--logs", options->logs, "with --wait: show the trainers' lines too");
  command->add_flag("--validate-only", options->validate_only, "check the spec, store nothing");
  AddConnectionOptions(command, invocation);
  AddOutputOption(command, invocation);
  command->callback(
      [=] { invocation->run = [=] { return RunSubmit(invocation, *options); }; });
}

}  // namespace attune
