// One process at a time, with the fake trainer.
#include "worker/agent/trainer_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>

#include "absl/time/clock.h"
#include "worker/agent/process_table.h"

namespace attune {
namespace {

namespace fs = std::filesystem;
using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;

class TrainerProcessTest : public testing::Test {
 protected:
  TrainerProcessTest() {
    char pattern[] = "/tmp/trainer_test_XXXXXX";
    directory_ = mkdtemp(pattern);
  }
  ~TrainerProcessTest() override {
    process_.reset();
    EXPECT_THAT(ProcessesWithToken(directory_), IsEmpty());
    fs::remove_all(directory_);
  }

  absl::Status Start(const std::string& name, const std::string& program = "fake_trainer") {
    v1::TrainerAssignment assignment;
    assignment.mutable_spec()->set_name(name);
    assignment.mutable_spec()->mutable_schedule()->set_steps(20);
    assignment.mutable_spec()->mutable_checkpoints()->set_every_steps(1000);
    assignment.set_world_size(1);
    assignment.set_attempt(1);
    assignment.set_work_directory(directory_);
    std::ofstream(directory_ + "/assignment", std::ios::binary) << assignment.SerializeAsString();
    TrainerProcessOptions options;
    options.program = std::string(ATTUNE_BIN_DIR) + "/" + program;
    options.assignment_file = directory_ + "/assignment";
    options.working_directory = directory_;
    options.record_file = directory_ + "/record";
    options.token = directory_;
    options.environment = {"OMP_NUM_THREADS=1"};
    TrainerProcessEvents events;
    events.message = [this](v1::TrainerToAgent message) { OnMessage(message); };
    events.line = [this](bool, std::string line) {
      std::lock_guard<std::mutex> lock(mutex_);
      lines_.push_back(std::move(line));
    };
    events.exited = [this](TrainerExit exit) {
      std::lock_guard<std::mutex> lock(mutex_);
      exit_ = std::move(exit);
      exited_ = true;
      changed_.notify_all();
    };
    absl::StatusOr<std::unique_ptr<TrainerProcess>> started =
        TrainerProcess::Start(options, std::move(events));
    if (!started.ok()) return started.status();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      process_ = *std::move(started);
      channel_ = process_.get();
    }
    changed_.notify_all();
    return absl::OkStatus();
  }

  void OnMessage(const v1::TrainerToAgent& message) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return channel_ != nullptr; });
    if (message.has_step()) last_step_ = message.step().step();
    v1::AgentToTrainer answer;
    if (message.has_rendezvous_get()) {
      answer.mutable_rendezvous_value()->set_key(message.rendezvous_get().key());
      answer.mutable_rendezvous_value()->set_value("value-0");
      channel_->Send(answer).IgnoreError();
    }
    if (message.has_checkpoint()) {
      answer.mutable_checkpoint_release()->set_step(message.checkpoint().step());
      channel_->Send(answer).IgnoreError();
    }
    changed_.notify_all();
  }

  TrainerExit WaitForExit() {
    std::unique_lock<std::mutex> lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(20), [this] { return exited_; }));
    return exit_;
  }

  void WaitForStep(int64_t step) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(20), [&] { return last_step_ >= step; });
    ASSERT_GE(last_step_, step);
  }

  std::string directory_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> lines_;
  int64_t last_step_ = 0;
  TrainerExit exit_;
  bool exited_ = false;
  std::unique_ptr<TrainerProcess> process_;
  // The same, also while the process is being ended: callbacks still come then.
  TrainerProcess* channel_ = nullptr;
};

TEST_F(TrainerProcessTest, EverythingIsDeliveredBeforeTheExit) {
  ASSERT_TRUE(Start("fake-spam-500-ms-1").ok());
  const TrainerExit exit = WaitForExit();
  EXPECT_FALSE(exit.signaled);
  EXPECT_EQ(exit.code, 0);
  EXPECT_EQ(last_step_, 20);
  EXPECT_EQ(lines_.size(), 502u);
  EXPECT_THAT(exit.last_lines, Contains(HasSubstr("OMP_NUM_THREADS=1")));
}

TEST_F(TrainerProcessTest, SaysBySignalAndWithLastLines) {
  ASSERT_TRUE(Start("fake-always-3-ms-1").ok());
  const TrainerExit exit = WaitForExit();
  EXPECT_TRUE(exit.signaled);
  EXPECT_EQ(exit.code, SIGABRT);
  EXPECT_THAT(exit.last_lines, Contains(HasSubstr("about to crash at step 3")));
}

TEST_F(TrainerProcessTest, ChildrenThatLeftTheGroupEndToo) {
  ASSERT_TRUE(Start("fake-child-1-always-3-ms-1").ok());
  WaitForExit();
  EXPECT_THAT(ProcessesWithToken(directory_), IsEmpty());
}

TEST_F(TrainerProcessTest, KillEndsEvenATrainerThatIsStopped) {
  ASSERT_TRUE(Start("fake-ms-20-deaf-1-child-1").ok());
  WaitForStep(2);
  kill(process_->pid(), SIGSTOP);
  const absl::Time before = absl::Now();
  process_->Kill();
  EXPECT_TRUE(WaitForExit().signaled);
  EXPECT_LT(absl::Now() - before, absl::Seconds(2));
  process_->Kill();  // Nothing happens: the pid is no longer ours.
}

TEST_F(TrainerProcessTest, AProgramThatIsNotThereIsAnError) {
  const absl::Status status = Start("fake", "no_such_trainer");
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("no_such_trainer"));
}

TEST_F(TrainerProcessTest, TheRecordNamesTheProcess) {
  ASSERT_TRUE(Start("fake-ms-20").ok());
  const absl::StatusOr<ProcessRecord> record = ReadProcessRecord(directory_ + "/record");
  ASSERT_TRUE(record.ok());
  EXPECT_EQ(record->pid, process_->pid());
  EXPECT_EQ(record->start_ticks, *StartTicks(process_->pid()));
}

}  // namespace
}  // namespace attune
