#include "worker/agent/agent.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/log.h"
#include "worker/agent/devices.h"

#ifndef ATTUNE_VERSION
#define ATTUNE_VERSION "unknown"
#endif

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr absl::Duration kTick = absl::Milliseconds(20);
constexpr absl::Duration kGpuInterval = absl::Seconds(1);
// Reports of one lease that are on the way at once.
constexpr int64_t kReportWindow = 1024;
// Reports that were sent and not acknowledged for so long are sent again.
constexpr absl::Duration kAckTimeout = absl::Seconds(10);
constexpr absl::Duration kStopPatience = absl::Seconds(5);

std::string NewWorkerId() {
  std::random_device random;
  return absl::StrFormat("%08x%08x", random(), random());
}

absl::StatusOr<std::string> KeptWorkerId(const std::string& path) {
  std::ifstream in(path);
  std::string id;
  if (in >> id) return id;
  id = NewWorkerId();
  const std::string temporary = path + ".new";
  std::ofstream out(temporary);
  out << id << "\n";
  out.close();
  if (!out || rename(temporary.c_str(), path.c_str()) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
  }
  return id;
}

}  // namespace

std::vector<std::string> CleanEnvironment(const char* const* environment) {
  static constexpr const char* kNames[] = {
      "PATH", "HOME", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD"};
  static constexpr const char* kPrefixes[] = {
      "LC_",   "CUDA_",        "NVIDIA_", "NCCL_", "GLOO_",  "OMP_", "GOMP_",
      "DNNL_", "ATTUNE_CUDA_", "ONEDNN_", "ASAN_", "UBSAN_", "TSAN_"};
  std::vector<std::string> kept;
  for (; *environment != nullptr; ++environment) {
    const absl::string_view entry(*environment);
    const absl::string_view name = entry.substr(0, entry.find('='));
    bool keep = false;
    for (const char* known : kNames) keep = keep || name == known;
    for (const char* prefix : kPrefixes) keep = keep || absl::StartsWith(name, prefix);
    // That one follows from the device.
    if (keep && name != "OMP_NUM_THREADS") kept.emplace_back(entry);
  }
  return kept;
}

void AddLibraryDirectory(const std::string& directory, std::vector<std::string>* environment) {
  constexpr absl::string_view kName = "ATTUNE_CUDA_LIBRARY_DIRS=";
  for (std::string& entry : *environment) {
    if (absl::StartsWith(entry, kName)) {
      absl::StrAppend(&entry, ":", directory);
      return;
    }
  }
  environment->push_back(absl::StrCat(kName, directory));
}

absl::StatusOr<std::unique_ptr<Agent>> Agent::Start(AgentOptions options) {
  std::unique_ptr<Agent> agent(new Agent(std::move(options)));
  if (absl::Status s = agent->Open(); !s.ok()) return s;
  agent->StartThreads();
  return agent;
}

Agent::Agent(AgentOptions options) : options_(std::move(options)) {}

absl::Status Agent::Open() {
  std::error_code error;
  fs::create_directories(options_.state_directory + "/leases", error);
  if (error) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot make ", options_.state_directory, ": ", error.message()));
  }
  const std::string state = fs::canonical(options_.state_directory, error).string();
  const std::string lock = state + "/lock";
  lock_fd_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_fd_ < 0 || flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("another agent uses ", state, " (", std::strerror(errno),
                     "). Stop it, or give this one another --state-dir."));
  }
  if (access(options_.trainer_program.c_str(), X_OK) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the trainer ", options_.trainer_program, " cannot be run: ", std::strerror(errno),
        ". Install attune-trainer beside this program, or give "
        "--trainer."));
  }
  absl::StatusOr<SourceRoots> roots = SourceRoots::Open(options_.roots);
  if (!roots.ok()) return roots.status();
  roots_ = std::make_unique<SourceRoots>(*std::move(roots));
  absl::StatusOr<std::string> id = KeptWorkerId(state + "/id");
  if (!id.ok()) return id.status();
  name_ = absl::StrCat("workers/", *id);

  context_.roots = roots_.get();
  context_.find = [coordinator = options_.coordinator] { return FindCoordinator(coordinator); };
  cache_ = std::make_unique<ArtifactCache>(state + "/cache", options_.cache_bytes, context_.find);
  context_.cache = cache_.get();
  absl::StatusOr<std::vector<v1::Device>> devices = FindDevices(options_.devices, &gpus_);
  if (!devices.ok()) return devices.status();
  context_.devices = *std::move(devices);
  context_.gpus_are_shared = options_.devices.trainers_per_gpu > 1;
  if (gpus_ != nullptr) statuses_ = gpus_->Read();
  context_.trainer_program = options_.trainer_program;
  context_.environment = options_.environment;
  context_.bind_address = options_.bind_address;
  context_.digest_cache =
      options_.digest_cache.empty() ? state + "/digests.json" : options_.digest_cache;
  context_.post = [this](std::function<void()> f) { Post(std::move(f)); };
  context_.send = [this](v1::WorkerMessage message) {
    if (stream_ != 0 && session_ != nullptr) session_->Send(stream_, std::move(message));
  };
  context_.devices_ready = [this](int64_t epoch) { return fence_->Ready(epoch); };
  std::vector<std::string> ids;
  for (const v1::Device& device : context_.devices) ids.push_back(device.id());
  fence_ = std::make_unique<DeviceFence>(ids);
  return Recover();
}

absl::Status Agent::Recover() {
  std::error_code error;
  const std::string leases = fs::canonical(options_.state_directory, error).string() + "/leases";
  std::vector<std::string> directories;
  for (fs::directory_iterator it(leases, error), end; !error && it != end; it.increment(error)) {
    directories.push_back(it->path().string());
  }
  for (const std::string& directory : directories) {
    absl::StatusOr<std::unique_ptr<LeaseRunner>> runner =
        LeaseRunner::Recover(&context_, directory);
    if (absl::IsNotFound(runner.status())) {
      // The agent died before the lease was on disk: nothing was started.
      fs::remove_all(directory, error);
      continue;
    }
    if (!runner.ok()) return runner.status();
    LOG(INFO) << (*runner)->lease().job() << ": the lease of an agent that ended";
    Hold(*std::move(runner));
  }
  return absl::OkStatus();
}

void Agent::StartThreads() {
  loop_ = std::thread([this] { Loop(); });
  if (gpus_ != nullptr) gpu_watcher_ = std::thread([this] { WatchGpus(); });
  SessionEvents events;
  events.make_register = [this] {
    v1::Register message;
    Call([&] { message = MakeRegister(); });
    return message;
  };
  events.heartbeat = [this] {
    v1::Heartbeat message;
    std::lock_guard<std::mutex> lock(mutex_);
    *message.mutable_statuses() = {statuses_.begin(), statuses_.end()};
    return message;
  };
  events.registered = [this](int64_t stream, const v1::Registered& registered) {
    Post([this, stream, registered] { OnRegistered(stream, registered); });
  };
  events.message = [this](int64_t stream, v1::CoordinatorMessage message) {
    Post([this, stream, message = std::move(message)] { OnMessage(stream, message); });
  };
  events.disconnected = [this](int64_t stream, const absl::Status&) {
    Post([this, stream] {
      if (stream_ == stream) stream_ = 0;
    });
  };
  // Posted, because the loop may use it at once.
  auto session = std::make_unique<Session>(context_.find, std::move(events));
  Call([&] { session_ = std::move(session); });
}

Agent::~Agent() {
  if (loop_.joinable()) {
    Call([this] {
      for (auto& [epoch, held] : held_) {
        if (!held.runner->ended()) {
          held.runner->FailByAgent(v1::FAILURE_CAUSE_WORKER_LOST, "the worker was shut down");
        }
      }
    });
    const absl::Time deadline = absl::Now() + kStopPatience;
    for (bool waiting = true; waiting && absl::Now() < deadline; absl::SleepFor(kTick)) {
      Call([&] {
        waiting = false;
        for (const auto& [epoch, held] : held_) {
          // What cannot be delivered now waits on disk for the next agent.
          waiting = waiting || !held.runner->ended() || stream_ != 0;
        }
      });
    }
    std::unique_ptr<Session> session;
    Call([&] {
      session = std::move(session_);
      stream_ = 0;
    });
    session.reset();  // Not in the loop: the session waits for the loop.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    gpu_watcher_stopped_.notify_all();
    loop_.join();
    if (gpu_watcher_.joinable()) gpu_watcher_.join();
  }
  held_.clear();
  retired_.clear();
  if (lock_fd_ >= 0) close(lock_fd_);
}

bool Agent::connected() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return connected_;
}

void Agent::Post(std::function<void()> function) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    posted_.push_back(std::move(function));
  }
  changed_.notify_one();
}

void Agent::Call(const std::function<void()>& function) {
  std::mutex mutex;
  std::condition_variable finished_changed;
  bool finished = false;
  Post([&] {
    function();
    std::lock_guard<std::mutex> lock(mutex);
    finished = true;
    finished_changed.notify_all();
  });
  std::unique_lock<std::mutex> lock(mutex);
  finished_changed.wait(lock, [&] { return finished; });
}

void Agent::Loop() {
  const auto tick = absl::ToChronoNanoseconds(kTick);
  auto next_tick = std::chrono::steady_clock::now() + tick;
  for (;;) {
    std::deque<std::function<void()>> functions;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_until(lock, next_tick, [this] { return stopping_ || !posted_.empty(); });
      if (stopping_ && posted_.empty()) break;
      functions.swap(posted_);
      connected_ = stream_ != 0;
    }
    for (const auto& function : functions) function();
    const absl::Time now = absl::Now();
    if (std::chrono::steady_clock::now() >= next_tick) {
      next_tick = std::chrono::steady_clock::now() + tick;
      for (auto& [epoch, held] : held_) held.runner->OnTick(now);
    }
    Advance(now);
  }
  // Here, because trainers must not outlive the thread that started them.
  held_.clear();
  retired_.clear();
}

// A thread of its own: a GPU that hangs must hold up neither leases nor heartbeats.
void Agent::WatchGpus() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto interval = absl::ToChronoNanoseconds(kGpuInterval);
    if (gpu_watcher_stopped_.wait_for(lock, interval, [this] { return stopping_; })) return;
    lock.unlock();
    std::vector<v1::DeviceStatus> statuses = gpus_->Read();
    lock.lock();
    statuses_ = std::move(statuses);
  }
}

v1::Register Agent::MakeRegister() {
  v1::Register message;
  message.set_worker(name_);
  char hostname[256] = "";
  gethostname(hostname, sizeof(hostname) - 1);
  message.set_hostname(hostname);
  message.set_version(ATTUNE_VERSION);
  for (const v1::Device& device : context_.devices) *message.add_devices() = device;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    *message.mutable_statuses() = {statuses_.begin(), statuses_.end()};
  }
  // Also those whose processes are gone, until their end is acknowledged: what they reported is
  // still to come.
  for (const auto& [epoch, held] : held_) {
    v1::HeldLease* lease = message.add_held();
    lease->set_epoch(epoch);
    lease->set_job(held.runner->lease().job());
    *lease->mutable_devices() = held.runner->lease().devices();
  }
  return message;
}

void Agent::OnRegistered(int64_t stream, const v1::Registered& registered) {
  stream_ = stream;
  for (auto& [epoch, held] : held_) {
    held.sent = held.runner->journal().acknowledged();
    held.last_ack = absl::Now();
    held.runner->OnReconnected();
  }
  for (const int64_t epoch : registered.release()) {
    if (LeaseRunner* runner = Find(epoch)) runner->Stop(v1::STOP_MODE_KILL);
  }
}

void Agent::OnMessage(int64_t stream, const v1::CoordinatorMessage& message) {
  if (stream != stream_) return;
  switch (message.message_case()) {
    case v1::CoordinatorMessage::kLease:
      OnLease(message.lease());
      break;
    case v1::CoordinatorMessage::kStop:
      if (LeaseRunner* runner = Find(message.stop().epoch())) {
        LOG(INFO) << runner->lease().job() << ": stop, "
                  << v1::StopMode_Name(message.stop().mode());
        runner->Stop(message.stop().mode());
      }
      break;
    case v1::CoordinatorMessage::kReportAck:
      OnAck(message.report_ack());
      break;
    case v1::CoordinatorMessage::kRendezvousValue:
      if (LeaseRunner* runner = Find(message.rendezvous_value().epoch())) {
        runner->OnRendezvousValue(message.rendezvous_value());
      }
      break;
    case v1::CoordinatorMessage::kStale:
      OnStale(message.stale().epoch());
      break;
    case v1::CoordinatorMessage::kRegistered:
    case v1::CoordinatorMessage::MESSAGE_NOT_SET:
      break;
  }
}

void Agent::OnLease(const v1::Lease& lease) {
  if (Find(lease.epoch()) != nullptr) return;  // Sent again over a new stream.
  LOG(INFO) << lease.job() << " attempt " << lease.attempt() << ": lease " << lease.epoch() << ", "
            << v1::LeaseKind_Name(lease.kind()) << ", " << lease.devices_size() << " devices";
  std::error_code error;
  const std::string directory = absl::StrCat(
      fs::canonical(options_.state_directory, error).string(), "/leases/", lease.epoch());
  absl::StatusOr<std::unique_ptr<LeaseRunner>> taken =
      LeaseRunner::Take(&context_, lease, directory);
  if (!taken.ok()) {
    // Without a journal nothing can be promised: say so once, for this stream.
    LOG(ERROR) << lease.job() << ": " << taken.status();
    v1::WorkerMessage message;
    v1::Report* report = message.mutable_report();
    report->set_epoch(lease.epoch());
    report->set_sequence(1);
    report->mutable_ended()->set_outcome(v1::LEASE_OUTCOME_FAILED);
    report->mutable_ended()->set_cause(v1::FAILURE_CAUSE_STORAGE);
    report->mutable_ended()->set_message(std::string(taken.status().message()));
    context_.send(std::move(message));
    return;
  }
  LeaseRunner* runner = taken->get();
  Hold(*std::move(taken));
  std::vector<int64_t> older;
  const std::vector<std::string> devices(lease.devices().begin(), lease.devices().end());
  switch (fence_->Claim(lease.epoch(), devices, &older)) {
    case DeviceFence::Verdict::kUnknownDevice:
      runner->Refuse(v1::FAILURE_CAUSE_WORKER_LOST, "a device of the lease is not offered here");
      return;
    case DeviceFence::Verdict::kStale:
      runner->Stop(v1::STOP_MODE_KILL);
      return;
    case DeviceFence::Verdict::kClaimed:
      break;
  }
  for (const int64_t epoch : older) {
    if (LeaseRunner* old = Find(epoch)) old->Stop(v1::STOP_MODE_KILL);
  }
  runner->StartIfReady();
}

void Agent::Hold(std::unique_ptr<LeaseRunner> runner) {
  const int64_t epoch = runner->lease().epoch();
  held_[epoch] = {std::move(runner), 0, absl::Now()};
}

LeaseRunner* Agent::Find(int64_t epoch) {
  const auto found = held_.find(epoch);
  return found == held_.end() ? nullptr : found->second.runner.get();
}

void Agent::OnAck(const v1::ReportAck& ack) {
  const auto found = held_.find(ack.epoch());
  if (found == held_.end()) return;
  ReportJournal& journal = found->second.runner->journal();
  journal.Acknowledge(std::min(ack.sequence(), journal.last_sequence()));
  found->second.last_ack = absl::Now();
  if (found->second.runner->ended() && journal.all_acknowledged()) Forget(ack.epoch());
}

void Agent::OnStale(int64_t epoch) {
  LeaseRunner* runner = Find(epoch);
  if (runner == nullptr) return;
  if (runner->ended()) {
    Forget(epoch);
    return;
  }
  LOG(WARNING) << runner->lease().job() << ": lease " << epoch
               << " is no longer ours: killing its trainers";
  runner->Stop(v1::STOP_MODE_KILL);
}

void Agent::Forget(int64_t epoch) {
  const auto found = held_.find(epoch);
  found->second.runner->Forget();
  retired_.push_back(std::move(found->second.runner));
  held_.erase(found);
}

void Agent::Advance(absl::Time now) {
  for (auto& [epoch, held] : held_) {
    if (held.runner->ended()) fence_->Release(epoch);
  }
  for (auto& [epoch, held] : held_) held.runner->StartIfReady();
  for (auto& [epoch, held] : held_) SendReports(now, &held);
  retired_.erase(std::remove_if(retired_.begin(), retired_.end(),
                                [](const auto& runner) { return runner->finished(); }),
                 retired_.end());
}

void Agent::SendReports(absl::Time now, Held* held) {
  if (stream_ == 0 || session_ == nullptr) return;
  ReportJournal& journal = held->runner->journal();
  const int64_t acknowledged = journal.acknowledged();
  if (held->sent <= acknowledged) {
    held->sent = acknowledged;
    held->last_ack = now;
  } else if (now - held->last_ack > kAckTimeout) {
    held->sent = acknowledged;
    held->last_ack = now;
  }
  while (held->sent - acknowledged < kReportWindow) {
    const v1::Report* report = journal.NextAfter(held->sent);
    if (report == nullptr) return;
    v1::WorkerMessage message;
    *message.mutable_report() = *report;
    session_->Send(stream_, std::move(message));
    held->sent = report->sequence();
  }
}

}  // namespace attune
