// The agent with real processes (the fake trainer) against a coordinator in this process.
#include "worker/agent/agent.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/support/fake_coordinator.h"
#include "worker/agent/process_table.h"

extern char** environ;

namespace attune {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

class AgentTest : public testing::Test {
 protected:
  AgentTest() {
    char pattern[] = "/tmp/agent_test_XXXXXX";
    directory_ = mkdtemp(pattern);
    fs::create_directories(directory_ + "/root/model");
    std::ofstream(directory_ + "/root/model/config.json") << "{}";
    std::ofstream(directory_ + "/root/train.jsonl") << "{}\n";
    store_ = std::make_shared<FakeStore>();
    StartCoordinator();
  }
  ~AgentTest() override {
    agent_.reset();
    coordinator_.reset();
    EXPECT_THAT(ProcessesHere(), testing::IsEmpty()) << "processes are left behind";
    fs::remove_all(directory_);
  }

  // Trainers carry their assignment's path on their command line.
  std::vector<std::string> ProcessesHere() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator("/proc")) {
      std::ifstream in(entry.path() / "cmdline", std::ios::binary);
      std::string line((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
      // The agent's own command line names the trainer too, but no channel.
      if (line.find(directory_) != std::string::npos &&
          line.find("--channel-fd") != std::string::npos) {
        found.push_back(entry.path().filename());
      }
    }
    return found;
  }

  void StartCoordinator() {
    coordinator_.reset();
    coordinator_ = std::make_unique<FakeCoordinator>(directory_ + "/socket", store_);
  }

  AgentOptions Options(int slots) const {
    AgentOptions options;
    options.coordinator.address = absl::StrCat("unix:", directory_, "/socket");
    options.state_directory = directory_ + "/state";
    options.trainer_program = std::string(ATTUNE_BIN_DIR) + "/fake_trainer";
    options.roots = {directory_ + "/root"};
    options.devices = {.offer = DeviceOffer::kCpu, .cpu_slots = slots};
    options.environment = CleanEnvironment(environ);
    return options;
  }

  void StartAgent(int slots = 2) {
    absl::StatusOr<std::unique_ptr<Agent>> agent = Agent::Start(Options(slots));
    ASSERT_TRUE(agent.ok()) << agent.status();
    agent_ = *std::move(agent);
    ASSERT_TRUE(coordinator_->WaitForSession());
  }

  v1::Lease NewLease(int64_t epoch, const std::string& name, int ranks = 2) const {
    v1::Lease lease;
    lease.set_epoch(epoch);
    lease.set_job("jobs/1");
    lease.set_attempt(1);
    lease.set_kind(v1::LEASE_KIND_TRAIN);
    v1::JobSpec* spec = lease.mutable_spec();
    spec->set_name(name);
    spec->mutable_model()->mutable_source()->set_path("model");
    spec->add_datasets()->mutable_source()->set_path("train.jsonl");
    spec->mutable_schedule()->set_steps(20);
    spec->mutable_checkpoints()->set_every_steps(5);
    spec->mutable_retry()->set_stall_timeout_s(60);
    for (int i = 0; i < ranks; ++i) lease.add_devices(absl::StrCat("cpu:", i));
    lease.set_world_size(ranks);
    return lease;
  }

  // Waits for LeaseEnded and returns it.
  v1::LeaseEnded End(int64_t epoch, absl::Duration timeout = absl::Seconds(20)) {
    const bool ended = WaitFor(
        store_.get(), [&](const FakeStore& store) { return Ended(store, epoch); }, timeout);
    EXPECT_TRUE(ended) << "no LeaseEnded";
    std::lock_guard<std::mutex> lock(store_->mutex);
    return ended ? store_->reports[epoch].back().ended() : v1::LeaseEnded();
  }

  static bool Ended(const FakeStore& store, int64_t epoch) {
    const auto found = store.reports.find(epoch);
    return found != store.reports.end() && !found->second.empty() &&
           found->second.back().has_ended();
  }

  std::vector<v1::Report> Reports(int64_t epoch) {
    std::lock_guard<std::mutex> lock(store_->mutex);
    return store_->reports[epoch];
  }

  std::vector<int64_t> Steps(int64_t epoch) {
    std::vector<int64_t> steps;
    for (const v1::Report& report : Reports(epoch)) {
      if (report.has_step()) steps.push_back(report.step().step());
    }
    return steps;
  }

  bool WaitForStep(int64_t epoch, int64_t step) {
    return WaitFor(store_.get(), [&](const FakeStore& store) {
      const auto found = store.reports.find(epoch);
      if (found == store.reports.end()) return false;
      for (const v1::Report& report : found->second) {
        if (report.has_step() && report.step().step() >= step) return true;
      }
      return false;
    });
  }

  static std::vector<int64_t> Range(int64_t from, int64_t to) {
    std::vector<int64_t> range;
    for (int64_t i = from; i <= to; ++i) range.push_back(i);
    return range;
  }

  std::string directory_;
  std::shared_ptr<FakeStore> store_;
  std::unique_ptr<FakeCoordinator> coordinator_;
  std::unique_ptr<Agent> agent_;
};

TEST_F(AgentTest, TrainsToTheEnd) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake")));
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.outcome(), v1::LEASE_OUTCOME_COMPLETED) << ended.message();
  EXPECT_EQ(Steps(7), Range(1, 20));
  std::vector<int64_t> stored;
  int running = 0;
  for (const v1::Report& report : Reports(7)) {
    if (report.has_running()) ++running;
    if (report.has_step()) {
      EXPECT_EQ(report.step().job(), "jobs/1");
      EXPECT_EQ(report.step().attempt(), 1);
    }
    if (!report.has_checkpoint()) continue;
    stored.push_back(report.checkpoint().step());
    EXPECT_EQ(report.checkpoint().final(), report.checkpoint().step() == 20);
    std::lock_guard<std::mutex> lock(store_->mutex);
    const auto& artifact = store_->artifacts[report.checkpoint().artifact()];
    EXPECT_EQ(artifact.artifact.state(), v1::ARTIFACT_STATE_READY);
    EXPECT_EQ(artifact.artifact.kind(), v1::ARTIFACT_KIND_CHECKPOINT);
    EXPECT_EQ(artifact.artifact.files_size(), 4);
  }
  EXPECT_EQ(running, 1);
  EXPECT_THAT(stored, ElementsAre(5, 10, 15, 20));
  // The end is acknowledged: nothing of the lease stays.
  const absl::Time limit = absl::Now() + absl::Seconds(5);
  while (fs::exists(directory_ + "/state/leases/7") && absl::Now() < limit) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_FALSE(fs::exists(directory_ + "/state/leases/7"));
}

TEST_F(AgentTest, PassesLinesOnWithTheThreadsOfTheDevice) {
  StartAgent();
  const int threads = Reports(0).empty() ? store_->registers[0].devices(1).threads() : 0;
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake")));
  End(7);
  std::vector<std::string> lines;
  for (const v1::Report& report : Reports(7)) {
    if (report.has_log() && report.log().rank() == 1) lines.push_back(report.log().text());
  }
  EXPECT_THAT(lines, ElementsAre(absl::StrCat("rank 1 of 2 starts, OMP_NUM_THREADS=", threads),
                                 "device cpu:1, CUDA_VISIBLE_DEVICES="));
}

TEST_F(AgentTest, LimitsWhatATrainerPrints) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-spam-20000", 1)));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  int lines = 0;
  bool counted = false;
  for (const v1::Report& report : Reports(7)) {
    lines += report.has_log();
    counted = counted || absl::StrContains(report.log().text(), "lines were dropped");
  }
  EXPECT_GE(lines, 1000);
  EXPECT_LE(lines, 2000);
  EXPECT_TRUE(counted);
}

TEST_F(AgentTest, ACrashKillsTheOthersAndSaysWhy) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-always-6-child-1")));
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.outcome(), v1::LEASE_OUTCOME_FAILED);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_THAT(ended.message(), AllOf(HasSubstr("rank 1 was killed by signal 6"),
                                     HasSubstr("about to crash at step 6")));
  EXPECT_THAT(ProcessesHere(), testing::IsEmpty());
}

TEST_F(AgentTest, ResumesFromACheckpointArtifact) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-crash-12")));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_FAILED);
  v1::Lease lease = NewLease(8, "fake-crash-12");
  lease.set_attempt(2);
  // The crash may come before the upload of the last checkpoint has ended.
  int stored = 0;
  for (const v1::Report& report : Reports(7)) {
    if (!report.has_checkpoint()) continue;
    lease.set_checkpoint_artifact(report.checkpoint().artifact());
    stored = static_cast<int>(report.checkpoint().step());
  }
  ASSERT_GE(stored, 5);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  EXPECT_EQ(End(8).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Steps(8), Range(stored + 1, 20));
}

TEST_F(AgentTest, KillsATrainerThatStalls) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake-hang-3");
  lease.mutable_spec()->mutable_retry()->set_stall_timeout_s(0.5);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_STALLED);
  EXPECT_EQ(Steps(7), Range(1, 3));
}

TEST_F(AgentTest, ACrashIsTheCauseWhereAnotherRankLostItsPeer) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-peer-3")));
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_TRAINER_CRASH) << ended.message();
  EXPECT_THAT(ended.message(), HasSubstr("rank 1"));
}

TEST_F(AgentTest, ReportsTheCauseThatTheTrainerGives) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-fail-3", 1)));
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_DIVERGED);
  EXPECT_THAT(ended.message(), HasSubstr("loss is not finite"));
}

TEST_F(AgentTest, KillsATrainerThatSendsRubbish) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-rubbish-3", 1)));
  EXPECT_EQ(End(7).cause(), v1::FAILURE_CAUSE_TRAINER_CRASH);
}

TEST_F(AgentTest, AnEarlyEndIsAFailure) {
  StartAgent();
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-early-3", 1)));
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_THAT(ended.message(), HasSubstr("before training was complete"));
}

TEST_F(AgentTest, StopsWithinTwoSecondsWhateverTheTrainerDoes) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake-ms-50-deaf-1-child-1");
  lease.mutable_spec()->mutable_schedule()->set_steps(1000);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 2));
  const absl::Time before = absl::Now();
  ASSERT_TRUE(coordinator_->SendStop(7, v1::STOP_MODE_KILL));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_STOPPED);
  EXPECT_LT(absl::Now() - before, absl::Seconds(2));
  EXPECT_THAT(ProcessesHere(), testing::IsEmpty());
}

TEST_F(AgentTest, StopsWithACheckpoint) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake-ms-50");
  lease.mutable_spec()->mutable_schedule()->set_steps(1000);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 2));
  ASSERT_TRUE(coordinator_->SendStop(7, v1::STOP_MODE_CHECKPOINT));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_STOPPED);
  const std::vector<v1::Report> reports = Reports(7);
  ASSERT_GE(reports.size(), 2u);
  int64_t last_checkpoint = 0;
  for (const v1::Report& report : reports) {
    if (report.has_checkpoint()) last_checkpoint = report.checkpoint().step();
  }
  EXPECT_EQ(last_checkpoint, Steps(7).back());
}

TEST_F(AgentTest, Validates) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake", 0);
  lease.set_kind(v1::LEASE_KIND_VALIDATE);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  bool validated = false;
  for (const v1::Report& report : Reports(7)) {
    if (report.has_validation()) validated = report.validation().total_steps() == 20;
  }
  EXPECT_TRUE(validated);
}

TEST_F(AgentTest, ValidationFindsAPathThatIsNotThere) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake", 0);
  lease.set_kind(v1::LEASE_KIND_VALIDATE);
  lease.mutable_spec()->mutable_model()->mutable_source()->set_path("modle");
  ASSERT_TRUE(coordinator_->SendLease(lease));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  const std::vector<v1::Report> reports = Reports(7);
  ASSERT_TRUE(reports[0].has_validation());
  ASSERT_EQ(reports[0].validation().errors_size(), 1);
  EXPECT_THAT(reports[0].validation().errors(0),
              AllOf(HasSubstr("model.source"), HasSubstr("modle"), HasSubstr("--root")));
}

TEST_F(AgentTest, GoesOnWithoutTheCoordinatorAndLosesNothing) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake-ms-30");
  lease.mutable_spec()->mutable_schedule()->set_steps(60);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 3));
  for (int i = 0; i < 3; ++i) {
    coordinator_.reset();
    absl::SleepFor(absl::Milliseconds(300));
    StartCoordinator();
    ASSERT_TRUE(coordinator_->WaitForSession());
    std::lock_guard<std::mutex> lock(store_->mutex);
    const v1::Register& last = store_->registers.back();
    ASSERT_EQ(last.held_size(), 1);
    EXPECT_EQ(last.held(0).epoch(), 7);
  }
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Steps(7), Range(1, 60));
  EXPECT_EQ(store_->gaps, 0);
}

TEST_F(AgentTest, SendsAgainWhatWasNotAcknowledged) {
  StartAgent();
  coordinator_->SetDeaf(true);
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake")));
  absl::SleepFor(absl::Milliseconds(500));
  StartCoordinator();
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Steps(7), Range(1, 20));
  EXPECT_EQ(store_->gaps, 0);
}

TEST_F(AgentTest, KillsWhatTheCoordinatorReleases) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake-ms-50");
  lease.mutable_spec()->mutable_schedule()->set_steps(1000);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 2));
  // The agent may register before the release is set: then once more.
  const auto ended = [&](const FakeStore& store) { return Ended(store, 7); };
  for (int i = 0; i < 5; ++i) {
    StartCoordinator();
    coordinator_->SetRelease({7});
    if (WaitFor(store_.get(), ended, absl::Seconds(4))) break;
  }
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_STOPPED);
}

TEST_F(AgentTest, ADeviceHasOneTrainerAtATime) {
  StartAgent();
  v1::Lease lease = NewLease(7, "fake-ms-50-child-1");
  lease.mutable_spec()->mutable_schedule()->set_steps(1000);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 2));
  ASSERT_TRUE(coordinator_->SendLease(NewLease(9, "fake", 1)));
  EXPECT_EQ(End(7).outcome(), v1::LEASE_OUTCOME_STOPPED);
  EXPECT_EQ(End(9).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  // An older epoch comes too late.
  ASSERT_TRUE(coordinator_->SendLease(NewLease(8, "fake", 1)));
  EXPECT_EQ(End(8).outcome(), v1::LEASE_OUTCOME_STOPPED);
  EXPECT_TRUE(Steps(8).empty());
}

TEST_F(AgentTest, TransfersGoOnWhereTheyBroke) {
  StartAgent();
  {
    std::lock_guard<std::mutex> lock(store_->mutex);
    store_->broken_chunks = 3;
  }
  ASSERT_TRUE(coordinator_->SendLease(NewLease(7, "fake-crash-12", 1)));
  End(7);
  v1::Lease lease = NewLease(8, "fake", 1);
  lease.set_attempt(2);
  for (const v1::Report& report : Reports(7)) {
    if (report.has_checkpoint()) lease.set_checkpoint_artifact(report.checkpoint().artifact());
  }
  {
    std::lock_guard<std::mutex> lock(store_->mutex);
    EXPECT_EQ(store_->broken_chunks, 0);
    store_->broken_chunks = 3;
  }
  ASSERT_TRUE(coordinator_->SendLease(lease));
  EXPECT_EQ(End(8).outcome(), v1::LEASE_OUTCOME_COMPLETED);
  EXPECT_EQ(Steps(8).front(), 11);
}

TEST_F(AgentTest, RefusesAStateDirectoryInUse) {
  StartAgent();
  const auto second = Agent::Start(Options(1));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("another agent uses"));
}

// The agent as a process of its own, so that it can be killed.
class AgentProcessTest : public AgentTest {
 protected:
  ~AgentProcessTest() override { KillAgent(); }
  void StartAgentProcess() {
    const AgentOptions options = Options(2);
    pid_ = fork();
    if (pid_ == 0) {
      const std::string program = std::string(ATTUNE_BIN_DIR) + "/attune-worker";
      execl(program.c_str(), "attune-worker", "--coordinator", options.coordinator.address.c_str(),
            "--data-dir", directory_.c_str(), "--state-dir", options.state_directory.c_str(),
            "--root", options.roots[0].c_str(), "--trainer", options.trainer_program.c_str(),
            "--cpu-slots", "2", nullptr);
      _exit(127);
    }
    ASSERT_TRUE(coordinator_->WaitForSession());
  }
  void KillAgent() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  pid_t pid_ = 0;
};

TEST_F(AgentProcessTest, AnAgentThatWasKilledReportsTheRestAndThatItWasLost) {
  StartAgentProcess();
  v1::Lease lease = NewLease(7, "fake-ms-30-child-1");
  lease.mutable_spec()->mutable_schedule()->set_steps(1000);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 7));
  coordinator_->SetDeaf(true);
  absl::SleepFor(absl::Milliseconds(300));
  KillAgent();
  // Trainers die with their agent.
  const absl::Time limit = absl::Now() + absl::Seconds(5);
  while (ProcessesHere().size() > 2 && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(20));
  StartCoordinator();
  StartAgentProcess();
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.outcome(), v1::LEASE_OUTCOME_FAILED);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_WORKER_LOST);
  // Also the children that survived their trainers are gone.
  EXPECT_THAT(ProcessesHere(), testing::IsEmpty());
  const std::vector<int64_t> steps = Steps(7);
  EXPECT_EQ(steps, Range(1, steps.back()));
  EXPECT_GT(steps.back(), 8);
  // And the device works again.
  ASSERT_TRUE(coordinator_->SendLease(NewLease(8, "fake")));
  EXPECT_EQ(End(8).outcome(), v1::LEASE_OUTCOME_COMPLETED);
}

TEST_F(AgentProcessTest, AnAgentThatIsToldToEndSaysSo) {
  StartAgentProcess();
  v1::Lease lease = NewLease(7, "fake-ms-30");
  lease.mutable_spec()->mutable_schedule()->set_steps(1000);
  ASSERT_TRUE(coordinator_->SendLease(lease));
  ASSERT_TRUE(WaitForStep(7, 2));
  kill(pid_, SIGTERM);
  const v1::LeaseEnded ended = End(7);
  EXPECT_EQ(ended.cause(), v1::FAILURE_CAUSE_WORKER_LOST);
  int status = 0;
  EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
  pid_ = 0;
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace attune
