#include "worker/agent/session.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/log.h"

namespace attune {
namespace {

constexpr absl::Duration kFirstWait = absl::Milliseconds(100);
constexpr absl::Duration kLongestWait = absl::Seconds(2);
// A coordinator that takes the stream and says nothing is as good as none.
constexpr absl::Duration kRegisterTimeout = absl::Seconds(20);

}  // namespace

Session::Session(ArtifactClient::Find find, SessionEvents events)
    : find_(std::move(find)), events_(std::move(events)), thread_([this] { Run(); }) {}

Session::~Session() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  cancellation_.Cancel();
  thread_.join();
}

void Session::Send(int64_t stream, v1::WorkerMessage message) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!open_ || stream != number_) return;
    outgoing_.push_back(std::move(message));
  }
  changed_.notify_all();
}

bool Session::Wait(absl::Duration time) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, absl::ToChronoNanoseconds(time), [this] { return stopping_; });
  return stopping_;
}

void Session::Run() {
  std::mt19937 random(std::random_device{}());
  absl::Duration wait = kFirstWait;
  std::string last_reason;
  for (;;) {
    bool registered = false;
    const absl::Status status = RunStream(&registered);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
    }
    if (registered) wait = kFirstWait;
    const std::string reason(status.message());
    if (registered || reason != last_reason) {
      LOG(WARNING) << "no session with the coordinator: " << status << "; trying again";
    }
    last_reason = reason;
    const double jitter = std::uniform_real_distribution<double>(0.75, 1.25)(random);
    if (Wait(wait * jitter)) return;
    wait = std::min(wait * 2, kLongestWait);
  }
}

absl::Status Session::Register(Stream* stream, v1::Registered* registered) {
  v1::WorkerMessage hello;
  *hello.mutable_register_() = events_.make_register();
  v1::CoordinatorMessage answer;
  if (!stream->Write(hello) || !stream->Read(&answer)) {
    return absl::UnavailableError("the coordinator ended the stream");
  }
  if (!answer.has_registered()) {
    return absl::InternalError("the coordinator's first message is not `registered`");
  }
  *registered = answer.registered();
  return absl::OkStatus();
}

absl::Status Session::RunStream(bool* was_registered) {
  absl::StatusOr<CoordinatorEndpoint> endpoint = find_();
  if (!endpoint.ok()) return endpoint.status();
  std::shared_ptr<grpc::Channel> channel = NewCoordinatorChannel(endpoint->address);
  auto stub = v1::WorkerService::NewStub(channel);
  grpc::ClientContext context;
  AddToken(endpoint->token, &context);
  CancellableCall call(&cancellation_, &context);
  auto stream = stub->Session(&context);
  v1::Registered registered;
  absl::Status status;
  {
    // The watchdog ends a registration that hangs; after it the stream may be silent for long.
    std::mutex mutex;
    std::condition_variable done_changed;
    bool done = false;
    std::thread watchdog([&] {
      std::unique_lock<std::mutex> lock(mutex);
      const auto limit = absl::ToChronoNanoseconds(kRegisterTimeout);
      if (!done_changed.wait_for(lock, limit, [&] { return done; })) context.TryCancel();
    });
    status = Register(stream.get(), &registered);
    {
      std::lock_guard<std::mutex> lock(mutex);
      done = true;
    }
    done_changed.notify_all();
    watchdog.join();
  }
  if (status.ok()) {
    *was_registered = true;
    int64_t number;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      number = ++number_;
      open_ = true;
      outgoing_.clear();
    }
    LOG(INFO) << "registered with the coordinator at " << endpoint->address;
    events_.registered(number, registered);
    std::thread writer([&] { Write(stream.get(), registered.heartbeat_interval_s()); });
    v1::CoordinatorMessage message;
    while (stream->Read(&message)) events_.message(number, std::move(message));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    changed_.notify_all();
    context.TryCancel();
    writer.join();
  } else {
    context.TryCancel();
  }
  const grpc::Status finished = stream->Finish();
  if (status.ok() || finished.error_code() != grpc::StatusCode::CANCELLED) {
    status = finished.ok() ? absl::UnavailableError("the coordinator ended the stream")
                           : FromGrpc(finished);
  }
  if (*was_registered) events_.disconnected(number_, status);
  return status;
}

void Session::Write(Stream* stream, double heartbeat_interval_s) {
  const auto interval = std::chrono::duration<double>(std::max(0.05, heartbeat_interval_s));
  auto next_heartbeat = std::chrono::steady_clock::now() + interval;
  std::unique_lock<std::mutex> lock(mutex_);
  while (open_ && !stopping_) {
    v1::WorkerMessage message;
    if (!outgoing_.empty()) {
      message = std::move(outgoing_.front());
      outgoing_.pop_front();
    }
    if (std::chrono::steady_clock::now() >= next_heartbeat) {
      // Also when there is always something to send: reports of a busy lease are no sign that
      // the agent's own clock runs, but a write is.
      if (message.message_case() != v1::WorkerMessage::MESSAGE_NOT_SET) {
        outgoing_.push_front(std::move(message));
        message.Clear();
      }
      *message.mutable_heartbeat() = events_.heartbeat();
      next_heartbeat = std::chrono::steady_clock::now() + interval;
    }
    if (message.message_case() == v1::WorkerMessage::MESSAGE_NOT_SET) {
      changed_.wait_until(lock, next_heartbeat,
                          [this] { return !open_ || stopping_ || !outgoing_.empty(); });
      continue;
    }
    lock.unlock();
    const bool written = stream->Write(message);
    lock.lock();
    if (!written) return;  // The reader notices too.
  }
}

}  // namespace attune
