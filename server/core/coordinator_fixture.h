// What coordinator tests share. Every step goes through a real store, and Restart() drops the
// coordinator and loads what the store has.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/job_spec.h"
#include "server/core/coordinator.h"
#include "server/core/errors.h"
#include "server/core/job_state.h"
#include "server/store/store.h"

namespace attune {

class CoordinatorTest : public testing::Test {
 protected:
  void SetUp() override {
    auto store = Store::Open("", Retention());
    ASSERT_TRUE(store.ok());
    store_ = *std::move(store);
    Restart();
  }

  void Restart() {
    auto stored = store_->Load();
    ASSERT_TRUE(stored.ok()) << stored.status();
    CoordinatorOptions options;
    options.artifact_ready = [this](const std::string& name) { return missing_.count(name) == 0; };
    coordinator_ = std::make_unique<Coordinator>(options, *std::move(stored), now_);
    sent_.clear();
  }

  // Steps, schedules, commits; keeps what was sent and answered.
  void Do(const CoordinatorEvent& event) {
    Take(coordinator_->Step(event, now_));
    Take(coordinator_->Schedule(now_));
  }
  void Take(StepResult result) {
    ASSERT_TRUE(store_->Commit(result.effects).ok());
    for (const Effect& effect : result.effects) {
      if (const auto* event = std::get_if<AppendEvent>(&effect)) events_.push_back(event->event);
    }
    for (const Action& action : result.actions) {
      if (const auto* send = std::get_if<SendToSession>(&action)) {
        sent_[send->session].push_back(send->message);
      } else if (const auto* complete = std::get_if<CompleteCall>(&action)) {
        answers_[complete->call] = *complete;
      } else if (const auto* close = std::get_if<CloseSession>(&action)) {
        closed_.insert(close->session);
      } else if (const auto* remove = std::get_if<RemoveArtifact>(&action)) {
        removed_.push_back(remove->artifact);
      }
    }
  }
  void Pass(absl::Duration time) {  // with ticks, as the runner does
    for (const absl::Time end = now_ + time; now_ < end;) {
      now_ += absl::Milliseconds(250);
      for (SessionId session : beating_) Do(HeartbeatEvent{session});
      Do(TickEvent{});
    }
  }

  v1::JobSpec MakeSpec(int devices = 1) {
    v1::JobSpec spec;
    spec.mutable_model()->mutable_source()->set_path("m");
    spec.add_datasets()->mutable_source()->set_path("d");
    spec.mutable_resources()->set_devices(devices);
    spec.mutable_checkpoints()->set_keep(2);
    ApplyDefaults("job", &spec);
    return spec;
  }
  std::string Create(const v1::JobSpec& spec) {
    const std::string name = absl::StrCat("jobs/j", ++jobs_);
    Do(CreateJobEvent{++call_, name, spec, "", ""});
    EXPECT_TRUE(answers_[call_].status.ok()) << answers_[call_].status;
    return name;
  }
  SessionId Register(const std::string& worker, int cpus, const std::vector<int64_t>& held = {}) {
    const SessionId session = ++session_;
    RegisterEvent event{session, {}};
    event.message.set_worker(worker);
    for (int i = 0; i < cpus; ++i) {
      v1::Device* device = event.message.add_devices();
      device->set_id(absl::StrCat("cpu:", i));
      device->set_type(v1::DEVICE_TYPE_CPU);
    }
    for (int64_t epoch : held) event.message.add_held()->set_epoch(epoch);
    beating_.insert(session);
    Do(event);
    return session;
  }
  void Disconnect(SessionId session) {
    beating_.erase(session);
    Do(SessionClosedEvent{session});
  }
  // The last Lease of this kind that the session got.
  v1::Lease LastLease(SessionId session, v1::LeaseKind kind) {
    v1::Lease lease;
    for (const auto& message : sent_[session]) {
      if (message.has_lease() && message.lease().kind() == kind) lease = message.lease();
    }
    EXPECT_NE(lease.epoch(), 0) << "no lease was sent";
    return lease;
  }
  const v1::CoordinatorMessage& Last(SessionId session) { return sent_[session].back(); }
  std::vector<v1::StopMode> Stops(SessionId session, int64_t epoch) {
    std::vector<v1::StopMode> modes;
    for (const auto& message : sent_[session]) {
      if (message.has_stop() && message.stop().epoch() == epoch) {
        modes.push_back(message.stop().mode());
      }
    }
    return modes;
  }

  void Report(SessionId session, int64_t epoch, v1::Report report) {
    report.set_epoch(epoch);
    report.set_sequence(++sequences_[{session_worker_[session], epoch}]);
    Do(ReportEvent{session, report});
  }
  void End(SessionId session, int64_t epoch, v1::LeaseOutcome outcome,
           v1::FailureCause cause = v1::FAILURE_CAUSE_UNSPECIFIED) {
    v1::Report report;
    report.mutable_ended()->set_outcome(outcome);
    report.mutable_ended()->set_cause(cause);
    report.mutable_ended()->set_message("why");
    Report(session, epoch, report);
  }
  void Running(SessionId session, int64_t epoch) {
    v1::Report report;
    report.mutable_running()->set_total_steps(10);
    Report(session, epoch, report);
  }
  void Step(SessionId session, int64_t epoch, int64_t step) {
    v1::Report report;
    report.mutable_step()->set_step(step);
    report.mutable_step()->set_trained_tokens(7);
    report.mutable_step()->set_step_s(2);
    report.mutable_step()->set_tokens_per_s(100);
    Report(session, epoch, report);
  }
  void Checkpoint(SessionId session, int64_t epoch, int64_t step, bool final = false,
                  bool best = false) {
    v1::Report report;
    report.mutable_checkpoint()->set_step(step);
    report.mutable_checkpoint()->set_artifact(absl::StrCat("artifacts/", epoch, "-", step));
    report.mutable_checkpoint()->set_final(final);
    report.mutable_checkpoint()->set_best(best);
    Report(session, epoch, report);
  }
  void Validate(SessionId session) {
    const v1::Lease lease = LastLease(session, v1::LEASE_KIND_VALIDATE);
    v1::Report report;
    report.mutable_validation()->set_model_digest(std::string(64, 'd'));
    report.mutable_validation()->set_precision(v1::PRECISION_BF16);
    report.mutable_validation()->set_total_steps(10);
    Report(session, lease.epoch(), report);
    End(session, lease.epoch(), v1::LEASE_OUTCOME_COMPLETED);
  }
  // A job that runs on one worker with `cpus` devices; session_ is the worker's.
  std::pair<std::string, int64_t> RunJob(int devices = 1, int cpus = 1) {
    const SessionId session = Register("workers/a", cpus);
    const std::string job = Create(MakeSpec(devices));
    Validate(session);
    const int64_t epoch = LastLease(session, v1::LEASE_KIND_TRAIN).epoch();
    Running(session, epoch);
    EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
    return {job, epoch};
  }
  v1::Job Get(const std::string& job) {
    const auto found = coordinator_->GetJob(job);
    EXPECT_TRUE(found.ok()) << found.status();
    return found.ok() ? *found : v1::Job();
  }
  std::vector<std::string> States(const std::string& job) {
    std::vector<std::string> states;
    for (const v1::Event& event : events_) {
      if (event.job() == job && event.kind() == v1::EVENT_KIND_STATE) {
        states.push_back(StateLabel(event.state()));
      }
    }
    return states;
  }
  absl::Status Answer() { return answers_[call_].status; }

  absl::Time now_ = absl::FromUnixSeconds(1000);
  std::unique_ptr<Store> store_;
  std::unique_ptr<Coordinator> coordinator_;
  std::map<SessionId, std::vector<v1::CoordinatorMessage>> sent_;
  std::map<CallId, CompleteCall> answers_;
  std::set<SessionId> closed_, beating_;
  std::vector<std::string> removed_;
  std::vector<v1::Event> events_;
  std::set<std::string> missing_;
  std::map<SessionId, std::string> session_worker_;  // all "": one numbering per epoch
  std::map<std::pair<std::string, int64_t>, int64_t> sequences_;
  SessionId session_ = 100;
  CallId call_ = 0;
  int jobs_ = 0;
};

}  // namespace attune
