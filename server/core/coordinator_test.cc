// Jobs and attempts: what the coordinator promises to users.
#include "server/core/coordinator_fixture.h"

namespace attune {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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

TEST_F(CoordinatorTest, AFullDiskPausesTheJobUntilThereIsRoom) {
  auto [job, epoch] = RunJob();
  Step(session_, epoch, 1);
  Checkpoint(session_, epoch, 1);
  for (int restart = 0; restart <= 3; ++restart) {
    if (restart > 0) epoch = LastLease(session_, v1::LEASE_KIND_TRAIN).epoch();
    End(session_, epoch, v1::LEASE_OUTCOME_FAILED, v1::FAILURE_CAUSE_STORAGE);
  }
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_PAUSED);
  EXPECT_EQ(Get(job).reason(), "PAUSED_BY_STORAGE");
  EXPECT_THAT(Get(job).message(), HasSubstr("why"));
  EXPECT_THAT(Get(job).message(), HasSubstr("make room"));
  EXPECT_EQ(Get(job).progress().step(), 1);
  EXPECT_TRUE(coordinator_->LiveLeases().empty());
  Do(ResumeJobEvent{++call_, job, "", {}});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(Get(job).restarts(), 0);
  EXPECT_EQ(LastLease(session_, v1::LEASE_KIND_TRAIN).checkpoint_step(), 1);
}

TEST_F(CoordinatorTest, WithoutRoomForTheValidationTheJobIsPausedToo) {
  const SessionId session = Register("workers/a", 1);
  const std::string job = Create(MakeSpec());
  for (int restart = 0; restart <= 3; ++restart) {
    EXPECT_EQ(Get(job).state(), v1::JOB_STATE_VALIDATING);
    End(session, LastLease(session, v1::LEASE_KIND_VALIDATE).epoch(), v1::LEASE_OUTCOME_FAILED,
        v1::FAILURE_CAUSE_STORAGE);
  }
  EXPECT_EQ(Get(job).reason(), "PAUSED_BY_STORAGE");
  Do(ResumeJobEvent{++call_, job, "", {}});
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_VALIDATING);
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

TEST_F(CoordinatorTest, KeepsTheBestCheckpointBesideTheNewest) {
  const auto [job, epoch] = RunJob();
  EXPECT_FALSE(coordinator_->GetCheckpoint(job + "/checkpoints/best").ok());
  for (int step = 1; step <= 6; ++step) {
    Checkpoint(session_, epoch, step, /*final=*/step == 6, /*best=*/step == 1 || step == 2);
  }
  const auto kept = coordinator_->ListCheckpoints(job);
  ASSERT_EQ(kept->size(), 3u);
  EXPECT_EQ((*kept)[0].step(), 2);
  EXPECT_EQ((*kept)[1].step(), 5);
  EXPECT_EQ(coordinator_->GetCheckpoint(job + "/checkpoints/best")->step(), 2);
  EXPECT_EQ(coordinator_->GetCheckpoint(job + "/checkpoints/result")->step(), 6);
  EXPECT_EQ(coordinator_->GetCheckpoint(job + "/checkpoints/last")->step(), 6);
  End(session_, epoch, v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Get(job).final_checkpoint(), job + "/checkpoints/6");
}

TEST_F(CoordinatorTest, TheResultIsTheBestCheckpointWhereTheSpecSaysSo) {
  const SessionId session = Register("workers/a", 1);
  v1::JobSpec spec = MakeSpec();
  spec.mutable_evaluation()->set_fraction(0.1);
  spec.mutable_checkpoints()->set_load_best_model_at_end(true);
  const std::string job = Create(spec);
  Validate(session);
  const int64_t epoch = LastLease(session, v1::LEASE_KIND_TRAIN).epoch();
  Running(session, epoch);
  Checkpoint(session, epoch, 1, /*final=*/false, /*best=*/true);
  Checkpoint(session, epoch, 2);
  Checkpoint(session, epoch, 3, /*final=*/true);
  End(session, epoch, v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Get(job).final_checkpoint(), job + "/checkpoints/1");
  EXPECT_EQ(coordinator_->GetCheckpoint(job + "/checkpoints/result")->step(), 1);
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

// Stale would make the agent forget the lease, and its device would stay blocked.
// Steps may come before RUNNING and checkpoints after CANCELLING: in between, restarts.
}  // namespace
}  // namespace attune
