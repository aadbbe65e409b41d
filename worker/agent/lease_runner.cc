#include "worker/agent/lease_runner.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/log.h"
#include "worker/agent/process_table.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr double kLinesPerSecond = 200;
constexpr double kLineBurst = 1000;
constexpr int64_t kMaxUnacknowledgedBytes = 64 << 20;
// Reports that nobody waits for become durable together.
constexpr absl::Duration kGroupInterval = absl::Milliseconds(50);
constexpr absl::Duration kLeftoverTimeout = absl::Seconds(30);

absl::Status WriteFileDurably(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".new";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  bool good = fd >= 0;
  for (size_t done = 0; good && done < text.size();) {
    const ssize_t n = write(fd, text.data() + done, text.size() - done);
    good = n > 0;
    done += good ? n : 0;
  }
  good = good && fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (good && rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  unlink(temporary.c_str());
  return absl::ResourceExhaustedError(
      absl::StrCat("cannot write ", path, ": ", std::strerror(error)));
}

// Trainers share cores with each other and with what else the host does: a thread that waits for
// others of its team sleeps after about a tenth of a millisecond (libgomp's own measure is some
// milliseconds). The agent's own environment has the last word.
void LimitSpinning(std::vector<std::string>* environment) {
  constexpr absl::string_view kName = "GOMP_SPINCOUNT=";
  for (const std::string& entry : *environment) {
    if (absl::StartsWith(entry, kName)) return;
  }
  environment->push_back(absl::StrCat(kName, 5000));
}

std::string RandomToken() {
  std::random_device random;
  return absl::StrFormat("%08x%08x%08x%08x", random(), random(), random(), random());
}

v1::FailureCause CauseOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnimplemented:
      return v1::FAILURE_CAUSE_INVALID;
    default:
      return v1::FAILURE_CAUSE_STORAGE;
  }
}

bool Groupable(const v1::Report& report) {
  return report.has_log() || report.has_step();
}

}  // namespace

// Runs functions one after the other in a thread of its own; what is queued at the end is run too.
class LeaseRunner::Worker {
 public:
  Worker() : thread_([this] { Run(); }) {}
  ~Worker() {
    Finish();
    thread_.join();
  }
  void Add(std::function<void()> task) {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }
  void Finish() {
    std::lock_guard<std::mutex> lock(mutex_);
    finishing_ = true;
    changed_.notify_all();
  }
  bool finished() const { return finished_; }

 private:
  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return finishing_ || !tasks_.empty(); });
      if (tasks_.empty()) break;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
    finished_ = true;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool finishing_ = false;
  std::atomic<bool> finished_{false};
  std::thread thread_;
};

LeaseRunner::LeaseRunner(const LeaseContext* context, v1::Lease lease, std::string directory,
                         std::unique_ptr<ReportJournal> journal)
    : context_(context),
      directory_(std::move(directory)),
      machine_(std::move(lease)),
      journal_(std::move(journal)),
      handle_(std::make_shared<Handle>(Handle{this})),
      worker_(std::make_unique<Worker>()) {}

absl::StatusOr<std::unique_ptr<LeaseRunner>> LeaseRunner::Take(const LeaseContext* context,
                                                               const v1::Lease& lease,
                                                               const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory + "/work", error);
  if (error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot make ", directory, ": ", error.message()));
  }
  absl::Status status = WriteFileDurably(directory + "/lease", lease.SerializeAsString());
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<ReportJournal>> journal =
      ReportJournal::Open(directory + "/reports");
  if (!journal.ok()) return journal.status();
  std::unique_ptr<LeaseRunner> runner(
      new LeaseRunner(context, lease, directory, *std::move(journal)));
  return runner;
}

absl::StatusOr<std::unique_ptr<LeaseRunner>> LeaseRunner::Recover(const LeaseContext* context,
                                                                  const std::string& directory) {
  std::ifstream in(directory + "/lease", std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  v1::Lease lease;
  if (!in || !lease.ParseFromString(text.str()) || lease.epoch() == 0) {
    return absl::NotFoundError(absl::StrCat(directory, " holds no lease"));
  }
  absl::Status gone;
  for (int rank = 0; rank < std::max(1, lease.devices_size()); ++rank) {
    const absl::StatusOr<ProcessRecord> record =
        ReadProcessRecord(absl::StrCat(directory, "/rank-", rank, ".process"));
    if (record.ok()) gone.Update(KillLeftover(*record, kLeftoverTimeout));
  }
  if (!gone.ok()) return gone;
  absl::StatusOr<std::unique_ptr<ReportJournal>> journal =
      ReportJournal::Open(directory + "/reports");
  if (!journal.ok()) return journal.status();
  std::unique_ptr<LeaseRunner> runner(
      new LeaseRunner(context, lease, directory, *std::move(journal)));
  if (!runner->journal_->ended()) {
    runner->FailByAgent(v1::FAILURE_CAUSE_WORKER_LOST,
                        "the agent ended while the lease was running; it has started again");
  }
  return runner;
}

LeaseRunner::~LeaseRunner() {
  handle_->runner = nullptr;
  cancellation_.Cancel();
  processes_.clear();
  worker_.reset();
  for (const std::string& name : acquired_) context_->cache->Release(name);
}

void LeaseRunner::Refuse(v1::FailureCause cause, const std::string& message) {
  Do(machine_.OnAgentFailure(cause, message));
}

void LeaseRunner::FailByAgent(v1::FailureCause cause, const std::string& message) {
  Do(machine_.OnAgentFailure(cause, message));
}

void LeaseRunner::Prepare() {
  worker_->Add([this, handle = handle_] {
    // The runner joins this thread before it goes.
    auto sources = std::make_shared<absl::StatusOr<Sources>>(FetchSources());
    context_->post([handle, sources] {
      if (handle->runner != nullptr) handle->runner->OnPrepared(std::move(*sources));
    });
  });
}

absl::StatusOr<LeaseRunner::Sources> LeaseRunner::FetchSources() {
  const v1::Lease& lease = machine_.lease();
  Sources sources;
  absl::StatusOr<std::string> model = FetchSource(lease.spec().model().source(), true);
  if (!model.ok()) {
    return absl::Status(model.status().code(),
                        absl::StrCat("model.source: ", model.status().message()));
  }
  sources.model_directory = *model;
  const auto fetch_all = [&](const auto& datasets, absl::string_view field,
                             std::vector<std::string>* files) -> absl::Status {
    for (int i = 0; i < datasets.size(); ++i) {
      absl::StatusOr<std::string> file = FetchSource(datasets[i].source(), false);
      if (!file.ok()) {
        return absl::Status(file.status().code(),
                            absl::StrCat(field, "[", i, "].source: ", file.status().message()));
      }
      files->push_back(*file);
    }
    return absl::OkStatus();
  };
  absl::Status status = fetch_all(lease.spec().datasets(), "datasets", &sources.dataset_files);
  if (!status.ok()) return status;
  status = fetch_all(lease.spec().evaluation().datasets(), "evaluation.datasets",
                     &sources.evaluation_files);
  if (!status.ok()) return status;
  if (lease.spec().lora().has_init_from()) {
    absl::StatusOr<std::string> adapter = FetchSource(lease.spec().lora().init_from(), true);
    if (!adapter.ok()) {
      return absl::Status(adapter.status().code(),
                          absl::StrCat("lora.init_from: ", adapter.status().message()));
    }
    sources.adapter_directory = *adapter;
  }
  if (!lease.checkpoint_artifact().empty()) {
    v1::Source checkpoint;
    checkpoint.set_artifact(lease.checkpoint_artifact());
    absl::StatusOr<std::string> directory = FetchSource(checkpoint, true);
    if (!directory.ok()) {
      // The user's spec is right all the same: a checkpoint that is gone is the store's fault.
      return absl::InternalError(
          absl::StrCat("the checkpoint to resume from: ", directory.status().message()));
    }
    sources.checkpoint_directory = *directory;
  }
  return sources;
}

absl::StatusOr<std::string> LeaseRunner::FetchSource(const v1::Source& source, bool directory) {
  if (cancellation_.cancelled()) return absl::CancelledError("the lease was stopped");
  std::string path;
  if (source.source_case() == v1::Source::kPath) {
    absl::StatusOr<std::string> resolved = context_->roots->Resolve(source.path());
    if (!resolved.ok()) return resolved.status();
    path = *resolved;
  } else if (source.source_case() == v1::Source::kArtifact) {
    absl::StatusOr<std::string> fetched =
        context_->cache->Acquire(source.artifact(), &cancellation_);
    if (!fetched.ok()) return fetched.status();
    acquired_.push_back(source.artifact());
    path = *fetched;
    if (!directory) {
      absl::StatusOr<std::vector<LocalFile>> files = ListFiles(path);
      if (!files.ok()) return files.status();
      if (files->size() != 1) {
        return absl::InvalidArgumentError(absl::StrCat(source.artifact(), " has ", files->size(),
                                                       " files; a dataset is one JSONL file"));
      }
      return files->front().local;
    }
  } else {
    return absl::InvalidArgumentError("names neither `path` nor `artifact`");
  }
  std::error_code error;
  if (fs::is_directory(path, error) != directory) {
    return absl::InvalidArgumentError(
        absl::StrCat(source.path(), directory ? " is a file; a model or an adapter is a directory"
                                              : " is a directory; a "
                                                "dataset is a file"));
  }
  return path;
}

void LeaseRunner::OnPrepared(absl::StatusOr<Sources> sources) {
  if (!machine_.preparing()) return;
  if (!sources.ok()) {
    Do(machine_.OnPrepareFailed(CauseOf(sources.status()),
                                std::string(sources.status().message())));
    return;
  }
  sources_ = std::make_unique<Sources>(*std::move(sources));
  StartIfReady();
}

void LeaseRunner::StartIfReady() {
  if (!machine_.preparing()) return;
  if (sources_ == nullptr) {
    if (!prepare_begun_) Prepare();
    prepare_begun_ = true;
    return;
  }
  if (!context_->devices_ready(lease().epoch())) return;
  const absl::Status status = StartTrainers();
  if (!status.ok()) {
    processes_.clear();
    Do(machine_.OnPrepareFailed(v1::FAILURE_CAUSE_TRAINER_CRASH, std::string(status.message())));
    return;
  }
  Do(machine_.OnStarted(absl::Now()));
}

absl::Status LeaseRunner::StartTrainers() {
  for (int rank = 0; rank < machine_.trainers(); ++rank) {
    if (absl::Status s = StartTrainer(rank); !s.ok()) return s;
  }
  return absl::OkStatus();
}

v1::TrainerAssignment LeaseRunner::AssignmentOf(int rank) const {
  const v1::Lease& lease = machine_.lease();
  v1::TrainerAssignment assignment;
  assignment.set_kind(lease.kind());
  assignment.set_job(lease.job());
  assignment.set_attempt(lease.attempt());
  *assignment.mutable_spec() = lease.spec();
  assignment.set_model_directory(sources_->model_directory);
  for (const std::string& file : sources_->dataset_files) assignment.add_dataset_files(file);
  for (const std::string& file : sources_->evaluation_files) assignment.add_evaluation_files(file);
  assignment.set_rank(lease.first_rank() + rank);
  assignment.set_world_size(std::max(1, lease.world_size()));
  assignment.set_work_directory(directory_ + "/work");
  assignment.set_checkpoint_directory(sources_->checkpoint_directory);
  assignment.set_adapter_directory(sources_->adapter_directory);
  assignment.set_digest_cache(context_->digest_cache);
  if (machine_.trainers() < lease.world_size()) {
    assignment.set_bind_address(context_->bind_address);
  }
  const v1::DeviceType wanted = lease.spec().resources().device_type();
  for (const v1::Device& device : context_->devices) {
    const bool mine = rank < lease.devices_size()
                          ? device.id() == lease.devices(rank)
                          // Validation holds no device: it is told of one like those it will get.
                          : wanted == v1::DEVICE_TYPE_UNSPECIFIED ||
                                wanted == v1::DEVICE_TYPE_ANY || wanted == device.type();
    if (!mine) continue;
    *assignment.mutable_device() = device;
    break;
  }
  return assignment;
}

// A trainer sees the GPU of its assignment, and no other.
void LeaseRunner::AddGpu(const v1::TrainerAssignment& assignment,
                         std::vector<std::string>* environment) const {
  std::erase_if(*environment, [](const std::string& entry) {
    return absl::StartsWith(entry, "CUDA_VISIBLE_DEVICES=");
  });
  environment->push_back(absl::StrCat("CUDA_VISIBLE_DEVICES=", assignment.device().uuid()));
  // NCCL takes several ranks on one GPU for a mistake, unless they seem to be of several hosts.
  if (context_->gpus_are_shared) {
    environment->push_back(absl::StrCat("NCCL_HOSTID=rank", assignment.rank()));
  }
}

absl::Status LeaseRunner::StartTrainer(int rank) {
  const v1::TrainerAssignment assignment = AssignmentOf(rank);
  TrainerProcessOptions options;
  options.program = context_->trainer_program;
  options.assignment_file = absl::StrCat(directory_, "/rank-", rank, ".assignment");
  options.working_directory = directory_ + "/work";
  options.record_file = absl::StrCat(directory_, "/rank-", rank, ".process");
  options.token = RandomToken();
  options.environment = context_->environment;
  options.environment.push_back(
      absl::StrCat("OMP_NUM_THREADS=", std::max(1, assignment.device().threads())));
  LimitSpinning(&options.environment);
  AddGpu(assignment, &options.environment);
  absl::Status status = WriteFileDurably(options.assignment_file, assignment.SerializeAsString());
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<TrainerProcess>> process =
      TrainerProcess::Start(options, EventsOf(rank));
  if (!process.ok()) return process.status();
  processes_.push_back(*std::move(process));
  return absl::OkStatus();
}

TrainerProcessEvents LeaseRunner::EventsOf(int rank) {
  // `f` runs in the loop, if the runner is still there.
  const auto post = [context = context_, handle = handle_](std::function<void(LeaseRunner*)> f) {
    context->post([handle, f = std::move(f)] {
      if (handle->runner != nullptr) f(handle->runner);
    });
  };
  TrainerProcessEvents events;
  auto log_limiter = std::make_shared<LogLimiter>(kLinesPerSecond, kLineBurst);
  events.message = [post, rank, log_limiter](v1::TrainerToAgent message) {
    const absl::Time now = absl::Now();
    if (message.has_log()) {
      if (!log_limiter->Admit(now)) return;
      message.mutable_log()->set_text(ToLogLine(message.log().text()));
    }
    post([rank, now, message = std::move(message)](LeaseRunner* runner) {
      runner->Do(runner->machine_.OnMessage(rank, message, now));
    });
  };
  auto limiter = std::make_shared<LogLimiter>(kLinesPerSecond, kLineBurst);
  const auto line = [post, rank](bool is_stderr, std::string text) {
    post([rank, is_stderr, text = std::move(text), now = absl::Now()](LeaseRunner* runner) {
      runner->Do(runner->machine_.OnLine(rank, is_stderr, text, now));
    });
  };
  events.line = [line, limiter](bool is_stderr, std::string text) {
    const absl::Time now = absl::Now();
    if (const int64_t dropped = limiter->TakeDropped(now); dropped > 0) {
      line(true,
           absl::StrCat(dropped, " lines were dropped: more than ", kLinesPerSecond, " a second"));
    }
    if (limiter->Admit(now)) line(is_stderr, std::move(text));
  };
  events.exited = [post, line, limiter, rank](TrainerExit exit) {
    if (const int64_t dropped = limiter->TakeDropped(absl::InfiniteFuture()); dropped > 0) {
      line(true,
           absl::StrCat(dropped, " lines were dropped: more than ", kLinesPerSecond, " a second"));
    }
    post([rank, exit = std::move(exit), now = absl::Now()](LeaseRunner* runner) {
      runner->Do(runner->machine_.OnExit(rank, exit, now));
    });
  };
  return events;
}

void LeaseRunner::Upload(const v1::CheckpointWritten& checkpoint) {
  worker_->Add([this, handle = handle_, directory = checkpoint.directory()] {
    TransferOptions options;
    options.cancellation = &cancellation_;
    options.patience = absl::InfiniteDuration();
    absl::StatusOr<v1::Artifact> artifact = absl::CancelledError("the lease was stopped");
    absl::StatusOr<std::vector<LocalFile>> files = ListFiles(directory);
    if (!files.ok()) {
      artifact = files.status();
    } else if (!cancellation_.cancelled()) {
      artifact =
          ArtifactClient(context_->find).Upload(v1::ARTIFACT_KIND_CHECKPOINT, *files, options);
    }
    int64_t bytes = 0;
    if (artifact.ok()) {
      for (const v1::ArtifactFile& file : artifact->files()) bytes += file.bytes();
    }
    context_->post([handle, artifact = std::move(artifact), bytes] {
      LeaseRunner* runner = handle->runner;
      if (runner == nullptr) return;
      runner->Do(artifact.ok() ? runner->machine_.OnStored(artifact->name(), bytes)
                               : runner->machine_.OnStoreFailed(artifact.status()));
    });
  });
}

void LeaseRunner::Do(LeaseMachine::Actions actions) {
  for (LeaseAction& action : actions) {
    switch (action.kind) {
      case LeaseAction::Kind::kReport:
        Journal(std::move(action.report));
        break;
      case LeaseAction::Kind::kKill:
        for (const auto& process : processes_) process->Kill();
        break;
      case LeaseAction::Kind::kAbandonUploads:
        cancellation_.Cancel();
        break;
      case LeaseAction::Kind::kSendToRank:
        if (absl::Status s = processes_[action.rank]->Send(action.to_trainer); !s.ok()) {
          LOG(WARNING) << lease().job() << " rank " << action.rank << ": " << s;
        }
        break;
      case LeaseAction::Kind::kUpload:
        Upload(action.checkpoint);
        break;
      case LeaseAction::Kind::kRendezvousSet: {
        v1::WorkerMessage message;
        *message.mutable_rendezvous_set() = std::move(action.rendezvous_set);
        context_->send(std::move(message));
        break;
      }
      case LeaseAction::Kind::kRendezvousGet: {
        v1::WorkerMessage message;
        *message.mutable_rendezvous_get() = std::move(action.rendezvous_get);
        context_->send(std::move(message));
        break;
      }
    }
  }
}

void LeaseRunner::Journal(v1::Report report) {
  if (report.has_log() && journal_->unacknowledged_bytes() > kMaxUnacknowledgedBytes) {
    ++dropped_lines_;
    return;
  }
  absl::Status status = journal_->Append(&report);
  // What is durable may be sent: do not let the end, or a checkpoint, wait for the next tick.
  if (status.ok() && !Groupable(report)) status = journal_->Sync();
  if (status.ok()) return;
  LOG(ERROR) << lease().job() << ": " << status;
  if (report.has_ended() || machine_.ended()) {
    if (report.sequence() != journal_->last_sequence()) journal_->AppendVolatile(&report);
    journal_->GiveUpDurability();
    return;
  }
  FailByAgent(v1::FAILURE_CAUSE_STORAGE, std::string(status.message()));
}

void LeaseRunner::Stop(v1::StopMode mode) {
  Do(machine_.OnStop(mode));
}

void LeaseRunner::OnRendezvousValue(const v1::RendezvousValue& value) {
  Do(machine_.OnRendezvousValue(value));
}

void LeaseRunner::OnReconnected() {
  Do(machine_.OnReconnected());
}

void LeaseRunner::OnTick(absl::Time now) {
  Do(machine_.OnTick(now));
  if (dropped_lines_ > 0 && journal_->unacknowledged_bytes() < kMaxUnacknowledgedBytes / 2) {
    const int64_t dropped = dropped_lines_;
    dropped_lines_ = 0;
    Do(machine_.OnLine(-1, true,
                       absl::StrCat(dropped,
                                    " log lines were dropped while the coordinator was "
                                    "away"),
                       now));
  }
  if (!journal_->dirty() || now - last_sync_ < kGroupInterval) return;
  last_sync_ = now;
  if (absl::Status s = journal_->Sync(); !s.ok() && !machine_.ended()) {
    FailByAgent(v1::FAILURE_CAUSE_STORAGE, std::string(s.message()));
  }
}

void LeaseRunner::Forget() {
  cancellation_.Cancel();
  worker_->Add([directory = directory_] {
    std::error_code error;
    fs::remove_all(directory, error);
    if (error) LOG(WARNING) << "cannot remove " << directory << ": " << error.message();
  });
  worker_->Finish();
}

bool LeaseRunner::finished() const {
  return worker_->finished();
}

}  // namespace attune
