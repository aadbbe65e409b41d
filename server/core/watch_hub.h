// Serves streams of events, metrics and logs to any number of readers from one thread: each
// reader gets pages from the store, in order, from its own place on. A reader that does not ask
// for more gets nothing and costs nothing, so a slow one holds up nobody; what it missed is read
// from the store when it comes back, as long as retention keeps it.
//
// Thread-safe. Subscriber calls come from the hub's thread, one at a time per subscription.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "server/store/stream_reader.h"

namespace attune {

class WatchSubscriber {
 public:
  virtual ~WatchSubscriber() = default;
  // Takes the next items (at least one). Nothing more comes before WatchHub::More.
  virtual void Deliver(std::vector<StreamItem> items) = 0;
  // The stream is over; nothing comes after it. Not called after Unsubscribe returned.
  virtual void End(absl::Status status) = 0;
};

struct WatchOptions {
  StreamKind kind = StreamKind::kEvents;
  std::string job;         // empty: all jobs
  int64_t after = 0;       // revision; 0: from the first that is kept
  bool from_now = false;   // `after` is what is newest when the subscription is served first
  bool until_end = false;  // ends when all up to a final (or PAUSED) state was delivered
};

// What a commit added.
struct StreamChange {
  StreamKind kind;
  std::string job;
  bool operator<(const StreamChange& other) const {
    return kind != other.kind ? kind < other.kind : job < other.job;
  }
};

class WatchHub {
 public:
  explicit WatchHub(std::unique_ptr<StreamReader> reader);
  // Ends every subscription with UNAVAILABLE.
  ~WatchHub();

  // The first page comes without More.
  uint64_t Subscribe(WatchOptions options, std::shared_ptr<WatchSubscriber> subscriber);
  // The subscriber has dealt with what was delivered.
  void More(uint64_t id);
  void Unsubscribe(uint64_t id);
  // Call after the commit.
  void Notify(const std::set<StreamChange>& changes);

 private:
  struct Subscription {
    WatchOptions options;
    std::shared_ptr<WatchSubscriber> subscriber;
    bool wants = true;  // asked for more
    bool dirty = true;  // there may be more
  };

  void Run();
  void Enqueue(uint64_t id, const Subscription& subscription);
  // Reads a page and delivers it. True: the subscription is over.
  void Serve(uint64_t id);
  absl::Status CheckPlace(const WatchOptions& options, const StreamPage& page) const;

  const std::unique_ptr<StreamReader> reader_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<uint64_t, Subscription> subscriptions_;
  std::set<uint64_t> ready_;  // to be served
  std::multimap<std::string, uint64_t> by_job_;
  uint64_t next_id_ = 1;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace attune
