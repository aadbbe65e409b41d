// What workers say about themselves: registration, heartbeats, loss, and the rendezvous store.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/coordinator.h"
#include "server/core/errors.h"
#include "server/core/names.h"

namespace attune {
namespace {

constexpr absl::Duration kRequestRetention = absl::Hours(24);
constexpr absl::Duration kWorkerRetention = absl::Hours(24);
constexpr int kDevicesMax = 1024;
constexpr int kDeliveriesMax = 3;
constexpr size_t kRendezvousValueBytesMax = 64 << 10;
constexpr size_t kRendezvousKeyBytesMax = 256;
constexpr int kRendezvousKeysMax = 65536;

absl::Status CheckRegister(const v1::Register& message) {
  if (!IsWorkerName(message.worker())) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", message.worker(), "' is not a worker name: it must be workers/{id}"));
  }
  if (message.devices_size() > kDevicesMax) {
    return absl::InvalidArgumentError(absl::StrCat("more than ", kDevicesMax, " devices"));
  }
  std::set<std::string> ids;
  for (const v1::Device& device : message.devices()) {
    const bool concrete =
        device.type() == v1::DEVICE_TYPE_CPU || device.type() == v1::DEVICE_TYPE_CUDA;
    if (device.id().empty() || !ids.insert(device.id()).second || !concrete) {
      return absl::InvalidArgumentError(absl::StrCat(
          "device '", device.id(), "' has no id, an id that occurs twice, or an unknown type"));
    }
  }
  return absl::OkStatus();
}

// The answer to a rendezvous under a lease that its job does not count on. While the lease still
// blocks devices it is Stop, not Stale: the agent must kill it and say LeaseEnded.
v1::CoordinatorMessage NotCurrent(int64_t epoch, const LeaseRecord* lease) {
  v1::CoordinatorMessage message;
  if (lease == nullptr || lease->phase == LeasePhase::kEnded) {
    message.mutable_stale()->set_epoch(epoch);
  } else {
    message.mutable_stop()->set_epoch(epoch);
    message.mutable_stop()->set_mode(v1::STOP_MODE_KILL);
  }
  return message;
}

}  // namespace

Coordinator::WorkerEntry* Coordinator::HeardFrom(SessionId session) {
  const auto it = sessions_.find(session);
  if (it == sessions_.end()) return nullptr;  // replaced or closed: what it says no longer counts
  WorkerEntry& worker = workers_.at(it->second);
  worker.last_heard = now_;
  return &worker;
}

void Coordinator::On(const RegisterEvent& event) {
  if (absl::Status status = CheckRegister(event.message); !status.ok()) {
    out_.actions.push_back(CloseSession{event.session, status});
    return;
  }
  const std::string& name = event.message.worker();
  WorkerEntry& entry = workers_[name];
  if (entry.session != 0 && entry.session != event.session) {
    sessions_.erase(entry.session);
    out_.actions.push_back(CloseSession{
        entry.session, absl::AbortedError(absl::StrCat(name, " has opened a newer session"))});
  }
  entry.session = event.session;
  entry.last_heard = now_;
  entry.lost = false;
  sessions_[event.session] = name;
  v1::Worker worker;
  worker.set_name(name);
  worker.set_hostname(event.message.hostname());
  worker.set_version(event.message.version());
  *worker.mutable_devices() = event.message.devices();
  entry.worker = worker;
  entry.statuses.clear();
  TakeStatuses(event.message.statuses(), &entry);
  out_.effects.push_back(PutWorker{std::move(worker)});
  ReconcileLeases(&entry, event.message);
  schedule_needed_ = true;
}

void Coordinator::ReconcileLeases(WorkerEntry* worker, const v1::Register& message) {
  std::set<int64_t> held;
  for (const v1::HeldLease& lease : message.held()) held.insert(lease.epoch());
  v1::CoordinatorMessage answer;
  v1::Registered* registered = answer.mutable_registered();
  registered->set_heartbeat_interval_s(absl::ToDoubleSeconds(options_.heartbeat_interval));
  registered->set_lease_timeout_s(absl::ToDoubleSeconds(options_.lease_timeout));
  for (int64_t epoch : held) {
    if (worker->live.count(epoch) == 0) registered->add_release(epoch);
  }
  // `Registered` comes first on the wire, whatever the leases then cause.
  const size_t place = out_.actions.size();
  std::vector<v1::CoordinatorMessage> after;
  const std::set<int64_t> live = worker->live;
  for (int64_t epoch : live) {
    LeaseRecord* lease = FindLease(epoch, worker->worker.name());
    ReconcileLease(lease, held.count(epoch) != 0, registered, &after);
  }
  out_.actions.insert(out_.actions.begin() + static_cast<std::ptrdiff_t>(place),
                      SendToSession{worker->session, std::move(answer)});
  for (v1::CoordinatorMessage& next : after) Send(worker->session, std::move(next));
}

void Coordinator::ReconcileLease(LeaseRecord* lease, bool held, v1::Registered* registered,
                                 std::vector<v1::CoordinatorMessage>* after) {
  JobEntry* entry = CurrentJob(*lease);
  if (held) {
    if (entry == nullptr || lease->stop == v1::STOP_MODE_KILL) {
      registered->add_release(lease->epoch);
    } else if (lease->stop != v1::STOP_MODE_UNSPECIFIED) {
      v1::CoordinatorMessage stop;  // it may have been on the wire when the link broke
      stop.mutable_stop()->set_epoch(lease->epoch);
      stop.mutable_stop()->set_mode(lease->stop);
      after->push_back(std::move(stop));
    }
    return;
  }
  // Nothing was ever heard under it: the Lease message was lost with the link, or the agent died
  // with it. Either way no process is alive, so it can begin (again), a few times.
  const bool never_began = lease->last_sequence == 0 && lease->phase == LeasePhase::kLeased &&
                           lease->stop == v1::STOP_MODE_UNSPECIFIED;
  if (entry != nullptr && never_began && lease->deliveries < kDeliveriesMax) {
    SendLease(lease, *entry, workers_.at(lease->worker).session);
    return;
  }
  v1::LeaseEnded ended;
  if (lease->stop != v1::STOP_MODE_UNSPECIFIED) {
    ended.set_outcome(v1::LEASE_OUTCOME_STOPPED);
  } else {
    ended.set_outcome(v1::LEASE_OUTCOME_FAILED);
    ended.set_cause(v1::FAILURE_CAUSE_WORKER_LOST);
    ended.set_message(absl::StrCat("the agent of ", lease->worker, " came back without the job"));
  }
  EndLease(lease, ended);
}

void Coordinator::On(const HeartbeatEvent& event) {
  WorkerEntry* worker = HeardFrom(event.session);
  if (worker != nullptr) TakeStatuses(event.message.statuses(), worker);
}

// Only of devices that the worker has registered.
void Coordinator::TakeStatuses(const google::protobuf::RepeatedPtrField<v1::DeviceStatus>& statuses,
                               WorkerEntry* worker) {
  std::map<std::string, v1::DeviceStatus> news;
  for (const v1::DeviceStatus& status : statuses) news[status.device()] = status;
  for (const v1::Device& device : worker->worker.devices()) {
    const auto it = news.find(device.id());
    if (it == news.end()) continue;
    const bool was_faulty = worker->Faulty(device.id());
    worker->statuses[device.id()] = it->second;
    schedule_needed_ = schedule_needed_ || was_faulty != worker->Faulty(device.id());
  }
}

void Coordinator::On(const SessionClosedEvent& event) {
  const auto it = sessions_.find(event.session);
  if (it == sessions_.end()) return;
  WorkerEntry& worker = workers_.at(it->second);
  worker.session = 0;
  sessions_.erase(it);
  for (auto& [key, waiting] : rendezvous_waiters_) waiting.erase(event.session);
  schedule_needed_ = true;
}

void Coordinator::On(const TickEvent& event) {
  // If this process itself stood still, silence says nothing about the workers.
  const absl::Duration gap = now_ - last_tick_;
  if (gap > options_.lease_timeout / 4) {
    for (auto& [name, worker] : workers_) {
      worker.last_heard = std::min(now_, worker.last_heard + gap);
    }
  }
  last_tick_ = now_;
  for (auto& [name, worker] : workers_) {
    if (!worker.lost && now_ - worker.last_heard > options_.lease_timeout) MarkLost(&worker);
  }
  ForgetOldWorkers();
  ExpireWaits();
  ExpireRequests();
}

void Coordinator::MarkLost(WorkerEntry* worker) {
  worker->lost = true;
  const std::string name = worker->worker.name();
  if (worker->session != 0) {
    sessions_.erase(worker->session);
    out_.actions.push_back(CloseSession{
        worker->session,
        absl::DeadlineExceededError(absl::StrCat("nothing was heard from ", name, " for ",
                                                 absl::FormatDuration(options_.lease_timeout)))});
    worker->session = 0;
  }
  v1::LeaseEnded lost;
  lost.set_outcome(v1::LEASE_OUTCOME_FAILED);
  lost.set_cause(v1::FAILURE_CAUSE_WORKER_LOST);
  lost.set_message(absl::StrCat("nothing was heard from ", name, " for ",
                                absl::FormatDuration(options_.lease_timeout)));
  for (int64_t epoch : std::set<int64_t>(worker->live)) {
    LeaseRecord* lease = FindLease(epoch, name);
    JobEntry* entry = CurrentJob(*lease);
    lease->abandoned = true;
    MarkDirty(*lease);
    if (entry == nullptr) continue;
    if (lease->kind == v1::LEASE_KIND_VALIDATE) {
      ValidationGone(entry, lost);
    } else {
      PartGone(entry, *lease, lost);
    }
  }
  schedule_needed_ = true;
}

void Coordinator::ForgetOldWorkers() {
  for (auto it = workers_.begin(); it != workers_.end();) {
    const WorkerEntry& worker = it->second;
    const bool forget =
        worker.session == 0 && worker.live.empty() && now_ - worker.last_heard > kWorkerRetention;
    if (forget) out_.effects.push_back(DeleteWorker{it->first});
    it = forget ? workers_.erase(it) : std::next(it);
  }
}

void Coordinator::ExpireWaits() {
  const std::map<CallId, std::string> waiting = waiting_calls_;
  for (const auto& [call, job] : waiting) {
    JobEntry* entry = FindJob(job);
    auto& waiters = entry->waiters;
    const auto it = std::find_if(waiters.begin(), waiters.end(), [call = call](const auto& waiter) {
      return waiter.first == call;
    });
    if (it->second > now_) continue;
    waiters.erase(it);
    waiting_calls_.erase(call);
    CompleteWith(call, *entry);
  }
}

void Coordinator::ExpireRequests() {
  for (auto it = requests_.begin(); it != requests_.end();) {
    const bool expired = now_ - it->second.time > kRequestRetention;
    if (expired) out_.effects.push_back(DeleteRequest{it->first});
    it = expired ? requests_.erase(it) : std::next(it);
  }
}

void Coordinator::On(const RendezvousSetEvent& event) {
  const WorkerEntry* worker = HeardFrom(event.session);
  if (worker == nullptr) return;
  const int64_t epoch = event.message.epoch();
  const LeaseRecord* lease = FindLease(epoch, worker->worker.name());
  if (lease == nullptr || lease->phase == LeasePhase::kEnded || CurrentJob(*lease) == nullptr) {
    Send(event.session, NotCurrent(epoch, lease));
    return;
  }
  const std::pair<int64_t, std::string> key{epoch, event.message.key()};
  const auto first = rendezvous_.lower_bound({epoch, ""});
  const auto last = rendezvous_.lower_bound({epoch + 1, ""});
  if (event.message.value().size() > kRendezvousValueBytesMax ||
      event.message.key().size() > kRendezvousKeyBytesMax ||
      std::distance(first, last) >= kRendezvousKeysMax) {
    out_.actions.push_back(CloseSession{
        event.session, absl::InvalidArgumentError("a rendezvous key or value is too large")});
    On(SessionClosedEvent{event.session});
    return;
  }
  // The first value stays: agents send again after a reconnect.
  if (!rendezvous_.emplace(key, event.message.value()).second) return;
  out_.effects.push_back(PutRendezvous{epoch, key.second, event.message.value()});
  v1::CoordinatorMessage answer;
  answer.mutable_rendezvous_value()->set_epoch(epoch);
  answer.mutable_rendezvous_value()->set_key(key.second);
  answer.mutable_rendezvous_value()->set_value(event.message.value());
  for (SessionId session : rendezvous_waiters_[key]) Send(session, answer);
  rendezvous_waiters_.erase(key);
}

void Coordinator::On(const RendezvousGetEvent& event) {
  const WorkerEntry* worker = HeardFrom(event.session);
  if (worker == nullptr) return;
  const int64_t epoch = event.message.epoch();
  const LeaseRecord* lease = FindLease(epoch, worker->worker.name());
  if (lease == nullptr || lease->phase == LeasePhase::kEnded || CurrentJob(*lease) == nullptr) {
    Send(event.session, NotCurrent(epoch, lease));
    return;
  }
  const std::pair<int64_t, std::string> key{epoch, event.message.key()};
  const auto it = rendezvous_.find(key);
  if (it == rendezvous_.end()) {
    rendezvous_waiters_[key].insert(event.session);
    return;
  }
  v1::CoordinatorMessage answer;
  answer.mutable_rendezvous_value()->set_epoch(epoch);
  answer.mutable_rendezvous_value()->set_key(key.second);
  answer.mutable_rendezvous_value()->set_value(it->second);
  Send(event.session, std::move(answer));
}

}  // namespace attune
