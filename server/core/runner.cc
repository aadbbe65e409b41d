#include "server/core/runner.h"

#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/log.h"

namespace attune {
namespace {

// Bounds the time that the first of a batch waits for the last.
constexpr size_t kBatchItemsMax = 512;
constexpr int64_t kPurgeItems = 2000;
constexpr absl::Duration kGaugesInterval = absl::Seconds(1);
constexpr absl::Duration kGarbageInterval = absl::Hours(1);

absl::Status ShuttingDown() {
  return absl::UnavailableError("the coordinator is shutting down; try again");
}

}  // namespace

void Runner::Batch::Add(StepResult result) {
  for (Effect& effect : result.effects) effects.push_back(std::move(effect));
  for (Action& action : result.actions) actions.push_back(std::move(action));
}

Runner::Runner(RunnerOptions options, std::unique_ptr<Coordinator> coordinator,
               std::unique_ptr<Store> store)
    : options_(std::move(options)),
      coordinator_(std::move(coordinator)),
      store_(std::move(store)),
      next_garbage_(options_.clock()),
      thread_([this] { Run(); }) {}

Runner::~Runner() { Shutdown(); }

void Runner::Shutdown() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

CallId Runner::AddCall(Completion completion) {
  std::lock_guard<std::mutex> lock(mutex_);
  const CallId call = next_id_++;
  calls_[call] = std::move(completion);
  return call;
}

void Runner::Push(Item item) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!stopped_) {
      queue_.push_back(std::move(item));
      wake_.notify_one();
      return;
    }
  }
  // Nobody steps any more: whoever waits must not wait for ever.
  FailCalls(ShuttingDown());
  if (item.done) item.done();
}

void Runner::Post(CoordinatorEvent event, std::function<void()> done) {
  Push({.event = std::move(event), .done = std::move(done)});
}

void Runner::Query(std::function<void(const Coordinator&)> read, std::function<void()> done) {
  Push({.read = std::move(read), .done = std::move(done)});
}

SessionId Runner::OpenSession(std::shared_ptr<WorkerSession> session) {
  std::lock_guard<std::mutex> lock(mutex_);
  const SessionId id = next_id_++;
  sessions_[id] = std::move(session);
  return id;
}

void Runner::CloseSession(SessionId session) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (sessions_.erase(session) == 0) return;
  }
  Post(SessionClosedEvent{session});
}

void Runner::Run() {
  absl::Time next_tick = options_.clock();
  bool healthy = true;
  while (healthy) {
    std::deque<Item> items = TakeItems(next_tick);
    const absl::Time now = options_.clock();
    // A clock that was set back must not stop the ticks.
    if (now >= next_tick || next_tick - now > options_.tick) {
      next_tick = now + options_.tick;
      items.push_back({.event = TickEvent{}});
      Tick(now);
    }
    healthy = RunItems(&items);
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_ && queue_.empty()) break;
  }
  std::deque<Item> rest;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    rest.swap(queue_);
  }
  FailCalls(ShuttingDown());
  for (Item& item : rest) {
    if (item.done) item.done();
  }
}

std::deque<Runner::Item> Runner::TakeItems(absl::Time next_tick) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (queue_.empty() && !stop_) {
    const absl::Duration wait =
        std::min(options_.tick, std::max(absl::ZeroDuration(), next_tick - options_.clock()));
    wake_.wait_for(lock, absl::ToChronoMicroseconds(wait),
                   [this] { return stop_ || !queue_.empty(); });
  }
  std::deque<Item> items;
  while (!queue_.empty() && items.size() < kBatchItemsMax) {
    items.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  return items;
}

bool Runner::RunItems(std::deque<Item>* items) {
  Batch batch;
  for (Item& item : *items) {
    if (item.event.has_value()) {
      StepResult result = coordinator_->Step(*item.event, options_.clock());
      bool removes = false;
      for (const Action& action : result.actions) {
        removes = removes || std::holds_alternative<RemoveArtifact>(action);
      }
      batch.Add(std::move(result));
      if (item.done) batch.done.push_back(std::move(item.done));
      // No later step may come to rely on an artifact that is about to go.
      if (removes && !CommitAndPerform(&batch)) return false;
    } else {
      item.read(*coordinator_);
      batch.done.push_back(std::move(item.done));
    }
  }
  batch.Add(coordinator_->Schedule(options_.clock()));
  return CommitAndPerform(&batch);
}

bool Runner::CommitAndPerform(Batch* batch) {
  if (!batch->effects.empty()) {
    const absl::Time start = options_.clock();
    if (absl::Status status = store_->Commit(batch->effects); !status.ok()) {
      LOG(ERROR) << "nothing more can be stored, so nothing more is acknowledged: "
                 << status.ToString();
      if (options_.on_fatal) options_.on_fatal(status);
      return false;
    }
    if (options_.observer != nullptr) {
      options_.observer->Commit(absl::ToDoubleSeconds(options_.clock() - start));
    }
    NotifyWatchers(batch->effects);
  }
  Perform(batch);
  *batch = Batch();
  return true;
}

void Runner::NotifyWatchers(const std::vector<Effect>& effects) {
  std::set<StreamChange> changes;
  for (const Effect& effect : effects) {
    if (const auto* event = std::get_if<AppendEvent>(&effect)) {
      changes.insert({StreamKind::kEvents, event->event.job()});
    } else if (const auto* metrics = std::get_if<AppendMetrics>(&effect)) {
      changes.insert({StreamKind::kMetrics, metrics->metrics.job()});
    } else if (const auto* log = std::get_if<AppendLog>(&effect)) {
      changes.insert({StreamKind::kLogs, log->line.job()});
    } else if (const auto* deleted = std::get_if<DeleteJob>(&effect)) {
      purging_ = true;
      for (StreamKind kind : {StreamKind::kEvents, StreamKind::kMetrics, StreamKind::kLogs}) {
        changes.insert({kind, deleted->job});
      }
    }
  }
  if (options_.watch_hub != nullptr && !changes.empty()) options_.watch_hub->Notify(changes);
}

void Runner::Perform(Batch* batch) {
  // Of several acknowledgements of a lease in one batch the last says it all.
  std::map<std::pair<SessionId, int64_t>, size_t> last_ack;
  for (size_t i = 0; i < batch->actions.size(); ++i) {
    const auto* send = std::get_if<SendToSession>(&batch->actions[i]);
    if (send == nullptr || !send->message.has_report_ack()) continue;
    last_ack[{send->session, send->message.report_ack().epoch()}] = i;
  }
  for (size_t i = 0; i < batch->actions.size(); ++i) {
    const auto* send = std::get_if<SendToSession>(&batch->actions[i]);
    const bool superseded =
        send != nullptr && send->message.has_report_ack() &&
        last_ack.at({send->session, send->message.report_ack().epoch()}) != i;
    if (superseded) continue;
    std::visit([this](const auto& action) { Do(action); }, batch->actions[i]);
  }
  for (const auto& done : batch->done) done();
}

void Runner::Do(const SendToSession& action) {
  std::shared_ptr<WorkerSession> session;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = sessions_.find(action.session);
    if (it != sessions_.end()) session = it->second;
  }
  if (session != nullptr) session->Send(action.message);
}

void Runner::Do(const attune::CloseSession& action) {
  std::shared_ptr<WorkerSession> session;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = sessions_.find(action.session);
    if (it == sessions_.end()) return;
    session = std::move(it->second);
    sessions_.erase(it);
  }
  session->Close(action.status);
}

void Runner::Do(const CompleteCall& action) {
  Completion completion;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = calls_.find(action.call);
    if (it == calls_.end()) return;
    completion = std::move(it->second);
    calls_.erase(it);
  }
  completion(action.status, action.job);
}

void Runner::Do(const RemoveArtifact& action) {
  absl::Status status =
      options_.remove_artifact ? options_.remove_artifact(action.artifact) : absl::OkStatus();
  if (action.call != 0) {
    Do(CompleteCall{action.call, std::move(status), v1::Job()});
  } else if (!status.ok() && !absl::IsNotFound(status)) {
    LOG(WARNING) << action.artifact << " could not be removed: " << status.ToString();
  }
}

void Runner::Do(const ObserveQueueWait& action) {
  if (options_.observer != nullptr) options_.observer->QueueWait(action.wait_s);
}

void Runner::Do(const ObserveFailure& action) {
  if (options_.observer != nullptr) options_.observer->Failure(action.cause);
}

void Runner::Do(const ObserveRestart& action) {
  if (options_.observer != nullptr) options_.observer->Restart(action.cause);
}

void Runner::Do(const ObserveStep& action) {
  if (options_.observer != nullptr) options_.observer->Step(action.trained_tokens);
}

void Runner::Do(const ObserveCheckpoint& action) {
  if (options_.observer != nullptr) options_.observer->Checkpoint(action.bytes);
}

void Runner::Tick(absl::Time now) {
  if (options_.observer != nullptr && now >= next_gauges_) {
    next_gauges_ = now + kGaugesInterval;
    options_.observer->Gauges(coordinator_->Stats());
  }
  if (purging_ || now >= next_garbage_) {
    const absl::StatusOr<bool> more = store_->Purge(kPurgeItems);
    if (!more.ok()) LOG(WARNING) << "streams of deleted jobs stay: " << more.status().ToString();
    purging_ = more.ok() && *more;
  }
  if (now >= next_garbage_) {
    next_garbage_ = now + kGarbageInterval;
    if (options_.collect_garbage) {
      options_.collect_garbage(
          [this](const std::string& artifact) { return coordinator_->ArtifactInUse(artifact); });
    }
  }
}

void Runner::FailCalls(const absl::Status& status) {
  std::map<CallId, Completion> calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    calls.swap(calls_);
  }
  for (auto& [call, completion] : calls) completion(status, v1::Job());
}

}  // namespace attune
