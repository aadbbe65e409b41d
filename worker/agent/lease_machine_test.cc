#include "worker/agent/lease_machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <random>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

using Kind = LeaseAction::Kind;
using testing::AllOf;
using testing::HasSubstr;

v1::Lease NewLease(int ranks = 2) {
  v1::Lease lease;
  lease.set_epoch(7);
  lease.set_job("jobs/1");
  lease.set_attempt(2);
  lease.set_kind(v1::LEASE_KIND_TRAIN);
  for (int i = 0; i < ranks; ++i) lease.add_devices(absl::StrCat("cpu:", i));
  lease.set_world_size(ranks);
  lease.mutable_spec()->mutable_retry()->set_stall_timeout_s(10);
  return lease;
}

absl::Time At(double seconds) {
  return absl::UnixEpoch() + absl::Seconds(seconds);
}

v1::TrainerToAgent Checkpoint(int64_t step, bool final = false) {
  v1::TrainerToAgent message;
  message.mutable_checkpoint()->set_step(step);
  message.mutable_checkpoint()->set_final(final);
  return message;
}

v1::TrainerToAgent Running() {
  v1::TrainerToAgent message;
  message.mutable_running()->set_total_steps(10);
  return message;
}

v1::TrainerToAgent Failure(v1::FailureCause cause, const std::string& text) {
  v1::TrainerToAgent message;
  message.mutable_failure()->set_cause(cause);
  message.mutable_failure()->set_message(text);
  return message;
}

TrainerExit Killed(int signal) {
  return {.signaled = true, .code = signal};
}

bool Has(const LeaseMachine::Actions& actions, Kind kind) {
  for (const LeaseAction& action : actions) {
    if (action.kind == kind) return true;
  }
  return false;
}

// The end among the actions; its outcome is unspecified if there is none.
v1::LeaseEnded EndIn(const LeaseMachine::Actions& actions) {
  for (const LeaseAction& action : actions) {
    if (action.kind == Kind::kReport && action.report.has_ended()) return action.report.ended();
  }
  return {};
}

TEST(LeaseMachineTest, CompletesWhenTheFinalCheckpointIsStored) {
  LeaseMachine machine(NewLease(1));
  machine.OnStarted(At(0));
  EXPECT_TRUE(Has(machine.OnMessage(0, Checkpoint(10, true), At(1)), Kind::kUpload));
  EXPECT_EQ(EndIn(machine.OnExit(0, {}, At(2))).outcome(), v1::LEASE_OUTCOME_UNSPECIFIED)
      << "before the upload";
  EXPECT_EQ(EndIn(machine.OnStored("artifacts/a", 5)).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_TRUE(machine.ended());
}

TEST(LeaseMachineTest, RunsOnceAllRanksHaveLoaded) {
  LeaseMachine machine(NewLease(2));
  machine.OnStarted(At(0));
  EXPECT_FALSE(Has(machine.OnMessage(1, Running(), At(1)), Kind::kReport));
  EXPECT_TRUE(Has(machine.OnMessage(0, Running(), At(2)), Kind::kReport));
  EXPECT_FALSE(Has(machine.OnMessage(0, Running(), At(3)), Kind::kReport));
}

TEST(LeaseMachineTest, ACrashKillsTheOthersAndWaitsForThem) {
  LeaseMachine machine(NewLease(2));
  machine.OnStarted(At(0));
  TrainerExit exit = Killed(SIGSEGV);
  exit.last_lines = {"one", "two"};
  const LeaseMachine::Actions actions = machine.OnExit(1, exit, At(1));
  EXPECT_TRUE(Has(actions, Kind::kKill));
  EXPECT_FALSE(machine.ended()) << "rank 0 is still alive";
  const v1::LeaseEnded end = EndIn(machine.OnExit(0, Killed(SIGKILL), At(2)));
  EXPECT_EQ(end.cause(), v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_THAT(end.message(), AllOf(HasSubstr("rank 1"), HasSubstr("signal 11"), HasSubstr("two")));
}

TEST(LeaseMachineTest, PeerLostGivesWayToTheRealReason) {
  LeaseMachine machine(NewLease(2));
  machine.OnStarted(At(0));
  machine.OnMessage(0, Failure(v1::FAILURE_CAUSE_PEER_LOST, "rank 1 is gone"), At(1));
  EXPECT_FALSE(Has(machine.OnExit(0, {.code = 13}, At(1)), Kind::kKill)) << "waits for the reason";
  EXPECT_EQ(EndIn(machine.OnExit(1, Killed(SIGABRT), At(1.5))).cause(),
            v1::FAILURE_CAUSE_TRAINER_CRASH);
}

TEST(LeaseMachineTest, PeerLostIsTheCauseWhereNothingElseIs) {
  LeaseMachine machine(NewLease(2));
  machine.OnStarted(At(0));
  machine.OnMessage(0, Failure(v1::FAILURE_CAUSE_PEER_LOST, "a rank elsewhere is gone"), At(1));
  machine.OnExit(0, {.code = 13}, At(1));
  EXPECT_FALSE(Has(machine.OnTick(At(1.5)), Kind::kKill));
  EXPECT_TRUE(Has(machine.OnTick(At(2.1)), Kind::kKill));
  EXPECT_EQ(EndIn(machine.OnExit(1, Killed(SIGKILL), At(3))).cause(), v1::FAILURE_CAUSE_PEER_LOST);
}

TEST(LeaseMachineTest, StallsWithoutProgressOnly) {
  LeaseMachine machine(NewLease(1));
  EXPECT_FALSE(Has(machine.OnTick(At(100)), Kind::kKill)) << "still preparing";
  machine.OnStarted(At(100));
  v1::TrainerToAgent progress;
  progress.mutable_progress()->set_phase("load");
  EXPECT_FALSE(Has(machine.OnTick(At(109)), Kind::kKill));
  machine.OnMessage(0, progress, At(109));
  EXPECT_FALSE(Has(machine.OnTick(At(118)), Kind::kKill));
  EXPECT_TRUE(Has(machine.OnTick(At(119.5)), Kind::kKill));
  EXPECT_EQ(EndIn(machine.OnExit(0, Killed(SIGKILL), At(120))).cause(), v1::FAILURE_CAUSE_STALLED);
}

TEST(LeaseMachineTest, StopsAtOnceWhilePreparing) {
  LeaseMachine machine(NewLease());
  EXPECT_EQ(EndIn(machine.OnStop(v1::STOP_MODE_KILL)).outcome(), v1::LEASE_OUTCOME_STOPPED);
}

TEST(LeaseMachineTest, AKillDropsUploadsAndACrashDoesNot) {
  LeaseMachine stopped(NewLease(1));
  stopped.OnStarted(At(0));
  stopped.OnMessage(0, Checkpoint(5), At(1));
  stopped.OnStop(v1::STOP_MODE_KILL);
  EXPECT_EQ(EndIn(stopped.OnExit(0, Killed(SIGKILL), At(2))).outcome(), v1::LEASE_OUTCOME_STOPPED);

  LeaseMachine crashed(NewLease(1));
  crashed.OnStarted(At(0));
  crashed.OnMessage(0, Checkpoint(5), At(1));
  crashed.OnExit(0, Killed(SIGSEGV), At(2));
  EXPECT_FALSE(crashed.ended()) << "the checkpoint is what the next attempt begins with";
  EXPECT_EQ(EndIn(crashed.OnStored("artifacts/a", 1)).outcome(), v1::LEASE_OUTCOME_FAILED);
}

TEST(LeaseMachineTest, ACheckpointThatCannotBeStoredFailsTheLease) {
  LeaseMachine machine(NewLease(1));
  machine.OnStarted(At(0));
  machine.OnMessage(0, Checkpoint(5), At(1));
  EXPECT_TRUE(Has(machine.OnStoreFailed(absl::ResourceExhaustedError("disk full")), Kind::kKill));
  EXPECT_EQ(EndIn(machine.OnExit(0, Killed(SIGKILL), At(2))).cause(), v1::FAILURE_CAUSE_STORAGE);
}

TEST(LeaseMachineTest, AnswersRendezvousItselfOnlyWhereItHoldsEveryRank) {
  v1::TrainerToAgent set, get;
  set.mutable_rendezvous_set()->set_key("k");
  set.mutable_rendezvous_set()->set_value("v");
  get.mutable_rendezvous_get()->set_key("k");
  LeaseMachine whole(NewLease(2));
  whole.OnStarted(At(0));
  EXPECT_FALSE(Has(whole.OnMessage(1, get, At(1)), Kind::kRendezvousGet));
  EXPECT_TRUE(Has(whole.OnMessage(0, set, At(1)), Kind::kSendToRank));

  v1::Lease lease = NewLease(1);
  lease.set_world_size(2);
  LeaseMachine part(lease);
  part.OnStarted(At(0));
  EXPECT_TRUE(Has(part.OnMessage(0, get, At(1)), Kind::kRendezvousGet));
  const LeaseMachine::Actions again = part.OnReconnected();
  EXPECT_TRUE(Has(again, Kind::kRendezvousGet)) << "the question was perhaps lost";
  v1::RendezvousValue value;
  value.set_key("k");
  value.set_value("v");
  const LeaseMachine::Actions answer = part.OnRendezvousValue(value);
  ASSERT_TRUE(Has(answer, Kind::kSendToRank));
  EXPECT_EQ(answer[0].to_trainer.rendezvous_value().value(), "v");
}

TEST(LeaseMachineTest, AMessageOfAnyBytesIsSentAsText) {
  LeaseMachine machine(NewLease(1));
  machine.OnStarted(At(0));
  machine.OnAgentFailure(v1::FAILURE_CAUSE_STORAGE, "caf\xe9");
  EXPECT_EQ(EndIn(machine.OnExit(0, Killed(SIGKILL), At(1))).message(), "caf\xEF\xBF\xBD");
}

// Whatever happens in whatever order: the end comes once, last, and after every exit.
TEST(LeaseMachineTest, TheEndIsTheLastReportWhateverHappens) {
  for (int seed = 0; seed < 3000; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int n) { return static_cast<int>(random() % n); };
    const int ranks = 1 + pick(3);
    LeaseMachine machine(NewLease(ranks));
    int alive = 0, ends = 0, uploads = 0;
    bool after_end = false;
    std::vector<bool> exited(ranks, true);
    double now = 0;
    const auto take = [&](const LeaseMachine::Actions& actions) {
      for (const LeaseAction& action : actions) {
        if (action.kind == Kind::kUpload) ++uploads;
        if (action.kind == Kind::kAbandonUploads) uploads = 0;
        if (action.kind != Kind::kReport) continue;
        after_end = after_end || ends > 0;
        if (!action.report.has_ended()) continue;
        ++ends;
        EXPECT_EQ(alive, 0) << "seed " << seed;
      }
    };
    if (pick(10) > 0) {
      machine.OnStarted(At(now));
      alive = ranks;
      exited.assign(ranks, false);
    }
    for (int i = 0; i < 60; ++i) {
      now += 0.5;
      const int rank = pick(ranks);
      switch (pick(9)) {
        case 0:
          if (!exited[rank]) {
            exited[rank] = true;
            --alive;
            take(machine.OnExit(rank, pick(2) ? Killed(SIGKILL) : TrainerExit{.code = pick(2)},
                                At(now)));
          }
          break;
        case 1:
          if (!exited[rank]) take(machine.OnMessage(rank, Checkpoint(i, pick(3) == 0), At(now)));
          break;
        case 2:
          if (uploads > 0) {
            --uploads;
            take(pick(4) ? machine.OnStored("artifacts/a", 1)
                         : machine.OnStoreFailed(absl::DataLossError("x")));
          }
          break;
        case 3:
          if (pick(4) == 0) take(machine.OnStop(v1::STOP_MODE_KILL));
          break;
        case 4:
          if (pick(4) == 0) take(machine.OnStop(v1::STOP_MODE_CHECKPOINT));
          break;
        case 5:
          take(machine.OnTick(At(now)));
          break;
        case 6:
          if (!exited[rank]) take(machine.OnMessage(rank, Running(), At(now)));
          break;
        case 7:
          if (!exited[rank] && pick(3) == 0) {
            take(machine.OnMessage(rank, Failure(v1::FAILURE_CAUSE_PEER_LOST, "p"), At(now)));
          }
          break;
        case 8:
          take(machine.OnLine(rank, false, "text", At(now)));
          break;
      }
    }
    // Then everything comes to rest.
    take(machine.OnStop(v1::STOP_MODE_KILL));
    for (int rank = 0; rank < ranks; ++rank) {
      if (exited[rank]) continue;
      exited[rank] = true;
      --alive;
      take(machine.OnExit(rank, Killed(SIGKILL), At(now)));
    }
    EXPECT_EQ(ends, 1) << "seed " << seed;
    EXPECT_FALSE(after_end) << "seed " << seed;
  }
}

}  // namespace
}  // namespace attune
