// Ranks that train together against one that trains alone. A program of its own: OpenMP does not
// survive fork() once it has run in the parent.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"

namespace attune {
namespace {

TEST(EngineRanksTest, TwoRanksTrainAsOne) {
  const GoldenCase golden = LoadGoldenCase(kGolden + "qlora60", DType::kF32);
  constexpr int kSteps = 20;
  const auto run = [&](int rank, int world, Communicator* comm) {
    std::unique_ptr<Engine> engine = StartEngine(golden);
    std::vector<double> losses;
    for (int s = 0; s < kSteps; ++s) {
      GoldenStep step = StepOf(golden, s, rank, world);
      step.input.learning_rate = 1e-2;
      losses.push_back(engine->TrainStep(step.input, step.packs, comm, [] {}).value().loss);
    }
    return losses;
  };
  char directory[] = "/tmp/attune_engine_XXXXXX";
  ASSERT_NE(mkdtemp(directory), nullptr);
  std::vector<double> two(kSteps);
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  for (int rank : {0, 1}) {
    if (fork() != 0) continue;
    auto store = NewDirectoryStore(directory);
    auto comm = NewGlooCommunicator({.rank = rank, .size = 2}, store.get()).value();
    const std::vector<double> losses = run(rank, 2, comm.get());
    const ssize_t bytes = static_cast<ssize_t>(losses.size() * sizeof(double));
    const bool sent = rank == 1 || write(pipe_fds[1], losses.data(), bytes) == bytes;
    _exit(sent ? 0 : 1);
  }
  for (int i = 0; i < 2; ++i) {
    int status;
    ASSERT_GT(wait(&status), 0);
    ASSERT_EQ(status, 0);
  }
  const ssize_t want = static_cast<ssize_t>(kSteps * sizeof(double));
  ASSERT_EQ(read(pipe_fds[0], two.data(), want), want);
  std::unique_ptr<Communicator> self = NewSelfCommunicator();
  const std::vector<double> one = run(0, 1, self.get());
  // The order of sums differs: rounding only, amplified over twenty steps of Adam.
  for (int s = 0; s < kSteps; ++s) EXPECT_NEAR(two[s], one[s], 2e-4 * one[s]) << s;
}

}  // namespace
}  // namespace attune
