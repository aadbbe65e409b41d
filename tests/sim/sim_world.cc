#include "tests/sim/sim_world.h"

#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "proto/job_spec.h"
#include "server/core/job_state.h"

namespace attune::sim {
namespace {

constexpr absl::Duration kTurn = absl::Milliseconds(100);
constexpr absl::Duration kFaultyPhase = absl::Seconds(40);
constexpr absl::Duration kCalmPhase = absl::Seconds(1200);
constexpr absl::Duration kLeaseTimeout = absl::Seconds(4);

v1::JobSpec MakeSpec(Random* random, int most_devices) {
  v1::JobSpec spec;
  spec.set_name("sim");
  spec.mutable_model()->mutable_source()->set_path(OneIn(random, 12) ? "broken" : "model");
  spec.add_datasets()->mutable_source()->set_path("data");
  spec.mutable_schedule()->set_steps(3 + Below(random, 15));
  spec.mutable_checkpoints()->set_every_steps(1 + Below(random, 5));
  spec.mutable_checkpoints()->set_keep(1 + Below(random, 3));
  spec.mutable_resources()->set_devices(1 + Below(random, most_devices));
  spec.set_priority(Below(random, 3));
  spec.mutable_retry()->set_max_restarts(OneIn(random, 3) ? Below(random, 3) : 1000);
  ApplyDefaults("sim", &spec);
  CHECK(ValidateJobSpec(spec, {.on_coordinator = true}).empty());
  return spec;
}

}  // namespace

World::World(uint64_t seed, bool trace)
    : seed_(seed), trace_(trace), random_(seed), now_(absl::FromUnixSeconds(1000000)) {
  auto store = Store::Open("", Retention{.events = 1000, .metrics = 1000, .logs = 20});
  CHECK(store.ok());
  store_ = *std::move(store);
  const int agents = 1 + Below(&random_, 4);
  for (int i = 0; i < agents; ++i) {
    agents_.emplace_back(absl::StrCat("workers/w", i), 1 + Below(&random_, 3), &ground_);
    links_.push_back({.dial_at = now_ + absl::Milliseconds(Below(&random_, 3000))});
  }
  const int jobs = 2 + Below(&random_, 6);
  for (int i = 0; i < jobs; ++i) {
    Client client;
    client.request_id = absl::StrCat("request-", i);
    client.spec = MakeSpec(&random_, agents + 1);
    client.next_try = now_ + absl::Milliseconds(Below(&random_, 15000));
    clients_.push_back(std::move(client));
  }
  StartCoordinator();
}

void World::Trace(const std::string& text) {
  if (trace_) {
    std::fprintf(stderr, "%8.1f %s\n", absl::ToDoubleSeconds(now_ - absl::FromUnixSeconds(1000000)),
                 text.c_str());
  }
}

std::string World::Broken(const std::string& what) const {
  return absl::StrCat("at ", absl::ToDoubleSeconds(now_ - absl::FromUnixSeconds(1000000)),
                      " s: ", what, "\nreplay: coordinator_sim_test --seed=", seed_, " --trace");
}

absl::Duration World::Delay() {
  return absl::Milliseconds(OneIn(&random_, 10) ? Below(&random_, 1500) : Below(&random_, 50));
}

void World::StartCoordinator() {
  absl::StatusOr<StoredState> stored = store_->Load();
  CHECK(stored.ok());
  CoordinatorOptions options;
  options.lease_timeout = kLeaseTimeout;
  options.heartbeat_interval = absl::Seconds(1);
  options.artifact_ready = [this](const std::string& artifact) {
    return ground_.artifacts.count(artifact) != 0;
  };
  coordinator_ = std::make_unique<Coordinator>(options, *std::move(stored), now_);
  Trace("coordinator starts");
}

void World::CrashCoordinator() {
  Trace("coordinator crashes");
  ++tally_.coordinator_crashes;
  coordinator_.reset();
  inbox_.clear();
  calls_.clear();
  for (size_t i = 0; i < links_.size(); ++i) DropSession(i);
  up_at_ = now_ + absl::Milliseconds(OneIn(&random_, 5) ? 6000 : Below(&random_, 2000));
}

void World::DropSession(size_t i) {
  Link& link = links_[i];
  if (link.session == 0) return;
  if (coordinator_ != nullptr) inbox_.emplace(now_ + Delay(), SessionClosedEvent{link.session});
  link.session = 0;
  link.to_agent.clear();
  link.dial_at = now_ + absl::Milliseconds(Below(&random_, 1500));
  ++tally_.sessions_lost;
}

void World::Dial(size_t i) {
  Link& link = links_[i];
  if (coordinator_ == nullptr) {
    link.dial_at = now_ + absl::Milliseconds(200);
    return;
  }
  link.session = next_session_++;
  Trace(absl::StrCat(agents_[i].name(), " dials, session ", link.session, " ",
                     agents_[i].MakeRegister().ShortDebugString()));
  agents_[i].Reconnected();
  inbox_.emplace(now_, RegisterEvent{link.session, agents_[i].MakeRegister()});
}

template <typename Event>
void World::Post(Event event, std::function<void(const absl::Status&, const v1::Job&)> answer) {
  event.call = next_call_++;
  if (coordinator_ == nullptr) return;  // nobody listens: the client sees UNAVAILABLE
  calls_[event.call] = {std::move(answer)};
  inbox_.emplace(now_ + Delay(), std::move(event));
}

void World::TryCreate(Client* client) {
  client->next_try = now_ + absl::Seconds(3);
  CreateJobEvent event;
  event.job = absl::StrCat("jobs/j", next_job_++);
  event.spec = client->spec;
  event.request_id = client->request_id;
  event.digest = client->request_id;
  Post(std::move(event), [this, client](const absl::Status& status, const v1::Job& job) {
    if (!status.ok()) {
      if (!client->deleted) failure_ = absl::StrCat("create failed: ", status.ToString());
      return;
    }
    if (!client->job.empty() && client->job != job.name()) {
      failure_ = absl::StrCat(client->request_id, " made ", client->job, " and ", job.name());
    }
    client->job = job.name();
    if (!client->deleted) invariants_.Acknowledged(job.name());
  });
}

void World::Resume(const std::string& job) {
  ResumeJobEvent event{0, job, "", {}};
  if (OneIn(&random_, 2)) event.devices = 1 + Below(&random_, 2);
  Post(std::move(event), nullptr);
}

void World::ActOnJob(const std::string& job) {
  switch (Below(&random_, 8)) {
    case 0:
      Trace(absl::StrCat("cancel ", job));
      Post(CancelJobEvent{0, job, ""}, nullptr);
      break;
    case 1:
    case 2:
    case 3:
      Trace(absl::StrCat("pause ", job));
      Post(PauseJobEvent{0, job, ""}, nullptr);
      break;
    case 4:
    case 5:
      Trace(absl::StrCat("resume ", job));
      Resume(job);
      break;
    case 6: {
      WaitJobEvent event{0, job, now_ + absl::Milliseconds(Below(&random_, 3000))};
      const CallId call = next_call_;
      const absl::Time deadline = event.deadline;
      Post(std::move(event), nullptr);
      if (coordinator_ != nullptr) calls_[call].deadline = deadline + absl::Seconds(4);
      break;
    }
    default:
      Trace(absl::StrCat("delete ", job));
      for (Client& client : clients_) {
        if (client.job != job) continue;
        Post(DeleteJobEvent{0, job, ""}, nullptr);
        client.deleted = true;
        invariants_.MayBeDeleted(job);
      }
  }
}

void World::MakeRequests(bool faults) {
  for (Client& client : clients_) {
    const bool again = faults && !client.job.empty() && OneIn(&random_, 100);
    if ((client.job.empty() && now_ >= client.next_try) || again) TryCreate(&client);
    if (client.job.empty()) continue;
    if (faults && OneIn(&random_, 60)) ActOnJob(client.job);
    // In the calm phase paused jobs are resumed, so that all can end.
    if (!faults && OneIn(&random_, 30)) Resume(client.job);
  }
}

void World::FaultAgent(size_t i) {
  SimAgent& agent = agents_[i];
  if (!agent.up()) return;
  switch (Below(&random_, 6)) {
    case 0: {
      const bool wiped = OneIn(&random_, 4);
      Trace(absl::StrCat(agent.name(), " crashes", wiped ? " and forgets" : ""));
      agent.Crash(wiped);
      DropSession(i);
      links_[i].down_until =
          now_ + absl::Milliseconds(OneIn(&random_, 3) ? 8000 : Below(&random_, 3000));
      ++tally_.agent_crashes;
      break;
    }
    case 1:
    case 2:
      Trace(absl::StrCat(agent.name(), " loses its session"));
      DropSession(i);
      if (OneIn(&random_, 3)) links_[i].dial_at = now_ + absl::Seconds(7);  // a long partition
      break;
    case 3:
      agent.CrashTrainer(v1::FAILURE_CAUSE_TRAINER_CRASH, &random_);
      break;
    case 4:
      agent.CrashTrainer(
          OneIn(&random_, 8) ? v1::FAILURE_CAUSE_OUT_OF_MEMORY : v1::FAILURE_CAUSE_STALLED,
          &random_);
      break;
    default:
      agent.SendAgain();
  }
}

void World::MakeFaults() {
  for (size_t i = 0; i < agents_.size(); ++i) {
    if (OneIn(&random_, 50)) FaultAgent(i);
  }
  if (coordinator_ != nullptr && OneIn(&random_, 120)) CrashCoordinator();
  if (OneIn(&random_, 400)) {
    Trace("coordinator stands still");
    stopped_until_ = now_ + absl::Milliseconds(Below(&random_, 12000));
  }
}

void World::MoveMessages() {
  for (size_t i = 0; i < agents_.size(); ++i) {
    SimAgent& agent = agents_[i];
    Link& link = links_[i];
    if (!agent.up() && now_ >= link.down_until) {
      Trace(absl::StrCat(agent.name(), " restarts"));
      agent.Restart();
      link.dial_at = now_;
    }
    if (!agent.up()) continue;
    if (link.session == 0 && now_ >= link.dial_at) Dial(i);
    while (!link.to_agent.empty() && link.to_agent.front().first <= now_) {
      agent.OnMessage(link.to_agent.front().second, now_, &random_);
      link.to_agent.pop_front();
    }
    agent.Advance(now_, &random_);
    if (link.session == 0 || coordinator_ == nullptr) continue;
    // Messages of a session keep their order: one delay for what is sent now, never less than
    // what was sent before got (multimap keeps equal times in order).
    const absl::Time at = now_ + absl::Milliseconds(Below(&random_, 90));
    inbox_.emplace(at, HeartbeatEvent{link.session});
    for (v1::WorkerMessage& message : agent.TakeOutgoing()) {
      if (message.has_report()) {
        inbox_.emplace(at, ReportEvent{link.session, std::move(*message.mutable_report())});
      } else if (message.has_rendezvous_set()) {
        inbox_.emplace(at, RendezvousSetEvent{link.session, message.rendezvous_set()});
      } else {
        inbox_.emplace(at, RendezvousGetEvent{link.session, message.rendezvous_get()});
      }
    }
  }
}

std::string World::Commit(const std::vector<Effect>& effects) {
  if (effects.empty()) return "";
  const absl::Status status = store_->Commit(effects);
  if (!status.ok()) return status.ToString();
  ++tally_.commits;
  return invariants_.AfterCommit(effects);
}

std::string World::Perform(const std::vector<Action>& actions) {
  for (const Action& action : actions) {
    if (const auto* send = std::get_if<SendToSession>(&action)) {
      for (Link& link : links_) {
        if (link.session != send->session) continue;
        if (!send->message.has_report_ack()) {
          Trace(absl::StrCat("to session ", link.session, ": ",
                             send->message.ShortDebugString().substr(0, 160)));
        }
        absl::Time at = now_ + Delay();
        if (!link.to_agent.empty()) at = std::max(at, link.to_agent.back().first);
        link.to_agent.emplace_back(at, send->message);
      }
    } else if (const auto* close = std::get_if<CloseSession>(&action)) {
      for (size_t i = 0; i < links_.size(); ++i) {
        if (links_[i].session == close->session) DropSession(i);
      }
    } else if (const auto* complete = std::get_if<CompleteCall>(&action)) {
      const auto it = calls_.find(complete->call);
      if (it == calls_.end()) return absl::StrCat("call ", complete->call, " was answered twice");
      const Call call = std::move(it->second);
      calls_.erase(it);
      if (call.answer) call.answer(complete->status, complete->job);
    } else if (const auto* remove = std::get_if<RemoveArtifact>(&action)) {
      std::string broken = invariants_.Removed(remove->artifact);
      if (!broken.empty()) return broken;
      ground_.artifacts.erase(remove->artifact);
    } else if (std::holds_alternative<ObserveQueueWait>(action)) {
      ++tally_.attempts;
    }
  }
  return "";
}

// As Runner does it: several steps, one commit, then the actions. A crash may come before the
// commit, after it, or between two actions.
std::string World::RunBatch(bool faults) {
  std::vector<Effect> effects;
  std::vector<Action> actions;
  const auto add = [&](StepResult result) {
    for (Effect& effect : result.effects) {
      if (const auto* event = std::get_if<AppendEvent>(&effect)) {
        Trace(absl::StrCat(event->event.job(), " ", StateLabel(event->event.state()), " ",
                           event->event.reason(), ": ", event->event.message()));
      }
      effects.push_back(std::move(effect));
    }
    for (Action& action : result.actions) actions.push_back(std::move(action));
  };
  while (!inbox_.empty() && inbox_.begin()->first <= now_) {
    add(coordinator_->Step(inbox_.begin()->second, now_));
    inbox_.erase(inbox_.begin());
  }
  add(coordinator_->Step(TickEvent{}, now_));
  add(coordinator_->Schedule(now_));
  if (faults && !effects.empty() && OneIn(&random_, 150)) {
    CrashCoordinator();
    return "";
  }
  if (std::string broken = Commit(effects); !broken.empty()) return broken;
  if (std::string broken = invariants_.OfState(*coordinator_); !broken.empty()) return broken;
  if (faults && !actions.empty() && OneIn(&random_, 150)) {
    actions.resize(static_cast<size_t>(Below(&random_, static_cast<int>(actions.size()))));
    std::string broken = Perform(actions);
    CrashCoordinator();
    return broken;
  }
  return Perform(actions);
}

std::string World::Turn(bool faults) {
  now_ += kTurn;
  if (coordinator_ == nullptr && now_ >= up_at_) StartCoordinator();
  if (faults) MakeFaults();
  MakeRequests(faults);
  MoveMessages();
  if (coordinator_ != nullptr && now_ >= stopped_until_) {
    if (std::string broken = RunBatch(faults); !broken.empty()) return Broken(broken);
  }
  if (!failure_.empty()) return Broken(failure_);
  if (std::string broken = invariants_.OfProcesses(agents_); !broken.empty()) return Broken(broken);
  for (const auto& [call, entry] : calls_) {
    const bool late = entry.deadline < now_ && stopped_until_ + absl::Seconds(1) < now_;
    if (late) return Broken(absl::StrCat("wait ", call, " was not answered"));
  }
  return "";
}

bool World::AllEnded() {
  if (coordinator_ == nullptr) return false;
  int devices = 0;
  for (const SimAgent& agent : agents_) devices += agent.devices();
  for (const Client& client : clients_) {
    if (client.job.empty()) return false;
  }
  for (const v1::Job& job : coordinator_->ListJobs({}, 0, 10000).jobs) {
    const bool never = job.state() == v1::JOB_STATE_QUEUED && job.reason() == "NO_SUCH_DEVICES" &&
                       job.spec().resources().devices() > devices;
    if (!IsFinal(job.state()) && !never) return false;
  }
  return true;
}

std::string World::RunPhase(absl::Duration length, bool faults) {
  const absl::Time end = now_ + length;
  while (now_ < end) {
    if (std::string broken = Turn(faults); !broken.empty()) return broken;
    if (!faults && AllEnded()) return "";
  }
  if (faults) return "";
  std::string left;
  for (const v1::Job& job : coordinator_->ListJobs({}, 0, 10000).jobs) {
    absl::StrAppend(&left, "\n  ", job.name(), " ", StateLabel(job.state()), " ", job.reason(),
                    ": ", job.message());
  }
  return Broken(absl::StrCat("jobs did not end without faults:", left));
}

std::string World::Run() {
  std::string broken = RunPhase(kFaultyPhase, /*faults=*/true);
  if (broken.empty()) broken = RunPhase(kCalmPhase, /*faults=*/false);
  if (!broken.empty()) return broken;
  for (const v1::Job& job : coordinator_->ListJobs({}, 0, 10000).jobs) ++tally_.ended[job.state()];
  // After the last job every device is free again.
  for (int i = 0; i < 300 && !coordinator_->LiveLeases().empty(); ++i) {
    if (broken = Turn(/*faults=*/false); !broken.empty()) return broken;
  }
  for (const LeaseRecord& lease : coordinator_->LiveLeases()) {
    return Broken(absl::StrCat("after the last job a lease is left: epoch ", lease.epoch, " of ",
                               lease.job, " on ", lease.worker, ", stop ",
                               v1::StopMode_Name(lease.stop), ", last report ", lease.last_sequence,
                               lease.abandoned ? ", abandoned" : ""));
  }
  return "";
}

}  // namespace attune::sim
