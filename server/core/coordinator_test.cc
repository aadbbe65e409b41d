// The coordinator's promises one by one, without sockets and without a clock. Every step goes
// through a real store, and Restart() drops the coordinator and loads what the store has.
#include "server/core/coordinator.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/job_spec.h"
#include "server/core/errors.h"
#include "server/core/job_state.h"
#include "server/store/store.h"

namespace attune {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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
  void Checkpoint(SessionId session, int64_t epoch, int64_t step, bool final = false) {
    v1::Report report;
    report.mutable_checkpoint()->set_step(step);
    report.mutable_checkpoint()->set_artifact(absl::StrCat("artifacts/", epoch, "-", step));
    report.mutable_checkpoint()->set_final(final);
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

TEST_F(CoordinatorTest, RunsAJobToItsEnd) {
  const auto [job, epoch] = RunJob();
  for (int step = 1; step <= 10; ++step) Step(session_, epoch, step);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 70);
  Checkpoint(session_, epoch, 10, /*final=*/true);
  End(session_, epoch, v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_THAT(States(job), ElementsAre("VALIDATING", "QUEUED", "STARTING", "RUNNING", "SUCCEEDED"));
  EXPECT_EQ(Get(job).final_checkpoint(), job + "/checkpoints/10");
  EXPECT_EQ(Get(job).spec().precision(), v1::PRECISION_BF16);
  EXPECT_EQ(Get(job).spec().model().digest(), std::string(64, 'd'));
  EXPECT_TRUE(coordinator_->LiveLeases().empty());
}

TEST_F(CoordinatorTest, WaitsForAWorkerToValidateAndSaysSo) {
  const std::string job = Create(MakeSpec());
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_VALIDATING);
  EXPECT_EQ(Get(job).reason(), "WAITING_FOR_WORKER");
  Register("workers/a", 1);
  EXPECT_EQ(Get(job).reason(), "VALIDATING_ON_WORKER");
}

TEST_F(CoordinatorTest, WrongInputFailsBeforeAnyDeviceIsLeased) {
  const SessionId session = Register("workers/a", 1);
  const std::string job = Create(MakeSpec());
  v1::Report report;
  report.mutable_validation()->add_errors("model.source: no such directory");
  Report(session, LastLease(session, v1::LEASE_KIND_VALIDATE).epoch(), report);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(Get(job).failure_cause(), v1::FAILURE_CAUSE_INVALID);
  EXPECT_THAT(Get(job).message(), HasSubstr("no such directory"));
  EXPECT_EQ(Get(job).attempts_size(), 0);
}

TEST_F(CoordinatorTest, AGangSpansWorkersAndRunsWhenAllHaveLoaded) {
  const SessionId a = Register("workers/a", 2);
  const std::string job = Create(MakeSpec(3));
  Validate(a);
  EXPECT_EQ(Get(job).reason(), "NO_SUCH_DEVICES");
  const SessionId b = Register("workers/b", 1);
  const v1::Lease first = LastLease(a, v1::LEASE_KIND_TRAIN);
  const v1::Lease second = LastLease(b, v1::LEASE_KIND_TRAIN);
  EXPECT_EQ(first.epoch(), second.epoch());
  EXPECT_EQ(first.first_rank(), 0);
  EXPECT_EQ(second.first_rank(), 2);
  EXPECT_EQ(second.world_size(), 3);
  session_worker_ = {{a, "a"}, {b, "b"}};
  Running(a, first.epoch());
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_STARTING);
  Running(b, second.epoch());
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
  // One part fails: the other is killed; only then the job is queued again.
  End(b, second.epoch(), v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RECOVERING);
  EXPECT_THAT(Stops(a, first.epoch()), ElementsAre(v1::STOP_MODE_KILL));
  End(a, first.epoch(), v1::LEASE_OUTCOME_STOPPED);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(Get(job).attempt(), 2);
  EXPECT_EQ(Get(job).restarts(), 1);
  EXPECT_GT(LastLease(a, v1::LEASE_KIND_TRAIN).epoch(), first.epoch());
}

TEST_F(CoordinatorTest, RecoveryGoesBackToTheLastCheckpointAndSaysWhere) {
  const auto [job, epoch] = RunJob();
  for (int step = 1; step <= 5; ++step) Step(session_, epoch, step);
  Checkpoint(session_, epoch, 4);  // its upload ended after step 5
  End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_STALLED);
  const v1::Lease lease = LastLease(session_, v1::LEASE_KIND_TRAIN);
  EXPECT_EQ(lease.checkpoint_step(), 4);
  EXPECT_EQ(lease.checkpoint_artifact(), absl::StrCat("artifacts/", epoch, "-4"));
  EXPECT_EQ(Get(job).progress().step(), 4);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 28);
  const v1::Event* recovery = nullptr;
  for (const v1::Event& event : events_) {
    if (event.kind() == v1::EVENT_KIND_RECOVERY) recovery = &event;
  }
  ASSERT_NE(recovery, nullptr);
  EXPECT_EQ(recovery->step(), 4);
  EXPECT_EQ(recovery->reason(), "STALLED");
  EXPECT_THAT(recovery->message(), HasSubstr("goes back to step 4"));
}

TEST_F(CoordinatorTest, RestartsAreCountedAndEnd) {
  auto [job, epoch] = RunJob();
  for (int restart = 1; restart <= 3; ++restart) {
    End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
    EXPECT_EQ(Get(job).restarts(), restart);
    epoch = LastLease(session_, v1::LEASE_KIND_TRAIN).epoch();
  }
  End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(Get(job).failure_cause(), v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_EQ(Get(job).attempts_size(), 4);
}

TEST_F(CoordinatorTest, SomeCausesAreNeverRetried) {
  for (v1::FailureCause cause :
       {v1::FAILURE_CAUSE_INVALID, v1::FAILURE_CAUSE_OUT_OF_MEMORY, v1::FAILURE_CAUSE_DIVERGED}) {
    SetUp();
    sequences_.clear();
    const auto [job, epoch] = RunJob();
    End(session_, epoch, v1::LEASE_OUTCOME_FAILED, cause);
    EXPECT_EQ(Get(job).state(), v1::JOB_STATE_FAILED) << CauseLabel(cause);
    EXPECT_EQ(Get(job).failure_cause(), cause);
    EXPECT_EQ(Get(job).restarts(), 0);
  }
}

TEST_F(CoordinatorTest, PauseWritesACheckpointAndResumeMayChangeDevices) {
  const auto [job, epoch] = RunJob(1, 2);
  for (int step = 1; step <= 3; ++step) Step(session_, epoch, step);
  Do(PauseJobEvent{++call_, job, ""});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_PAUSING);
  EXPECT_THAT(Stops(session_, epoch), ElementsAre(v1::STOP_MODE_CHECKPOINT));
  Checkpoint(session_, epoch, 3);
  End(session_, epoch, v1::LEASE_OUTCOME_STOPPED);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_PAUSED);
  EXPECT_EQ(Get(job).restarts(), 0);
  Do(ResumeJobEvent{++call_, job, "", 0});
  EXPECT_TRUE(absl::IsInvalidArgument(Answer())) << Answer();
  Do(ResumeJobEvent{++call_, job, "", 2});
  EXPECT_TRUE(Answer().ok());
  const v1::Lease lease = LastLease(session_, v1::LEASE_KIND_TRAIN);
  EXPECT_EQ(lease.world_size(), 2);
  EXPECT_EQ(lease.checkpoint_step(), 3);
  EXPECT_EQ(lease.spec().parallelism().data(), 2);
}

TEST_F(CoordinatorTest, APausingJobWhoseTrainerDiesIsPausedAtItsLastCheckpoint) {
  const auto [job, epoch] = RunJob();
  for (int step = 1; step <= 3; ++step) Step(session_, epoch, step);
  Checkpoint(session_, epoch, 2);
  Do(PauseJobEvent{++call_, job, ""});
  End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_PAUSED);
  EXPECT_EQ(Get(job).progress().step(), 2);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 14);
}

TEST_F(CoordinatorTest, CancelKillsAndFreesDevicesWhenTheProcessesAreGone) {
  const auto [job, epoch] = RunJob();
  const std::string next = Create(MakeSpec());
  Validate(session_);
  EXPECT_EQ(Get(next).reason(), "WAITING_FOR_DEVICES");
  Do(CancelJobEvent{++call_, job, ""});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_CANCELLING);
  EXPECT_THAT(Stops(session_, epoch), ElementsAre(v1::STOP_MODE_KILL));
  EXPECT_EQ(Get(next).state(), v1::JOB_STATE_QUEUED) << "the device was given away too early";
  Do(CancelJobEvent{++call_, job, ""});
  EXPECT_TRUE(Answer().ok()) << "cancel is idempotent";
  End(session_, epoch, v1::LEASE_OUTCOME_STOPPED);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(Get(next).state(), v1::JOB_STATE_STARTING);
}

TEST_F(CoordinatorTest, CancelBeforeDevicesIsImmediateAndFinalStatesStay) {
  const std::string job = Create(MakeSpec());
  Do(CancelJobEvent{++call_, job, ""});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_CANCELLED);
  Do(PauseJobEvent{++call_, job, ""});
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer()));
  EXPECT_EQ(ReasonOf(Answer()), "ILLEGAL_STATE");
  Do(ResumeJobEvent{++call_, job, "", {}});
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer()));
}

TEST_F(CoordinatorTest, AJobPausedBeforeItsValidationIsValidatedAfterIt) {
  const SessionId session = Register("workers/a", 1);
  const std::string job = Create(MakeSpec());
  const int64_t epoch = LastLease(session, v1::LEASE_KIND_VALIDATE).epoch();
  Do(PauseJobEvent{++call_, job, ""});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_PAUSED);
  EXPECT_THAT(Stops(session, epoch), ElementsAre(v1::STOP_MODE_KILL));
  Do(ResumeJobEvent{++call_, job, "", {}});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_VALIDATING);
  EXPECT_GT(LastLease(session, v1::LEASE_KIND_VALIDATE).epoch(), epoch);
}

TEST_F(CoordinatorTest, DuplicatesAreAcknowledgedAndIgnoredAndGapsAreNotAccepted) {
  const auto [job, epoch] = RunJob();
  v1::Report report;
  report.set_epoch(epoch);
  report.set_sequence(2);
  report.mutable_step()->set_step(1);
  report.mutable_step()->set_trained_tokens(7);
  Do(ReportEvent{session_, report});
  Do(ReportEvent{session_, report});
  EXPECT_EQ(Last(session_).report_ack().sequence(), 2);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 7);
  report.set_sequence(4);
  Do(ReportEvent{session_, report});
  EXPECT_EQ(Last(session_).report_ack().sequence(), 2);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 7);
}

TEST_F(CoordinatorTest, UnknownAndEndedEpochsAreStale) {
  const auto [job, epoch] = RunJob();
  v1::Report report;
  report.set_epoch(epoch + 100);
  report.set_sequence(1);
  report.mutable_step()->set_step(1);
  Do(ReportEvent{session_, report});
  EXPECT_EQ(Last(session_).stale().epoch(), epoch + 100);
  End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
  Step(session_, epoch, 9);
  EXPECT_EQ(Last(session_).stale().epoch(), epoch);
  EXPECT_EQ(Get(job).progress().step(), 0);
}

TEST_F(CoordinatorTest, ALostWorkersDevicesStayBlockedUntilItProvesThatTheyAreFree) {
  const auto [job, epoch] = RunJob();
  const SessionId other = Register("workers/b", 1);
  Disconnect(session_ - 1);
  Pass(absl::Seconds(14));
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING) << "given up too early";
  Pass(absl::Seconds(2));
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(Get(job).restarts(), 1);
  const v1::Lease second = LastLease(other, v1::LEASE_KIND_TRAIN);
  EXPECT_THAT(Get(job).devices(), ElementsAre("b/cpu:0"));
  // It comes back with the old processes: they must go before its device is used again.
  const std::string next = Create(MakeSpec());
  const SessionId back = Register("workers/a", 1, {epoch});
  EXPECT_THAT(sent_[back][0].registered().release(), ElementsAre(epoch));
  sequences_.clear();
  v1::Report report;  // the zombie's checkpoint changes nothing
  report.mutable_checkpoint()->set_step(5);
  report.mutable_checkpoint()->set_artifact("artifacts/zombie");
  report.set_epoch(epoch);
  report.set_sequence(2);
  Do(ReportEvent{back, report});
  EXPECT_TRUE(coordinator_->ListCheckpoints(job)->empty());
  EXPECT_EQ(Get(next).state(), v1::JOB_STATE_VALIDATING);
  report.Clear();
  report.mutable_ended()->set_outcome(v1::LEASE_OUTCOME_STOPPED);
  report.set_epoch(epoch);
  report.set_sequence(3);
  Do(ReportEvent{back, report});
  Validate(other);
  EXPECT_EQ(Get(next).state(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(LastLease(back, v1::LEASE_KIND_TRAIN).job(), next);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(second.job(), job);
}

TEST_F(CoordinatorTest, TrainingGoesOnWhenTheWorkerComesBackInTime) {
  const auto [job, epoch] = RunJob();
  Step(session_, epoch, 1);
  Disconnect(session_);
  Pass(absl::Seconds(10));
  Register("workers/a", 1, {epoch});
  EXPECT_EQ(sent_[session_].size(), 1u) << "only Registered is sent";
  EXPECT_TRUE(sent_[session_][0].registered().release().empty());
  Pass(absl::Seconds(30));
  Step(session_, epoch, 2);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(Get(job).attempt(), 1);
}

TEST_F(CoordinatorTest, ARestartOfTheCoordinatorStopsNoTrainer) {
  const auto [job, epoch] = RunJob();
  Step(session_, epoch, 1);
  beating_.clear();
  now_ += absl::Hours(1);  // it was down for long; workers get their timeout anew
  Restart();
  Pass(absl::Seconds(10));
  Register("workers/a", 1, {epoch});
  Step(session_, epoch, 2);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(Get(job).attempt(), 1);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 14);
  Checkpoint(session_, epoch, 1);
  EXPECT_EQ(coordinator_->ListCheckpoints(job)->size(), 1u);
  End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_EQ(Get(job).progress().trained_tokens(), 7) << "tokens at step 1 were forgotten";
}

TEST_F(CoordinatorTest, AProcessThatStoodStillDoesNotBlameItsWorkers) {
  const auto [job, epoch] = RunJob();
  now_ += absl::Seconds(60);  // SIGSTOP: heartbeats are still in the queue behind the tick
  Do(TickEvent{});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
  Pass(absl::Seconds(5));
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
}

TEST_F(CoordinatorTest, ALeaseThatNeverArrivedIsSentAgain) {
  const SessionId first = Register("workers/a", 1);
  const std::string job = Create(MakeSpec());
  Validate(first);
  const int64_t epoch = LastLease(first, v1::LEASE_KIND_TRAIN).epoch();
  Restart();  // the message was lost with the process
  const SessionId second = Register("workers/a", 1);
  EXPECT_EQ(LastLease(second, v1::LEASE_KIND_TRAIN).epoch(), epoch);
  EXPECT_EQ(Get(job).restarts(), 0);
}

TEST_F(CoordinatorTest, AnAgentThatForgotALeaseHasLostIt) {
  const auto [job, epoch] = RunJob();
  Register("workers/a", 1);
  EXPECT_EQ(Get(job).attempt(), 2);
  EXPECT_EQ(Get(job).restarts(), 1);
  EXPECT_EQ(Get(job).attempts(0).failure_cause(), v1::FAILURE_CAUSE_WORKER_LOST);
}

TEST_F(CoordinatorTest, ANewSessionReplacesTheOld) {
  const auto [job, epoch] = RunJob();
  const SessionId old = session_;
  Register("workers/a", 1, {epoch});
  EXPECT_EQ(closed_.count(old), 1u);
  const int64_t before = Get(job).progress().step();
  Step(old, epoch, 9);
  EXPECT_EQ(Get(job).progress().step(), before) << "the old session still counts";
}

TEST_F(CoordinatorTest, AStopThatWasLostIsSentAgain) {
  const auto [job, epoch] = RunJob();
  Disconnect(session_);
  Do(PauseJobEvent{++call_, job, ""});
  Register("workers/a", 1, {epoch});
  EXPECT_THAT(Stops(session_, epoch), ElementsAre(v1::STOP_MODE_CHECKPOINT));
}

TEST_F(CoordinatorTest, KeepsTheNewestCheckpointsAndDropsArtifactsThatNothingNeeds) {
  const auto [job, epoch] = RunJob();
  for (int step = 1; step <= 4; ++step) Checkpoint(session_, epoch, step);
  const auto kept = coordinator_->ListCheckpoints(job);
  ASSERT_EQ(kept->size(), 2u);
  EXPECT_EQ((*kept)[0].step(), 3);
  EXPECT_THAT(removed_, ElementsAre(absl::StrCat("artifacts/", epoch, "-1"),
                                    absl::StrCat("artifacts/", epoch, "-2")));
  EXPECT_EQ(coordinator_->GetCheckpoint(job + "/checkpoints/last")->step(), 4);
  Do(DeleteCheckpointEvent{++call_, job + "/checkpoints/4"});
  EXPECT_EQ(ReasonOf(Answer()), "LAST_CHECKPOINT");
  Do(DeleteCheckpointEvent{++call_, job + "/checkpoints/3"});
  EXPECT_TRUE(Answer().ok());
}

TEST_F(CoordinatorTest, AnIncompleteCheckpointIsNotCommitted) {
  const auto [job, epoch] = RunJob();
  missing_.insert(absl::StrCat("artifacts/", epoch, "-1"));
  Checkpoint(session_, epoch, 1, /*final=*/true);
  EXPECT_EQ(events_.back().reason(), "CHECKPOINT_INCOMPLETE");
  End(session_, epoch, v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Get(job).attempts(0).failure_cause(), v1::FAILURE_CAUSE_STORAGE);
  EXPECT_EQ(Get(job).attempt(), 2);
}

TEST_F(CoordinatorTest, TheEtagChangesWithTheJobButNotWithItsProgress) {
  const auto [job, epoch] = RunJob();
  const std::string etag = Get(job).etag();
  Step(session_, epoch, 1);
  EXPECT_EQ(Get(job).etag(), etag);
  Do(PauseJobEvent{++call_, job, "0"});
  EXPECT_EQ(ReasonOf(Answer()), "ETAG_MISMATCH");
  Do(PauseJobEvent{++call_, job, etag});
  EXPECT_TRUE(Answer().ok());
  EXPECT_NE(Get(job).etag(), etag);
}

TEST_F(CoordinatorTest, RequestIdsAreKeptForADay) {
  const v1::JobSpec spec = MakeSpec();
  Do(CreateJobEvent{++call_, "jobs/first", spec, "id", "digest"});
  Do(CreateJobEvent{++call_, "jobs/second", spec, "id", "digest"});
  EXPECT_EQ(answers_[call_].job.name(), "jobs/first");
  Restart();
  Do(CreateJobEvent{++call_, "jobs/third", spec, "id", "other"});
  EXPECT_EQ(ReasonOf(Answer()), "REQUEST_ID_REUSED");
  now_ += absl::Hours(25);
  Do(TickEvent{});
  Do(CreateJobEvent{++call_, "jobs/fourth", spec, "id", "other"});
  EXPECT_EQ(answers_[call_].job.name(), "jobs/fourth");
}

TEST_F(CoordinatorTest, WaitEndsWithTheJobOrItsTime) {
  const std::string job = Create(MakeSpec());
  Do(WaitJobEvent{50, job, now_ + absl::Seconds(3)});
  Do(WaitJobEvent{51, job, now_ + absl::Seconds(300)});
  Do(WaitJobEvent{52, job, now_ + absl::Seconds(300)});
  Pass(absl::Seconds(4));
  EXPECT_EQ(answers_.count(50), 1u);
  EXPECT_EQ(answers_.count(51), 0u);
  Do(ForgetCallEvent{52});
  EXPECT_TRUE(absl::IsCancelled(answers_[52].status));
  Do(CancelJobEvent{++call_, job, ""});
  EXPECT_EQ(answers_[51].job.state(), v1::JOB_STATE_CANCELLED);
}

TEST_F(CoordinatorTest, OnlyFinalJobsCanBeDeleted) {
  const auto [job, epoch] = RunJob();
  Checkpoint(session_, epoch, 1);
  Do(DeleteJobEvent{++call_, job, ""});
  EXPECT_EQ(ReasonOf(Answer()), "ILLEGAL_STATE");
  Do(CancelJobEvent{++call_, job, ""});
  End(session_, epoch, v1::LEASE_OUTCOME_STOPPED);
  Do(DeleteJobEvent{++call_, job, ""});
  EXPECT_TRUE(Answer().ok());
  EXPECT_TRUE(absl::IsNotFound(coordinator_->GetJob(job).status()));
  EXPECT_THAT(removed_, ElementsAre(absl::StrCat("artifacts/", epoch, "-1")));
  Restart();
  EXPECT_TRUE(absl::IsNotFound(coordinator_->GetJob(job).status()));
}

TEST_F(CoordinatorTest, ArtifactsInUseStay) {
  v1::JobSpec spec = MakeSpec();
  spec.mutable_datasets(0)->mutable_source()->set_artifact("artifacts/data");
  const std::string job = Create(spec);
  Do(DeleteArtifactEvent{++call_, "artifacts/data"});
  EXPECT_EQ(ReasonOf(Answer()), "ARTIFACT_IN_USE");
  Do(CancelJobEvent{++call_, job, ""});
  Do(DeleteArtifactEvent{++call_, "artifacts/data"});
  EXPECT_THAT(removed_, ElementsAre("artifacts/data"));
}

TEST_F(CoordinatorTest, RendezvousAnswersWhenTheKeyIsSetAndSurvivesARestart) {
  const SessionId a = Register("workers/a", 1);
  const SessionId b = Register("workers/b", 1);
  Create(MakeSpec(2));
  Validate(a);
  const int64_t epoch = LastLease(a, v1::LEASE_KIND_TRAIN).epoch();
  RendezvousGetEvent get{b, {}};
  get.message.set_epoch(epoch);
  get.message.set_key("address");
  Do(get);
  EXPECT_FALSE(Last(b).has_rendezvous_value());
  RendezvousSetEvent set{a, {}};
  set.message.set_epoch(epoch);
  set.message.set_key("address");
  set.message.set_value("10.0.0.1");
  Do(set);
  EXPECT_EQ(Last(b).rendezvous_value().value(), "10.0.0.1");
  set.message.set_value("another");  // the first stays
  Do(set);
  Restart();
  get.session = Register("workers/b", 1, {epoch});
  Do(get);
  EXPECT_EQ(Last(get.session).rendezvous_value().value(), "10.0.0.1");
  get.message.set_epoch(epoch + 1);
  Do(get);
  EXPECT_EQ(Last(get.session).stale().epoch(), epoch + 1);
}

// Stale would make the agent forget the lease, and its device would stay blocked.
TEST_F(CoordinatorTest, ARendezvousUnderAnAbandonedLeaseIsAnsweredWithStop) {
  const SessionId a = Register("workers/a", 1);
  Create(MakeSpec());
  Validate(a);
  const int64_t epoch = LastLease(a, v1::LEASE_KIND_TRAIN).epoch();
  Disconnect(a);
  Pass(absl::Seconds(16));
  RendezvousGetEvent get{Register("workers/a", 1, {epoch}), {}};
  get.message.set_epoch(epoch);
  get.message.set_key("address");
  Do(get);
  EXPECT_EQ(Last(get.session).stop().mode(), v1::STOP_MODE_KILL);
}

// Steps may come before RUNNING and checkpoints after CANCELLING: in between, restarts.
TEST_F(CoordinatorTest, TokensOfAStepAreKnownAfterARestartInEveryState) {
  const SessionId a = Register("workers/a", 1);
  const std::string job = Create(MakeSpec());
  Validate(a);
  const int64_t epoch = LastLease(a, v1::LEASE_KIND_TRAIN).epoch();
  for (int step = 1; step <= 3; ++step) Step(a, epoch, step);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_STARTING);
  Restart();
  Register("workers/a", 1, {epoch});
  Checkpoint(session_, epoch, 1);
  Do(PauseJobEvent{++call_, job, ""});
  Restart();
  Register("workers/a", 1, {epoch});
  Checkpoint(session_, epoch, 2);
  Do(CancelJobEvent{++call_, job, ""});
  Restart();
  Register("workers/a", 1, {epoch});
  Checkpoint(session_, epoch, 3);
  const auto stored = store_->Load();
  ASSERT_EQ(stored->checkpoints.size(), 2u);
  for (const CheckpointRecord& record : stored->checkpoints) {
    EXPECT_EQ(record.trained_tokens, 7 * record.checkpoint.step());
  }
}

TEST_F(CoordinatorTest, ABrokenRegistrationIsRefused) {
  Register("workers/../x", 1);
  EXPECT_EQ(closed_.count(session_), 1u);
  RegisterEvent twice{++session_, {}};
  twice.message.set_worker("workers/a");
  for (int i = 0; i < 2; ++i) {
    v1::Device* device = twice.message.add_devices();
    device->set_id("cpu:0");
    device->set_type(v1::DEVICE_TYPE_CPU);
  }
  Do(twice);
  EXPECT_EQ(closed_.count(session_), 1u);
  EXPECT_TRUE(coordinator_->ListWorkers().empty());
}

}  // namespace
}  // namespace attune
