#include "server/rpc/watch_service.h"

#include <grpcpp/alarm.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/core/errors.h"
#include "server/core/names.h"

namespace attune {
namespace {

constexpr absl::Duration kHeartbeat = absl::Seconds(15);

bool SetItem(const std::string& bytes, v1::WatchEventsResponse* response) {
  return response->mutable_event()->ParseFromString(bytes);
}
bool SetItem(const std::string& bytes, v1::WatchMetricsResponse* response) {
  return response->mutable_metrics()->ParseFromString(bytes);
}
bool SetItem(const std::string& bytes, v1::WatchLogsResponse* response) {
  return response->mutable_line()->ParseFromString(bytes);
}

absl::StatusOr<WatchOptions> ToOptions(StreamKind kind, const v1::WatchRequest& request) {
  WatchOptions options{.kind = kind, .job = request.job()};
  if (options.job.empty() && kind != StreamKind::kEvents) {
    return InvalidFields({{"job", "is required: only events can be watched over all jobs"}}, "");
  }
  if (options.job.empty() && request.until_end()) {
    return InvalidFields({{"until_end", "needs a job"}}, "");
  }
  if (!options.job.empty() && !IsJobName(options.job)) {
    return InvalidFields({{"job", "must be of the form jobs/{id}"}}, "");
  }
  if (!request.resume_token().empty() && request.from_now()) {
    return InvalidFields({{"from_now", "excludes resume_token"}}, "");
  }
  options.from_now = request.from_now();
  options.until_end = request.until_end();
  if (!request.resume_token().empty()) {
    const absl::StatusOr<int64_t> revision = ParseResumeToken(kind, request.resume_token());
    if (!revision.ok()) return revision.status();
    options.after = *revision;
  }
  return options;
}

// One stream. Items wait in `page_` (one page at most); one write is outstanding; the next page
// is asked for when the last is written. Heartbeats fill silence. The hub and the alarm hold
// `core`, which outlives the reactor and knows whether it is still there.
template <typename Response>
class WatchReactor final : public grpc::ServerWriteReactor<Response> {
 public:
  WatchReactor(const RpcContext& context, grpc::CallbackServerContext* call,
               const v1::WatchRequest& request, StreamKind kind, const char* method)
      : hub_(context.watch_hub),
        kind_(kind),
        guard_(context, *call, absl::StrCat("attune.v1.WatchService/", method), /*unary=*/false),
        core_(std::make_shared<Core>(this)) {
    absl::Status status = guard_.admission();
    absl::StatusOr<WatchOptions> options = ToOptions(kind, request);
    if (status.ok()) status = options.status();
    std::lock_guard<std::mutex> lock(core_->mutex);
    if (!status.ok()) {
      FinishOnce(status);
      return;
    }
    this->StartSendInitialMetadata();
    last_write_ = absl::Now();
    core_->subscription = hub_->Subscribe(*std::move(options), core_);
    SetAlarm();
  }

  void OnSendInitialMetadataDone(bool ok) override {}

  void OnWriteDone(bool ok) override {
    uint64_t more = 0;
    {
      std::lock_guard<std::mutex> lock(core_->mutex);
      writing_ = false;
      if (!ok) {
        FinishOnce(absl::CancelledError("the reader is gone"));
        return;
      }
      if (next_ == page_.size() && !page_.empty()) {
        page_.clear();
        next_ = 0;
        more = core_->subscription;
      }
      WriteNext();
    }
    if (more != 0) hub_->More(more);
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(core_->mutex);
    FinishOnce(absl::CancelledError("the reader is gone"));
  }

  void OnDone() override {
    uint64_t subscription = 0;
    {
      std::lock_guard<std::mutex> lock(core_->mutex);
      core_->reactor = nullptr;
      subscription = core_->subscription;
    }
    hub_->Unsubscribe(subscription);
    delete this;
  }

 private:
  struct Core final : public WatchSubscriber, public std::enable_shared_from_this<Core> {
    explicit Core(WatchReactor* reactor) : reactor(reactor) {}
    void Deliver(std::vector<StreamItem> items) override {
      std::lock_guard<std::mutex> lock(mutex);
      if (reactor == nullptr) return;
      reactor->page_ = std::move(items);
      reactor->next_ = 0;
      if (!reactor->writing_) reactor->WriteNext();
    }
    void End(absl::Status status) override {
      std::lock_guard<std::mutex> lock(mutex);
      if (reactor == nullptr) return;
      reactor->ended_ = true;
      reactor->end_ = std::move(status);
      if (!reactor->writing_) reactor->WriteNext();
    }
    std::mutex mutex;
    WatchReactor* reactor;
    uint64_t subscription = 0;
  };

  // Under the mutex, with no write outstanding: writes an item, or ends, or rests.
  void WriteNext() {
    if (finished_) return;
    if (next_ < page_.size()) {
      response_.Clear();
      const StreamItem& item = page_[next_++];
      if (!SetItem(item.bytes, &response_)) {
        FinishOnce(absl::DataLossError(
            absl::StrCat("the stored item of revision ", item.revision, " cannot be read")));
        return;
      }
      response_.set_resume_token(MakeResumeToken(kind_, item.revision));
      Write();
    } else if (ended_) {
      FinishOnce(end_);
    }
  }

  void Write() {
    writing_ = true;
    last_write_ = absl::Now();
    this->StartWrite(&response_);
  }

  // A fresh alarm each time: setting one inside its own callback would destroy the callback.
  void SetAlarm() {
    std::shared_ptr<Core> core = core_;
    alarm_ = std::make_unique<grpc::Alarm>();
    alarm_->Set(absl::ToChronoTime(last_write_ + kHeartbeat), [core](bool fired) {
      std::lock_guard<std::mutex> lock(core->mutex);
      if (!fired || core->reactor == nullptr || core->reactor->finished_) return;
      core->reactor->Heartbeat();
    });
  }

  void Heartbeat() {
    if (!writing_ && absl::Now() >= last_write_ + kHeartbeat) {
      response_.Clear();
      Write();
    }
    SetAlarm();
  }

  void FinishOnce(const absl::Status& status) {
    if (finished_) return;
    finished_ = true;
    this->Finish(guard_.End(status));
  }

  WatchHub* const hub_;
  const StreamKind kind_;
  CallGuard guard_;
  const std::shared_ptr<Core> core_;
  // Under core_->mutex:
  std::vector<StreamItem> page_;
  size_t next_ = 0;
  Response response_;
  bool writing_ = false;
  bool ended_ = false;
  absl::Status end_;
  bool finished_ = false;
  absl::Time last_write_;
  std::unique_ptr<grpc::Alarm> alarm_;
};

}  // namespace

grpc::ServerWriteReactor<v1::WatchEventsResponse>* WatchServiceImpl::WatchEvents(
    grpc::CallbackServerContext* call, const v1::WatchRequest* request) {
  return new WatchReactor<v1::WatchEventsResponse>(context_, call, *request, StreamKind::kEvents,
                                                   "WatchEvents");
}

grpc::ServerWriteReactor<v1::WatchMetricsResponse>* WatchServiceImpl::WatchMetrics(
    grpc::CallbackServerContext* call, const v1::WatchRequest* request) {
  return new WatchReactor<v1::WatchMetricsResponse>(context_, call, *request, StreamKind::kMetrics,
                                                    "WatchMetrics");
}

grpc::ServerWriteReactor<v1::WatchLogsResponse>* WatchServiceImpl::WatchLogs(
    grpc::CallbackServerContext* call, const v1::WatchRequest* request) {
  return new WatchReactor<v1::WatchLogsResponse>(context_, call, *request, StreamKind::kLogs,
                                                 "WatchLogs");
}

}  // namespace attune
