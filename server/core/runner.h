// The one thread that owns coordinator and store. Callers post events from any thread and never
// wait; the thread takes what has gathered, steps through it, lets the scheduler plan, makes all
// of it durable in one transaction (group commit), and only then performs the actions: answers
// calls, sends to workers, wakes watchers. So nobody is told anything that a crash could undo.
//
// Where the store fails (full disk, damage) nothing is acknowledged: on_fatal is called once and
// the thread ends.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "server/core/watch_hub.h"
#include "server/store/store.h"

namespace attune {

// One worker's connection. Calls come from the runner's thread and must not block.
class WorkerSession {
 public:
  virtual ~WorkerSession() = default;
  virtual void Send(const v1::CoordinatorMessage& message) = 0;
  virtual void Close(const absl::Status& status) = 0;
};

// Where numbers for monitoring go. Calls come from the runner's thread.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void QueueWait(double wait_s) = 0;
  virtual void Failure(v1::FailureCause cause) = 0;
  virtual void Restart(v1::FailureCause cause) = 0;
  virtual void Step(int64_t trained_tokens) = 0;
  virtual void Checkpoint(int64_t bytes) = 0;
  virtual void Commit(double commit_s) = 0;
  virtual void Gauges(const CoordinatorStats& stats) = 0;
};

struct RunnerOptions {
  std::function<absl::Time()> clock;
  absl::Duration tick = absl::Milliseconds(250);
  // Deletes an artifact that nothing refers to.
  std::function<absl::Status(const std::string& artifact)> remove_artifact;
  // Once an hour, on the runner's thread: removes what was left behind. `in_use` is valid during
  // the call. May be empty.
  std::function<void(const std::function<bool(const std::string&)>& in_use)> collect_garbage;
  std::function<void(const absl::Status&)> on_fatal;
  Observer* observer = nullptr;   // may be null
  WatchHub* watch_hub = nullptr;  // may be null
};

class Runner {
 public:
  using Completion = std::function<void(absl::Status, v1::Job)>;

  // Takes over both; events are accepted from now on.
  Runner(RunnerOptions options, std::unique_ptr<Coordinator> coordinator,
         std::unique_ptr<Store> store);
  ~Runner();

  // Finishes what is queued, fails calls that still wait with UNAVAILABLE, ends the thread.
  void Shutdown();

  // Calls that are answered once; `completion` runs on the runner's thread. The event's `call`
  // is filled in. Returns the call, for Forget.
  template <typename Event>
  CallId Call(Event event, Completion completion) {
    const CallId call = AddCall(std::move(completion));
    event.call = call;
    Post(std::move(event));
    return call;
  }
  // The caller no longer waits: its completion runs soon (with CANCELLED if it still waited).
  void Forget(CallId call) { Post(ForgetCallEvent{call}); }

  // `done`, if given, runs when the event's effects are durable.
  void Post(CoordinatorEvent event, std::function<void()> done = nullptr);

  // Runs `read` between steps, then `done` when all that it could have seen is durable.
  void Query(std::function<void(const Coordinator&)> read, std::function<void()> done);

  SessionId OpenSession(std::shared_ptr<WorkerSession> session);
  void CloseSession(SessionId session);

 private:
  struct Item {
    std::optional<CoordinatorEvent> event;
    std::function<void(const Coordinator&)> read;
    std::function<void()> done;
  };
  struct Batch {
    std::vector<Effect> effects;
    std::vector<Action> actions;
    std::vector<std::function<void()>> done;
    void Add(StepResult result);
  };

  CallId AddCall(Completion completion);
  void Push(Item item);
  void Run();
  std::deque<Item> TakeItems(absl::Time next_tick);
  // False: the store failed.
  bool RunItems(std::deque<Item>* items);
  bool CommitAndPerform(Batch* batch);
  void NotifyWatchers(const std::vector<Effect>& effects);
  void Perform(Batch* batch);
  void Do(const SendToSession& action);
  void Do(const attune::CloseSession& action);
  void Do(const CompleteCall& action);
  void Do(const RemoveArtifact& action);
  void Do(const ObserveQueueWait& action);
  void Do(const ObserveFailure& action);
  void Do(const ObserveRestart& action);
  void Do(const ObserveStep& action);
  void Do(const ObserveCheckpoint& action);
  void Tick(absl::Time now);
  void FailCalls(const absl::Status& status);

  const RunnerOptions options_;
  const std::unique_ptr<Coordinator> coordinator_;
  const std::unique_ptr<Store> store_;
  absl::Time next_gauges_ = absl::InfinitePast();
  absl::Time next_garbage_;
  bool purging_ = true;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Item> queue_;
  std::map<CallId, Completion> calls_;
  std::map<SessionId, std::shared_ptr<WorkerSession>> sessions_;
  uint64_t next_id_ = 1;
  bool stop_ = false;
  bool stopped_ = false;  // the thread takes nothing any more
  std::thread thread_;
};

}  // namespace attune
