// attune local JOB.yaml: coordinator and agent in this process, for one job.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <optional>

#include "absl/strings/str_cat.h"
#include "client/commands/command.h"
#include "client/commands/download.h"
#include "client/commands/submit.h"
#include "client/lib/job_view.h"
#include "client/lib/live.h"
#include "client/lib/text.h"
#include "server/server.h"
#include "worker/agent/agent.h"

extern char** environ;

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr double kCancelSeconds = 20;

struct LocalOptions {
  std::string file;
  std::string data_directory;
  std::string output;
  std::vector<std::string> roots;
  int cpu_slots = 0;
  bool keep = false;
  bool logs = false;
  bool replace = false;
};

// Sends what coordinator and agent log into a file: the terminal is for the job.
class LogFile {
 public:
  explicit LogFile(const std::string& path) : saved_(dup(STDERR_FILENO)) {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) return;
    dup2(fd, STDERR_FILENO);
    close(fd);
  }
  ~LogFile() {
    dup2(saved_, STDERR_FILENO);
    close(saved_);
  }
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;

 private:
  const int saved_;
};

// The data directory, removed at the end if it was made for this run.
class DataDirectory {
 public:
  static absl::StatusOr<std::unique_ptr<DataDirectory>> Make(const LocalOptions& options) {
    std::error_code error;
    auto directory = std::make_unique<DataDirectory>();
    if (!options.data_directory.empty()) {
      fs::create_directories(options.data_directory, error);
      if (error) {
        return absl::InternalError(
            absl::StrCat("cannot make ", options.data_directory, ": ", error.message()));
      }
      directory->path = fs::canonical(options.data_directory, error).string();
      return directory;
    }
    std::string pattern = (fs::temp_directory_path(error) / "attune-local-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) {
      return absl::InternalError(absl::StrCat("cannot make ", pattern, ": ", strerror(errno)));
    }
    directory->path = pattern;
    directory->temporary = !options.keep;
    return directory;
  }
  ~DataDirectory() {
    std::error_code error;
    if (temporary) fs::remove_all(path, error);
  }
  std::string path;
  bool temporary = false;
};

struct LocalService {
  std::unique_ptr<Server> server;
  std::unique_ptr<Agent> agent;  // goes first: its last reports need the server
};

absl::StatusOr<std::unique_ptr<LocalService>> StartLocalService(const Invocation& invocation,
                                                                const LocalOptions& options,
                                                                const std::string& data_directory,
                                                                int devices) {
  auto service = std::make_unique<LocalService>();
  ServerOptions server;
  server.data_dir = data_directory;
  absl::StatusOr<std::unique_ptr<Server>> started = StartServer(server);
  if (!started.ok()) return started.status();
  service->server = *std::move(started);
  AgentOptions agent;
  agent.coordinator.data_directory = data_directory;
  agent.state_directory = data_directory + "/worker";
  if (!invocation.cache_directory.empty()) {  // the state directory may go with this run
    agent.digest_cache = invocation.cache_directory + "/digests.json";
  }
  agent.trainer_program = invocation.trainer;
  agent.devices.cpu_slots = options.cpu_slots > 0 ? options.cpu_slots : devices;
  agent.roots = options.roots;
  std::error_code error;
  const fs::path directory = fs::absolute(options.file, error).parent_path();
  agent.roots.insert(agent.roots.begin(), directory.string());
  agent.environment = CleanEnvironment(environ);
  absl::StatusOr<std::unique_ptr<Agent>> worker = Agent::Start(agent);
  if (!worker.ok()) return worker.status();
  service->agent = *std::move(worker);
  return service;
}

void CancelAndWait(Connection* connection, const std::string& name) {
  v1::CancelJobRequest cancel;
  cancel.set_name(name);
  v1::Job job;
  const auto context = connection->NewContext();
  if (!connection->jobs().CancelJob(context.get(), cancel, &job).ok()) return;
  v1::WaitJobRequest wait;
  wait.set_name(name);
  wait.set_timeout_s(kCancelSeconds);
  const auto wait_context = connection->NewContext();
  (void)connection->jobs().WaitJob(wait_context.get(), wait, &job);
}

// What is to be said at the end: on standard error when the log file is closed again.
struct LocalResult {
  absl::Status status;
  CliExit exit = CliExit::kOk;
};

LocalResult RunJob(const Invocation& invocation, const LocalOptions& options,
                   const std::string& output, const std::string& data_directory,
                   Cancellation* cancellation, ParsedJobSpec* parsed) {
  absl::StatusOr<std::unique_ptr<LocalService>> service =
      StartLocalService(invocation, options, data_directory, parsed->spec.resources().devices());
  if (!service.ok()) return {service.status(), ExitOf(service.status())};
  EndpointOptions endpoint;
  endpoint.data_directory = data_directory;
  absl::StatusOr<std::unique_ptr<Connection>> connection = Connection::Open(endpoint);
  if (!connection.ok()) return {connection.status(), ExitOf(connection.status())};
  const std::string directory = fs::path(options.file).parent_path().string();
  absl::StatusOr<v1::Job> job = SubmitJob(invocation, directory, NewRequestId(), false,
                                          connection->get(), cancellation, parsed);
  if (!job.ok()) return {job.status(), ExitOf(job.status())};
  const LiveOptions live = {options.logs, invocation.ascii, OutputFormat::kTable};
  absl::Status status = FollowLive(**connection, job->name(), live, cancellation, &*job);
  if (cancellation->cancelled()) {
    CancelAndWait(connection->get(), job->name());
    return {absl::CancelledError("interrupted; the job was cancelled"), CliExit::kInterrupted};
  }
  if (!status.ok()) return {status, ExitOf(status)};
  if (job->state() != v1::JOB_STATE_SUCCEEDED) {
    return {absl::AbortedError(
                absl::StrCat("the job is ", FormatState(job->state()), ": ", job->message())),
            ExitOf(job->state())};
  }
  DownloadOptions download;
  download.job = job->name();
  download.directory = output;
  download.replace = options.replace;
  v1::Checkpoint checkpoint;
  status = DownloadCheckpoint(invocation, download, connection->get(), cancellation, &checkpoint);
  if (!status.ok()) return {status, ExitOf(status)};
  Print(absl::StrCat("\nsucceeded: loss ", FormatNumber(job->progress().loss()), " after ",
                     job->progress().step(), " steps; the adapter is in ", output, "\n"));
  return {};
}

CliExit RunLocal(Invocation* invocation, const LocalOptions& options) {
  absl::StatusOr<ParsedJobSpec> parsed = LoadJobSpec(options.file);
  if (!parsed.ok()) return Fail(parsed.status());
  const std::string output =
      options.output.empty() ? parsed->spec.name() + "-adapter" : options.output;
  // Better now than after training.
  if (!options.replace && !IsEmptyOrMissing(output)) {
    return Fail(absl::AlreadyExistsError(
        absl::StrCat(output, " is not empty; give another -o, or --replace to overwrite it")));
  }
  absl::StatusOr<std::unique_ptr<DataDirectory>> data = DataDirectory::Make(options);
  if (!data.ok()) return Fail(data.status());
  Cancellation cancellation;
  // Before coordinator and agent start their threads.
  Interrupt interrupt([&] { cancellation.Cancel(); });
  LocalResult result;
  {
    std::optional<LogFile> log;
    if (!invocation->verbose) log.emplace((*data)->path + "/attune.log");
    result = RunJob(*invocation, options, output, (*data)->path, &cancellation, &*parsed);
  }
  if (!result.status.ok()) Fail(result.status);
  if (!(*data)->temporary) {
    std::fprintf(stderr, "attune: jobs, checkpoints and logs are in %s\n", (*data)->path.c_str());
  }
  return result.exit;
}

}  // namespace

void AddLocalCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand(
      "local", "Run one job on this machine, with a coordinator and a worker of its own");
  auto options = std::make_shared<LocalOptions>();
  command->add_option("job", options->file, "the job as YAML")->required()->type_name("JOB.yaml");
  command->add_option("-o,--output-dir", options->output, "where the adapter goes [NAME-adapter]")
      ->type_name("DIR");
  command
      ->add_option("--cpu-slots", options->cpu_slots,
                   "CPU devices to share this machine's cores [those of the job]")
      ->check(CLI::Range(1, 256))
      ->type_name("N");
  command
      ->add_option("--root", options->roots,
                   "directory beneath which the job may name paths (repeatable; the job "
                   "file's own is one)")
      ->type_name("DIR");
  command
      ->add_option("--data-dir", options->data_directory,
                   "keep jobs and checkpoints here [a temporary directory]")
      ->type_name("DIR");
  command->add_flag("--keep", options->keep, "keep the temporary directory");
  command->add_flag("--logs", options->logs, "show the trainers' lines too");
  command->add_flag("--replace", options->replace, "overwrite what is in the output directory");
  command->add_flag("-v,--verbose", invocation->verbose,
                    "show what coordinator and agent log, too");
  command->callback([=] { invocation->run = [=] { return RunLocal(invocation, *options); }; });
}

}  // namespace attune
