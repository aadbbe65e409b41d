#include "server/core/watch_hub.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/errors.h"
#include "server/core/job_state.h"
#include "server/core/names.h"

namespace attune {
namespace {

constexpr int kPageItems = 512;
constexpr int64_t kPageBytes = 1 << 20;

}  // namespace

WatchHub::WatchHub(std::unique_ptr<StreamReader> reader)
    : reader_(std::move(reader)), thread_([this] { Run(); }) {}

WatchHub::~WatchHub() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  for (auto& [id, subscription] : subscriptions_) {
    subscription.subscriber->End(absl::UnavailableError("the coordinator is shutting down"));
  }
}

uint64_t WatchHub::Subscribe(WatchOptions options, std::shared_ptr<WatchSubscriber> subscriber) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t id = next_id_++;
  by_job_.emplace(options.job, id);
  subscriptions_[id] = {std::move(options), std::move(subscriber)};
  Enqueue(id, subscriptions_[id]);
  return id;
}

void WatchHub::More(uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = subscriptions_.find(id);
  if (it == subscriptions_.end()) return;
  it->second.wants = true;
  Enqueue(id, it->second);
}

void WatchHub::Unsubscribe(uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = subscriptions_.find(id);
  if (it == subscriptions_.end()) return;
  const auto [first, last] = by_job_.equal_range(it->second.options.job);
  for (auto entry = first; entry != last; ++entry) {
    if (entry->second != id) continue;
    by_job_.erase(entry);
    break;
  }
  subscriptions_.erase(it);
  ready_.erase(id);
}

void WatchHub::Notify(const std::set<StreamChange>& changes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const StreamChange& change : changes) {
    for (const std::string& job : {change.job, std::string()}) {
      const auto [first, last] = by_job_.equal_range(job);
      for (auto entry = first; entry != last; ++entry) {
        Subscription& subscription = subscriptions_.at(entry->second);
        // An event may be the end that a stream of another kind waits for.
        const bool ends = subscription.options.until_end && change.kind == StreamKind::kEvents;
        if (subscription.options.kind != change.kind && !ends) continue;
        subscription.dirty = true;
        Enqueue(entry->second, subscription);
      }
    }
  }
}

void WatchHub::Enqueue(uint64_t id, const Subscription& subscription) {
  if (!subscription.wants || !subscription.dirty) return;
  ready_.insert(id);
  wake_.notify_one();
}

void WatchHub::Run() {
  while (true) {
    uint64_t id = 0;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !ready_.empty(); });
      if (stop_) return;
      id = *ready_.begin();
      ready_.erase(ready_.begin());
    }
    Serve(id);
  }
}

absl::Status WatchHub::CheckPlace(const WatchOptions& options, const StreamPage& page) const {
  if (!options.job.empty() && !page.job_exists) {
    return ErrorWithReason(absl::StatusCode::kNotFound, "JOB_NOT_FOUND",
                           absl::StrCat("there is no job '", options.job, "'"),
                           {{"job", options.job}});
  }
  if (options.after > 0 && options.after < page.dropped) {
    return ErrorWithReason(absl::StatusCode::kOutOfRange, "RESUME_TOKEN_EXPIRED",
                           "resume_token is older than what is kept; go on with metadata "
                           "oldest_token, or from the beginning with an empty token",
                           {{"oldest_token", MakeResumeToken(options.kind, page.dropped)}});
  }
  if (options.after > page.newest) {
    return ErrorWithReason(absl::StatusCode::kOutOfRange, "RESUME_TOKEN_AHEAD",
                           "resume_token is newer than anything here: it comes from another "
                           "coordinator, or this one was restored from a backup");
  }
  return absl::OkStatus();
}

void WatchHub::Serve(uint64_t id) {
  WatchOptions options;
  std::shared_ptr<WatchSubscriber> subscriber;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = subscriptions_.find(id);
    if (it == subscriptions_.end() || !it->second.wants) return;
    it->second.dirty = false;  // what is committed from here on sets it again
    options = it->second.options;
    subscriber = it->second.subscriber;
  }
  const int limit = options.from_now ? 1 : kPageItems;
  absl::StatusOr<StreamPage> page =
      reader_->Read(options.kind, options.job, options.after, limit, kPageBytes);
  absl::Status status = page.status();
  if (status.ok() && !options.from_now) status = CheckPlace(options, *page);
  if (status.ok() && options.from_now) {
    options.after = page->newest;
    if (!options.job.empty() && !page->job_exists) status = CheckPlace(options, *page);
    page->items.clear();
  }
  const bool ended = status.ok() && options.until_end && page->items.empty() &&
                     (IsFinal(page->job_state) || page->job_state == v1::JOB_STATE_PAUSED);
  if (!status.ok() || ended) {
    Unsubscribe(id);
    subscriber->End(status);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = subscriptions_.find(id);
    if (it == subscriptions_.end()) return;
    Subscription& subscription = it->second;
    subscription.options.from_now = false;
    if (page->items.empty()) {
      subscription.options.after = options.after;
      Enqueue(id, subscription);  // if a commit came in between
      return;
    }
    subscription.options.after = page->items.back().revision;
    subscription.wants = false;
    subscription.dirty = true;
  }
  subscriber->Deliver(std::move(page->items));
}

}  // namespace attune
