#include "client/lib/follow.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace attune {
namespace {

constexpr absl::Duration kFirstWait = absl::Milliseconds(100);
constexpr absl::Duration kLongestWait = absl::Seconds(2);

// What the streams of one Follow share.
struct Shared {
  const Connection& connection;
  const FollowOptions& options;
  const FollowHandlers& handlers;
  Cancellation* cancellation;
  std::mutex mutex;
  bool away = false;  // said so

  void Notice(const std::string& text) {
    if (handlers.notice) handlers.notice(text);
  }
};

// The parts in which the three streams differ.
struct EventStream {
  using Response = v1::WatchEventsResponse;
  static auto Open(v1::WatchService::Stub& stub, grpc::ClientContext* context,
                   const v1::WatchRequest& request) {
    return stub.WatchEvents(context, request);
  }
  static bool Has(const Response& response) { return response.has_event(); }
  static int64_t Revision(const Response& response) { return response.event().revision(); }
  static void Deliver(const FollowHandlers& handlers, const Response& response) {
    handlers.event(response.event());
  }
};

struct MetricsStream {
  using Response = v1::WatchMetricsResponse;
  static auto Open(v1::WatchService::Stub& stub, grpc::ClientContext* context,
                   const v1::WatchRequest& request) {
    return stub.WatchMetrics(context, request);
  }
  static bool Has(const Response& response) { return response.has_metrics(); }
  static int64_t Revision(const Response& response) { return response.metrics().revision(); }
  static void Deliver(const FollowHandlers& handlers, const Response& response) {
    handlers.metrics(response.metrics());
  }
};

struct LogStream {
  using Response = v1::WatchLogsResponse;
  static auto Open(v1::WatchService::Stub& stub, grpc::ClientContext* context,
                   const v1::WatchRequest& request) {
    return stub.WatchLogs(context, request);
  }
  static bool Has(const Response& response) { return response.has_line(); }
  static int64_t Revision(const Response& response) { return response.line().revision(); }
  static void Deliver(const FollowHandlers& handlers, const Response& response) {
    handlers.line(response.line());
  }
};

// Ends the call when nothing has come for the idle limit.
class IdleLimit {
 public:
  IdleLimit(absl::Duration limit, grpc::ClientContext* context) {
    if (limit == absl::InfiniteDuration()) return;
    thread_ = std::thread([this, limit, context] {
      std::unique_lock<std::mutex> lock(mutex_);
      for (bool came = true; came && !done_;) {
        came_ = false;
        changed_.wait_for(lock, absl::ToChronoNanoseconds(limit), [this] { return done_; });
        came = came_;
      }
      if (done_) return;
      expired_ = true;
      context->TryCancel();
    });
  }
  ~IdleLimit() { Stop(); }
  void Came() {
    std::lock_guard<std::mutex> lock(mutex_);
    came_ = true;
  }
  // Whether it was this that ended the call.
  bool Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
    return expired_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool came_ = false, done_ = false, expired_ = false;
  std::thread thread_;
};

template <typename Stream>
class StreamFollower {
 public:
  explicit StreamFollower(Shared* shared) : shared_(*shared) {}

  absl::Status Run() {
    absl::Duration wait = kFirstWait;
    for (;;) {
      bool received = false, idle = false;
      const grpc::Status status = RunOnce(&received, &idle);
      if (shared_.cancellation->cancelled()) return absl::CancelledError("interrupted");
      if (idle || (status.ok() && shared_.options.until_end)) return absl::OkStatus();
      if (received) wait = kFirstWait;
      const absl::Status explained = shared_.connection.Explain(status);
      if (status.error_code() == grpc::StatusCode::OUT_OF_RANGE && !token_.empty()) {
        // What lies between is no longer kept; revisions tell what was delivered already.
        token_.clear();
        std::lock_guard<std::mutex> lock(shared_.mutex);
        shared_.Notice("some items are missing: the coordinator no longer keeps them");
        continue;
      }
      if (!MayPass(status) || (!connected_ && !status.ok())) return explained;
      {
        std::lock_guard<std::mutex> lock(shared_.mutex);
        if (!shared_.away && status.error_code() == grpc::StatusCode::UNAVAILABLE) {
          shared_.away = true;
          shared_.Notice("the coordinator is away; waiting for it (trainers go on)");
        }
      }
      absl::SleepFor(wait);
      wait = std::min(wait * 2, kLongestWait);
    }
  }

 private:
  // A token may have been made anew by a coordinator with a new data directory: that is final.
  static bool MayPass(const grpc::Status& status) {
    switch (status.error_code()) {
      case grpc::StatusCode::OK:
      case grpc::StatusCode::UNAVAILABLE:
      case grpc::StatusCode::CANCELLED:
      case grpc::StatusCode::UNKNOWN:
      case grpc::StatusCode::INTERNAL:
      case grpc::StatusCode::RESOURCE_EXHAUSTED:
        return true;
      default:
        return false;
    }
  }

  grpc::Status RunOnce(bool* received, bool* idle) {
    absl::StatusOr<std::unique_ptr<Connection>> connection = shared_.connection.Again();
    if (!connection.ok()) {
      return grpc::Status(grpc::StatusCode::UNAVAILABLE,
                          std::string(connection.status().message()));
    }
    v1::WatchRequest request;
    request.set_job(shared_.options.job);
    request.set_resume_token(token_);
    request.set_from_now(shared_.options.from_now && token_.empty());
    request.set_until_end(shared_.options.until_end);
    const auto context = (*connection)->NewContext(absl::InfiniteDuration());
    CancellableCall call(shared_.cancellation, context.get());
    IdleLimit idle_limit(shared_.options.idle_limit, context.get());
    auto reader = Stream::Open((*connection)->watch(), context.get(), request);
    typename Stream::Response response;
    while (reader->Read(&response)) {
      *received = connected_ = true;
      std::lock_guard<std::mutex> lock(shared_.mutex);
      if (shared_.away) shared_.Notice("the coordinator is back");
      shared_.away = false;
      if (!Stream::Has(response) || Stream::Revision(response) <= last_revision_) continue;
      idle_limit.Came();
      last_revision_ = Stream::Revision(response);
      token_ = response.resume_token();
      Stream::Deliver(shared_.handlers, response);
    }
    *idle = idle_limit.Stop();
    return reader->Finish();
  }

  Shared& shared_;
  std::string token_;
  int64_t last_revision_ = 0;
  bool connected_ = false;
};

}  // namespace

absl::Status Follow(const Connection& connection, const FollowOptions& options,
                    const FollowHandlers& handlers, Cancellation* cancellation) {
  Shared shared{connection, options, handlers, cancellation};
  std::vector<std::thread> threads;
  absl::Status results[3];
  // The first that fails ends the others: half of a job is no way to watch it.
  const auto start = [&](int i, auto follower) {
    threads.emplace_back([&, i, follower]() mutable {
      results[i] = follower.Run();
      if (!results[i].ok()) cancellation->Cancel();
    });
  };
  if (handlers.event) start(0, StreamFollower<EventStream>(&shared));
  if (handlers.metrics) start(1, StreamFollower<MetricsStream>(&shared));
  if (handlers.line) start(2, StreamFollower<LogStream>(&shared));
  for (std::thread& thread : threads) thread.join();
  absl::Status cancelled;
  for (const absl::Status& result : results) {
    if (!result.ok() && !absl::IsCancelled(result)) return result;
    if (!result.ok()) cancelled = result;
  }
  return cancelled;
}

}  // namespace attune
