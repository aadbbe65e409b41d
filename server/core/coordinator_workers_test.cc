// Workers, leases and reports: what the coordinator promises when links and processes die.
#include "server/core/coordinator_fixture.h"

namespace attune {
namespace {

using testing::ElementsAre;

class CoordinatorWorkersTest : public CoordinatorTest {};

TEST_F(CoordinatorWorkersTest, DuplicatesAreAcknowledgedAndIgnoredAndGapsAreNotAccepted) {
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

TEST_F(CoordinatorWorkersTest, UnknownAndEndedEpochsAreStale) {
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

TEST_F(CoordinatorWorkersTest, ALostWorkersDevicesStayBlockedUntilItProvesThatTheyAreFree) {
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

TEST_F(CoordinatorWorkersTest, TrainingGoesOnWhenTheWorkerComesBackInTime) {
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

TEST_F(CoordinatorWorkersTest, ARestartOfTheCoordinatorStopsNoTrainer) {
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

TEST_F(CoordinatorWorkersTest, AProcessThatStoodStillDoesNotBlameItsWorkers) {
  const auto [job, epoch] = RunJob();
  now_ += absl::Seconds(60);  // SIGSTOP: heartbeats are still in the queue behind the tick
  Do(TickEvent{});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
  Pass(absl::Seconds(5));
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_RUNNING);
}

TEST_F(CoordinatorWorkersTest, ALeaseThatNeverArrivedIsSentAgain) {
  const SessionId first = Register("workers/a", 1);
  const std::string job = Create(MakeSpec());
  Validate(first);
  const int64_t epoch = LastLease(first, v1::LEASE_KIND_TRAIN).epoch();
  Restart();  // the message was lost with the process
  const SessionId second = Register("workers/a", 1);
  EXPECT_EQ(LastLease(second, v1::LEASE_KIND_TRAIN).epoch(), epoch);
  EXPECT_EQ(Get(job).restarts(), 0);
}

TEST_F(CoordinatorWorkersTest, AnAgentThatForgotALeaseHasLostIt) {
  const auto [job, epoch] = RunJob();
  Register("workers/a", 1);
  EXPECT_EQ(Get(job).attempt(), 2);
  EXPECT_EQ(Get(job).restarts(), 1);
  EXPECT_EQ(Get(job).attempts(0).failure_cause(), v1::FAILURE_CAUSE_WORKER_LOST);
}

TEST_F(CoordinatorWorkersTest, ANewSessionReplacesTheOld) {
  const auto [job, epoch] = RunJob();
  const SessionId old = session_;
  Register("workers/a", 1, {epoch});
  EXPECT_EQ(closed_.count(old), 1u);
  const int64_t before = Get(job).progress().step();
  Step(old, epoch, 9);
  EXPECT_EQ(Get(job).progress().step(), before) << "the old session still counts";
}

TEST_F(CoordinatorWorkersTest, AStopThatWasLostIsSentAgain) {
  const auto [job, epoch] = RunJob();
  Disconnect(session_);
  Do(PauseJobEvent{++call_, job, ""});
  Register("workers/a", 1, {epoch});
  EXPECT_THAT(Stops(session_, epoch), ElementsAre(v1::STOP_MODE_CHECKPOINT));
}

TEST_F(CoordinatorWorkersTest, RendezvousAnswersWhenTheKeyIsSetAndSurvivesARestart) {
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

TEST_F(CoordinatorWorkersTest, ARendezvousUnderAnAbandonedLeaseIsAnsweredWithStop) {
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

TEST_F(CoordinatorWorkersTest, TokensOfAStepAreKnownAfterARestartInEveryState) {
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

TEST_F(CoordinatorWorkersTest, ABrokenRegistrationIsRefused) {
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

TEST_F(CoordinatorWorkersTest, AFaultyGpuIsNotLeasedUntilItsWorkerRegistersItAsHealthy) {
  const auto status = [](const char* device, const char* fault) {
    v1::DeviceStatus status;
    status.set_device(device);
    status.set_fault(fault);
    return status;
  };
  RegisterEvent hello{++session_, {}};
  hello.message.set_worker("workers/g");
  for (const char* id : {"cuda:GPU-a", "cuda:GPU-b"}) {
    v1::Device* device = hello.message.add_devices();
    device->set_id(id);
    device->set_type(v1::DEVICE_TYPE_CUDA);
    *hello.message.add_statuses() = status(id, "");
  }
  Do(hello);
  HeartbeatEvent beat{session_, {}};
  *beat.message.add_statuses() = status("cuda:GPU-a", "XID 79");
  *beat.message.add_statuses() = status("cuda:GPU-none", "nobody registered it");
  Do(beat);
  const std::string pair = Create(MakeSpec(2));
  Validate(session_);
  EXPECT_EQ(Get(pair).reason(), "NO_SUCH_DEVICES");
  const std::string one = Create(MakeSpec(1));
  Validate(session_);
  EXPECT_THAT(LastLease(session_, v1::LEASE_KIND_TRAIN).devices(), ElementsAre("cuda:GPU-b"));
  EXPECT_EQ(Get(one).spec().resources().device_type(), v1::DEVICE_TYPE_CUDA);
  const auto workers = coordinator_->ListWorkers();
  ASSERT_EQ(workers.size(), 1);
  ASSERT_EQ(workers[0].statuses_size(), 2);
  EXPECT_EQ(workers[0].statuses(0).fault(), "XID 79");
  EXPECT_EQ((coordinator_->Stats().devices[{v1::DEVICE_TYPE_CUDA, "faulty"}]), 1);
  End(session_, LastLease(session_, v1::LEASE_KIND_TRAIN).epoch(), v1::LEASE_OUTCOME_FAILED,
      v1::FAILURE_CAUSE_INVALID);
  EXPECT_EQ(Get(pair).state(), v1::JOB_STATE_QUEUED);
  hello.session = ++session_;
  Do(hello);
  EXPECT_EQ(Get(pair).state(), v1::JOB_STATE_STARTING);
}

TEST_F(CoordinatorWorkersTest, AJobForAnyDeviceIsValidatedWhereGpusAre) {
  const SessionId cpu = Register("workers/a", 4);
  RegisterEvent hello{++session_, {}};
  hello.message.set_worker("workers/g");
  hello.message.add_devices()->set_id("cuda:GPU-a");
  hello.message.mutable_devices(0)->set_type(v1::DEVICE_TYPE_CUDA);
  Do(hello);
  Create(MakeSpec(1));
  EXPECT_NE(LastLease(session_, v1::LEASE_KIND_VALIDATE).epoch(), 0);
  v1::JobSpec spec = MakeSpec(1);
  spec.mutable_resources()->set_device_type(v1::DEVICE_TYPE_CPU);
  Create(spec);
  EXPECT_NE(LastLease(cpu, v1::LEASE_KIND_VALIDATE).epoch(), 0);
}

}  // namespace
}  // namespace attune
