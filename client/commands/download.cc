// attune download JOB -o DIR
#include "client/commands/download.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/lib/job_view.h"
#include "client/lib/live.h"
#include "client/lib/progress.h"
#include "client/lib/text.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr char kAdapterPrefix[] = "adapter/";

// Whether the directory holds exactly these files of the artifact.
bool IsSame(const v1::Artifact& artifact, const std::string& prefix, const std::string& directory) {
  absl::StatusOr<std::vector<LocalFile>> there = ListFiles(directory);
  if (!there.ok()) return false;
  size_t wanted = 0;
  for (const v1::ArtifactFile& file : artifact.files()) {
    if (!absl::StartsWith(file.path(), prefix)) continue;
    ++wanted;
    const absl::StatusOr<std::string> sha256 =
        Sha256OfFile(absl::StrCat(directory, "/", file.path().substr(prefix.size())));
    if (!sha256.ok() || *sha256 != file.sha256()) return false;
  }
  return wanted == there->size();
}

absl::Status MoveIntoPlace(const std::string& from, const std::string& to) {
  std::error_code error;
  fs::remove_all(to, error);
  if (!error) fs::rename(from, to, error);
  if (error) return absl::InternalError(absl::StrCat("cannot write ", to, ": ", error.message()));
  return absl::OkStatus();
}

}  // namespace

bool IsEmptyOrMissing(const std::string& directory) {
  std::error_code error;
  return !fs::exists(directory, error) ||
         (fs::is_directory(directory, error) && fs::is_empty(directory, error));
}

absl::Status DownloadCheckpoint(const Invocation& invocation, const DownloadOptions& options,
                                Connection* connection, Cancellation* cancellation,
                                v1::Checkpoint* checkpoint) {
  absl::StatusOr<std::string> job = JobName(options.job);
  if (!job.ok()) return job.status();
  v1::GetCheckpointRequest request;
  request.set_name(absl::StrCat(*job, "/checkpoints/", options.checkpoint));
  const auto context = connection->NewContext();
  absl::Status status = connection->Explain(
      connection->checkpoints().GetCheckpoint(context.get(), request, checkpoint));
  if (!status.ok()) return status;
  const std::string prefix = options.all ? "" : kAdapterPrefix;
  StatusLine line(STDERR_FILENO, invocation.ascii);
  TransferOptions transfer;
  transfer.cancellation = cancellation;
  transfer.progress = [&](int64_t done, int64_t total) {
    const double part = total > 0 ? static_cast<double>(done) / total : 1.0;
    line.Draw(absl::StrCat("step ", checkpoint->step(), " [", Bar(part, 20, invocation.ascii), "] ",
                           FormatBytes(done), " of ", FormatBytes(total)));
  };
  ArtifactClient client = connection->NewArtifactClient();
  std::string directory = fs::path(options.directory).lexically_normal().string();
  if (directory.size() > 1 && directory.back() == '/') directory.pop_back();
  if (!IsEmptyOrMissing(directory)) {
    absl::StatusOr<v1::Artifact> artifact = client.Get(checkpoint->artifact(), transfer);
    if (!artifact.ok()) return artifact.status();
    if (IsSame(*artifact, prefix, directory)) return absl::OkStatus();
    if (!options.replace) {
      return absl::AlreadyExistsError(absl::StrCat(
          directory, " has other content; give another -o, or --replace to overwrite it"));
    }
  }
  const std::string partial = directory + ".part";
  status = client.Download(checkpoint->artifact(), prefix, partial, transfer);
  if (!status.ok()) return status;
  if (!fs::exists(partial)) {
    return absl::NotFoundError(absl::StrCat("the checkpoint has no file in ", prefix));
  }
  return MoveIntoPlace(partial, directory);
}

namespace {

CliExit RunDownload(Invocation* invocation, const DownloadOptions& options) {
  Cancellation cancellation;
  Interrupt interrupt([&] { cancellation.Cancel(); });
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(invocation->endpoint);
  if (!connection.ok()) return Fail(connection.status());
  v1::Checkpoint checkpoint;
  const absl::Status status =
      DownloadCheckpoint(*invocation, options, connection->get(), &cancellation, &checkpoint);
  if (absl::IsCancelled(status)) {
    std::fprintf(stderr, "attune: interrupted; the same command goes on where it stopped\n");
    return CliExit::kInterrupted;
  }
  if (!status.ok()) return Fail(status);
  Print(absl::StrCat(options.all ? "the checkpoint" : "the adapter", " of step ", checkpoint.step(),
                     " is in ", options.directory, "\n"));
  return CliExit::kOk;
}

}  // namespace

void AddDownloadCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("download", "Fetch the adapter of a checkpoint");
  auto options = std::make_shared<DownloadOptions>();
  command->add_option("job", options->job, "id of the job")->required()->type_name("JOB");
  command->add_option("-o,--output-dir", options->directory, "directory to write")
      ->required()
      ->type_name("DIR");
  command
      ->add_option(
          "--checkpoint", options->checkpoint,
          "its step, `result` (the best or the last, as the spec says), `best` or `last` [result]")
      ->type_name("STEP");
  command->add_flag("--all", options->all, "the trainer's state too, to resume from");
  command->add_flag("--replace", options->replace, "overwrite what is in DIR");
  AddConnectionOptions(command, invocation);
  command->callback([=] { invocation->run = [=] { return RunDownload(invocation, *options); }; });
}

}  // namespace attune
