// The loop of a rank: reading results one step behind the device (EngineOptions::run_ahead) shows
// nobody anything else than reading each step's at its end.
#include "worker/train/trainer.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "proto/job_spec.h"
#include "worker/io/file.h"

namespace attune {
namespace {

// What a run told, without times, in its order.
class Recorder : public TrainerObserver {
 public:
  explicit Recorder(int stop_at) : stop_at_(stop_at) {}
  void Progress(const char*) override {}
  void Running(int64_t from_step, int64_t total_steps) override {
    told.push_back(absl::StrCat("running from ", from_step, " to ", total_steps));
  }
  void Step(const v1::StepMetrics& m) override {
    v1::StepMetrics timeless = m;
    EXPECT_GT(m.step_s(), 0);
    EXPECT_NEAR(m.tokens_per_s() * m.step_s(), static_cast<double>(m.tokens()), 1e-3);
    timeless.clear_step_s();
    timeless.clear_tokens_per_s();
    told.push_back(absl::StrCat("step ", timeless.SerializeAsString()));
    steps.push_back(m.step());
  }
  void Event(const v1::Event& event) override {
    told.push_back(absl::StrCat("event ", event.SerializeAsString()));
    reasons.push_back(event.reason());
  }
  void CheckpointWritten(const v1::CheckpointWritten& written) override {
    told.push_back(absl::StrCat("checkpoint ", written.step(), " ", written.loss(), " ",
                                written.evaluation_loss(), " ", written.final(), " ",
                                written.best()));
    checkpoints.push_back(written.directory());
    for (const char* file :
         {"/adapter/adapter_model.safetensors", "/trainer/optimizer.safetensors"}) {
      contents.push_back(ReadFile(written.directory() + file).value());
    }
  }
  // Asked once a step.
  bool StopRequested() override { return ++asked_ == stop_at_; }
  int64_t ReleasedStep() override { return 0; }

  std::vector<std::string> told, reasons, checkpoints, contents;
  std::vector<int64_t> steps;

 private:
  int stop_at_;
  int asked_ = 0;
};

struct Outcome {
  TrainerOutcome outcome;
  Recorder recorder;
};

class TrainerTest : public testing::Test {
 protected:
  void SetUp() override {
    v1::JobSpec* spec = assignment_.mutable_spec();
    spec->mutable_model()->mutable_source()->set_path("model");
    spec->add_datasets()->mutable_source()->set_path("train");
    spec->mutable_evaluation()->set_fraction(0.02);
    spec->mutable_evaluation()->set_every_steps(3);
    spec->mutable_checkpoints()->set_every_steps(4);
    spec->set_precision(v1::PRECISION_F32);
    spec->mutable_schedule()->set_steps(8);
    spec->mutable_lora()->set_dropout(0.1);
    spec->mutable_batch()->set_micro_batch_tokens(128);
    spec->mutable_batch()->set_micro_batches(2);
    const std::string quickstart = std::string(ATTUNE_SOURCE_DIR) + "/examples/quickstart/";
    assignment_.set_model_directory(quickstart + "model");
    assignment_.add_dataset_files(quickstart + "data/heldout.jsonl");
    assignment_.mutable_device()->set_type(v1::DEVICE_TYPE_CPU);
    assignment_.set_world_size(1);
  }
  void TearDown() override {
    for (const std::string& directory : directories_) RemoveTree(directory).IgnoreError();
  }
  v1::JobSpec* spec() { return assignment_.mutable_spec(); }

  // From `checkpoint`, if there is one; asked to stop when it looks for the stop_at-th time.
  Outcome Run(bool run_ahead, int stop_at = 0, const std::string& checkpoint = "") {
    v1::TrainerAssignment assignment = assignment_;
    ApplyDefaults("trainer-test", assignment.mutable_spec());
    directories_.push_back(*CreateTempDirectory(testing::TempDir(), "trainer-"));
    assignment.set_work_directory(directories_.back());
    assignment.set_checkpoint_directory(checkpoint);
    auto job = PrepareJob(assignment);
    EXPECT_TRUE(job.ok()) << job.status();
    (*job)->engine.run_ahead = run_ahead;
    if (explodes_) {  // beyond what a spec may say
      (*job)->assignment.mutable_spec()->mutable_optimizer()->set_learning_rate(1e30);
    }
    const std::unique_ptr<Communicator> self = NewSelfCommunicator();
    Outcome out{.recorder = Recorder(stop_at)};
    out.outcome = Train(job->get(), self.get(), &out.recorder);
    return out;
  }
  void ExpectSame(const Outcome& ahead, const Outcome& plain) {
    EXPECT_EQ(ahead.outcome.status, plain.outcome.status);
    EXPECT_EQ(ahead.outcome.cause, plain.outcome.cause);
    EXPECT_EQ(ahead.recorder.told, plain.recorder.told);
    EXPECT_EQ(ahead.recorder.contents, plain.recorder.contents);
  }

  v1::TrainerAssignment assignment_;
  bool explodes_ = false;
  std::vector<std::string> directories_;
};

TEST_F(TrainerTest, AheadARunTellsAndKeepsTheSame) {
  const Outcome plain = Run(false), ahead = Run(true);
  EXPECT_TRUE(plain.outcome.status.ok()) << plain.outcome.status;
  EXPECT_EQ(plain.recorder.steps, (std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_GE(plain.recorder.checkpoints.size(), 3u);  // 3 (the best so far), 4, 8
  ExpectSame(ahead, plain);
}

// The step after the one that is asked has begun by then, and is left.
TEST_F(TrainerTest, AStopIsHeededAtTheSameStepAndTheRunGoesOnToTheSameEnd) {
  const std::string whole = Run(false).recorder.contents.back();
  for (int stop_at : {1, 3, 4, 8}) {
    const Outcome plain = Run(false, stop_at), ahead = Run(true, stop_at);
    ASSERT_TRUE(plain.outcome.status.ok()) << plain.outcome.status;
    EXPECT_EQ(plain.recorder.steps.size(), static_cast<size_t>(stop_at));
    ExpectSame(ahead, plain);
    ASSERT_FALSE(ahead.recorder.checkpoints.empty());
    if (stop_at == 8) continue;  // the end
    const Outcome rest = Run(true, 0, ahead.recorder.checkpoints.back());
    ASSERT_TRUE(rest.outcome.status.ok()) << rest.outcome.status;
    EXPECT_EQ(rest.recorder.steps.front(), stop_at + 1);
    EXPECT_EQ(rest.recorder.contents.back(), whole) << stop_at;
  }
}

// The weights are infinite after the first step, so the loss of the second is no number.
TEST_F(TrainerTest, ALossThatIsNoNumberEndsTheRunBeforeItIsTold) {
  explodes_ = true;
  spec()->mutable_schedule()->set_kind(v1::SCHEDULE_KIND_CONSTANT);
  spec()->mutable_schedule()->set_warmup_steps(0);
  for (int64_t every : {1, 100}) {
    spec()->mutable_checkpoints()->set_every_steps(every);
    const Outcome plain = Run(false), ahead = Run(true);
    EXPECT_EQ(plain.outcome.cause, v1::FAILURE_CAUSE_DIVERGED);
    EXPECT_NE(plain.outcome.status.message().find("step 2: loss"), std::string::npos)
        << plain.outcome.status;
    EXPECT_EQ(plain.recorder.steps, std::vector<int64_t>{1});
    EXPECT_EQ(plain.recorder.checkpoints.size(), every == 1 ? 1u : 0u);
    ExpectSame(ahead, plain);
  }
}

TEST_F(TrainerTest, EarlyStoppingEndsTheRunAtTheSameStep) {
  spec()->mutable_schedule()->set_steps(30);
  spec()->mutable_evaluation()->mutable_early_stopping()->set_patience(2);
  spec()->mutable_evaluation()->mutable_early_stopping()->set_min_delta(100);
  const Outcome plain = Run(false), ahead = Run(true);
  EXPECT_TRUE(plain.outcome.status.ok()) << plain.outcome.status;
  EXPECT_EQ(plain.recorder.steps.size(), 9u);  // the first evaluation is one, two follow
  EXPECT_EQ(plain.recorder.reasons, std::vector<std::string>{"EARLY_STOPPED"});
  ExpectSame(ahead, plain);
}

}  // namespace
}  // namespace attune
