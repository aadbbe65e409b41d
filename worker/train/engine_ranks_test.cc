// Ranks that train together against one that trains alone. A program of its own: OpenMP does not
// survive fork() once it has run in the parent.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>

#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"
#include "worker/io/file.h"
#include "worker/train/trainer.h"

namespace attune {
namespace {

// The losses of a rank; `change` makes the case what it is tested as.
using Change = std::function<void(int rank, int world, EngineOptions* options)>;
std::vector<double> LossesOf(int steps, int rank, int world, Communicator* comm,
                             const Change& change) {
  GoldenCase golden = LoadGoldenCase(kGolden + "qlora60", DType::kF32);
  change(rank, world, &golden.options);
  std::unique_ptr<Engine> engine = StartEngine(golden);
  const Pack idle = IdlePack(golden.options.spec.batch().micro_batch_tokens());
  std::vector<double> losses;
  EXPECT_TRUE(engine->RanksAgree(7, comm).value());
  EXPECT_EQ(engine->RanksAgree(rank == 0 ? 0 : 9, comm).value(), world == 1);
  for (int s = 0; s < steps; ++s) {
    GoldenStep step = StepOf(golden, s, rank, world);
    step.input.learning_rate = 1e-2;
    const size_t passes = (golden.steps[s].size() + world - 1) / world;
    if (golden.options.shards > 1 && step.packs.size() < passes) step.packs.push_back({&idle, 99});
    losses.push_back(engine->TrainStep(step.input, step.packs, comm, [] {}).value().loss);
  }
  return losses;
}

// What f finds on rank 0 of so many, each in a process of its own: `count` numbers.
std::vector<double> OfRankZero(
    int count, int world,
    const std::function<std::vector<double>(int rank, Communicator* comm)>& f) {
  char directory[] = "/tmp/attune_engine_XXXXXX";
  int pipe_fds[2];
  CHECK(mkdtemp(directory) != nullptr && pipe(pipe_fds) == 0);
  for (int rank = 0; rank < world; ++rank) {
    if (fork() != 0) continue;
    auto store = NewDirectoryStore(directory);
    auto comm = world == 1
                    ? NewSelfCommunicator()
                    : NewGlooCommunicator({.rank = rank, .size = world}, store.get()).value();
    const std::vector<double> found = f(rank, comm.get());
    const ssize_t bytes = static_cast<ssize_t>(found.size() * sizeof(double));
    const bool sent = rank != 0 || write(pipe_fds[1], found.data(), bytes) == bytes;
    _exit(sent && !testing::Test::HasFailure() ? 0 : 1);
  }
  for (int i = 0; i < world; ++i) {
    int status;
    EXPECT_GT(wait(&status), 0);
    EXPECT_EQ(status, 0);
  }
  close(pipe_fds[1]);
  std::vector<double> found(count);
  const ssize_t want = static_cast<ssize_t>(count * sizeof(double));
  EXPECT_EQ(read(pipe_fds[0], found.data(), want), want);
  close(pipe_fds[0]);
  return found;
}
std::vector<double> Losses(int steps, int world, const Change& change) {
  return OfRankZero(steps, world, [&](int rank, Communicator* comm) {
    return LossesOf(steps, rank, world, comm, change);
  });
}

TEST(EngineRanksTest, TwoRanksTrainAsOne) {
  const Change as_it_is = [](int, int, EngineOptions*) {};
  constexpr int kSteps = 20;
  const std::vector<double> one = Losses(kSteps, 1, as_it_is), two = Losses(kSteps, 2, as_it_is);
  // The order of sums differs: rounding only, amplified over twenty steps of Adam.
  for (int s = 0; s < kSteps; ++s) EXPECT_NEAR(two[s], one[s], 2e-4 * one[s]) << s;
  EXPECT_LT(one.back(), 0.9 * one.front());
}

// However the weights are shared out, each rank sees the same.
TEST(EngineRanksTest, SharedWeightsChangeNoBit) {
  const auto change = [&](bool shared, bool prefetch, bool fp8) {
    return [=](int rank, int ranks, EngineOptions* options) {
      options->spec.mutable_quantization()->set_fp8_products(fp8);
      options->prefetch = prefetch;
      if (!shared) return;
      options->shards = ranks;
      options->shard = rank;
    };
  };
  for (const int world : {2, 3}) {
    const std::vector<double> want = Losses(4, world, change(false, false, false));
    EXPECT_EQ(Losses(4, world, change(true, false, false)), want) << world;
    EXPECT_EQ(Losses(4, world, change(true, true, false)), want) << world << ", one ahead";
  }
  EXPECT_EQ(Losses(1, 2, change(true, true, true)), Losses(1, 2, change(false, false, true)))
      << "8-bit floats";
}

// Counts what a rank reduces, and what it gets of the others in gathers.
class Counting : public Communicator {
 public:
  explicit Counting(Communicator* comm) : comm_(comm) {}
  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  absl::Status AllReduceSum(const Exec& exec, const TensorView& x) override {
    ++reductions;
    reduced_bytes += x.bytes();
    return comm_->AllReduceSum(exec, x);
  }
  absl::Status AllGather(const Exec& exec, const TensorView& mine, const TensorView& all) override {
    gathered_bytes += all.bytes() - mine.bytes();
    return comm_->AllGather(exec, mine, all);
  }
  absl::Status Broadcast(const Exec& exec, const TensorView& x, int root) override {
    return comm_->Broadcast(exec, x, root);
  }
  absl::Status Barrier() override { return comm_->Barrier(); }
  absl::Status Wait() override { return comm_->Wait(); }

  int64_t reductions = 0, reduced_bytes = 0, gathered_bytes = 0;

 private:
  Communicator* comm_;
};

// A step reduces the adapters' gradients once, however many passes it has; and of weights that are
// shared each pass gets the others' nibbles twice, forward and backward.
TEST(EngineRanksTest, MovesTheBytesThatItHasTo) {
  constexpr int kPasses = 2;
  for (const int world : {2, 3}) {
    for (const bool shared : {false, true}) {
      GoldenCase golden = LoadGoldenCase(kGolden + "qlora60", DType::kF32);
      if (shared) golden.options.shards = world;
      const std::vector<double> moved =
          OfRankZero(3, world, [&](int rank, Communicator* comm) -> std::vector<double> {
            if (shared) golden.options.shard = rank;
            std::unique_ptr<Engine> engine = StartEngine(golden);
            GoldenStep step = StepOf(golden, 0, 0, 1);
            step.packs.resize(1);
            while (step.packs.size() < kPasses) step.packs.push_back(step.packs[0]);
            Counting counting(comm);
            EXPECT_TRUE(engine->TrainStep(step.input, step.packs, &counting, [] {}).ok());
            return {static_cast<double>(counting.reductions),
                    static_cast<double>(counting.reduced_bytes),
                    static_cast<double>(counting.gathered_bytes)};
          });
      int64_t gradients = 0, shares = 0;
      for (const AdapterEntry& entry : golden.options.adapters.entries) {
        gradients += golden.options.adapters.r * (entry.shape.in + entry.shape.out);
      }
      for (Linear linear : LinearsOf(golden.options.model)) {
        const LinearShape shape = ShapeOf(golden.options.model, linear);
        const int64_t lines = (shape.in * shape.out / 2 + 255) / 256;  // that are not cut
        // Nobody wants the gradient of the first layer's input.
        const int64_t times = 2 * golden.options.model.num_layers - (PlaceOf(linear).matrix == 0);
        shares += times * ((lines + world - 1) / world) * 256;
      }
      EXPECT_EQ(moved[0], 1);
      EXPECT_NEAR(moved[1], 4.0 * static_cast<double>(gradients) + 32, 32) << "and the loss";
      EXPECT_EQ(moved[2], shared ? kPasses * (world - 1) * static_cast<double>(shares) : 0)
          << world;
    }
  }
}

class StopAt : public TrainerObserver {
 public:
  explicit StopAt(int stop_at) : stop_at_(stop_at) {}
  void Progress(const char*) override {}
  void Running(int64_t, int64_t) override {}
  void Step(const v1::StepMetrics& metrics) override { last_step = metrics.step(); }
  void Event(const v1::Event&) override {}
  void CheckpointWritten(const v1::CheckpointWritten& c) override { last_checkpoint = c.step(); }
  bool StopRequested() override { return ++asked_ == stop_at_; }
  int64_t ReleasedStep() override { return 0; }
  int64_t last_step = 0, last_checkpoint = 0;

 private:
  int stop_at_, asked_ = 0;
};

// Rank 1 is asked at step 3 of 8. The first pass of step 4 has begun then on both, and is left.
void StopTogether(const std::string& directory, int rank, bool run_ahead) {
  const std::string quickstart = std::string(ATTUNE_SOURCE_DIR) + "/examples/quickstart/";
  v1::TrainerAssignment assignment;
  v1::JobSpec* spec = assignment.mutable_spec();
  spec->mutable_model()->mutable_source()->set_path("model");
  spec->add_datasets()->mutable_source()->set_path("train");
  spec->set_precision(v1::PRECISION_F32);
  spec->mutable_schedule()->set_steps(8);
  spec->mutable_batch()->set_micro_batch_tokens(128);
  spec->mutable_batch()->set_micro_batches(2);
  spec->mutable_resources()->set_devices(2);
  ApplyDefaults("ranks", spec);
  assignment.set_model_directory(quickstart + "model");
  assignment.add_dataset_files(quickstart + "data/heldout.jsonl");
  assignment.mutable_device()->set_type(v1::DEVICE_TYPE_CPU);
  assignment.set_rank(rank);
  assignment.set_world_size(2);
  assignment.set_work_directory(directory);
  auto job = PrepareJob(assignment);
  ASSERT_TRUE(job.ok()) << job.status();
  (*job)->engine.run_ahead = run_ahead;
  auto store = NewDirectoryStore(directory + "/store");
  auto comm = NewGlooCommunicator({.rank = rank, .size = 2}, store.get());
  ASSERT_TRUE(comm.ok()) << comm.status();
  StopAt observer(rank == 1 ? 3 : 0);
  const TrainerOutcome outcome = Train(job->get(), comm->get(), &observer);
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(observer.last_step, rank == 0 ? 3 : 0);  // who tells is rank 0
  EXPECT_EQ(observer.last_checkpoint, rank == 0 ? 3 : 0);
}

TEST(EngineRanksTest, AStopOfOneRankEndsAllAtTheSameStep) {
  for (const bool run_ahead : {false, true}) {
    const std::string directory = *CreateTempDirectory(testing::TempDir(), "ranks-");
    ASSERT_EQ(mkdir((directory + "/store").c_str(), 0700), 0);
    for (int rank = 0; rank < 2; ++rank) {
      if (fork() != 0) continue;
      StopTogether(directory, rank, run_ahead);
      _exit(testing::Test::HasFailure() ? 1 : 0);
    }
    for (int rank = 0; rank < 2; ++rank) {
      int status;
      EXPECT_GT(wait(&status), 0);
      EXPECT_EQ(status, 0) << run_ahead;
    }
    RemoveTree(directory).IgnoreError();
  }
}

// Two ranks each keep half of the nibbles.
TEST(EngineRanksTest, SharedWeightsTakeLessMemory) {
  GoldenCase golden = LoadGoldenCase(kGolden + "qlora60", DType::kF32);
  const auto weights = [&] {
    return Engine::Plan(golden.options, *golden.weights).value().weights_bytes();
  };
  const int64_t whole = weights();
  golden.options.shards = 2;
  const int64_t half = weights();
  int64_t nibbles = 0;
  for (Linear linear : LinearsOf(golden.options.model)) {
    const LinearShape shape = ShapeOf(golden.options.model, linear);
    nibbles += golden.options.model.num_layers * shape.in * shape.out / 2;
  }
  EXPECT_LT(half, whole - nibbles / 2 + nibbles / 10);
  EXPECT_GT(half, whole - nibbles / 2 - nibbles / 10);
}

}  // namespace
}  // namespace attune
