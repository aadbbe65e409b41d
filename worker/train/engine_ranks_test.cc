// Ranks that train together against one that trains alone. A program of its own: OpenMP does not
// survive fork() once it has run in the parent.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>

#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"

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

// Those of rank 0 of so many, each in a process of its own.
std::vector<double> Losses(int steps, int world, const Change& change) {
  char directory[] = "/tmp/attune_engine_XXXXXX";
  int pipe_fds[2];
  CHECK(mkdtemp(directory) != nullptr && pipe(pipe_fds) == 0);
  for (int rank = 0; rank < world; ++rank) {
    if (fork() != 0) continue;
    auto store = NewDirectoryStore(directory);
    auto comm = world == 1
                    ? NewSelfCommunicator()
                    : NewGlooCommunicator({.rank = rank, .size = world}, store.get()).value();
    const std::vector<double> losses = LossesOf(steps, rank, world, comm.get(), change);
    const ssize_t bytes = static_cast<ssize_t>(losses.size() * sizeof(double));
    const bool sent = rank != 0 || write(pipe_fds[1], losses.data(), bytes) == bytes;
    _exit(sent && !testing::Test::HasFailure() ? 0 : 1);
  }
  for (int i = 0; i < world; ++i) {
    int status;
    EXPECT_GT(wait(&status), 0);
    EXPECT_EQ(status, 0);
  }
  close(pipe_fds[1]);
  std::vector<double> losses(steps);
  const ssize_t want = static_cast<ssize_t>(steps * sizeof(double));
  EXPECT_EQ(read(pipe_fds[0], losses.data(), want), want);
  close(pipe_fds[0]);
  return losses;
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
