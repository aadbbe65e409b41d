// Hundreds of seeded runs of the whole coordinator (state machine, scheduler, store) with crashes
// of coordinator, agents and trainers, broken links, duplicates, and users who change their mind.
//
//   coordinator_sim_test --seed=N [--trace]   one run, with what happened
//   coordinator_sim_test --seeds=N            the first N
#include <cstdio>
#include <cstring>
#include <string>

#include "gtest/gtest.h"
#include "server/core/job_state.h"
#include "tests/sim/sim_world.h"

namespace attune::sim {
namespace {

int64_t g_seed = -1;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(__clang__)
int64_t g_seeds = 80;  // sanitizers make a run ten times as long
#else
int64_t g_seeds = 600;
#endif
bool g_trace = false;

TEST(CoordinatorSimTest, InvariantsHoldUnderFaults) {
  Tally total;
  const int64_t first = g_seed >= 0 ? g_seed : 0;
  const int64_t last = g_seed >= 0 ? g_seed + 1 : g_seeds;
  for (int64_t seed = first; seed < last; ++seed) {
    World world(static_cast<uint64_t>(seed), g_trace);
    const std::string broken = world.Run();
    ASSERT_EQ(broken, "") << "seed " << seed;
    const Tally& tally = world.tally();
    total.commits += tally.commits;
    total.coordinator_crashes += tally.coordinator_crashes;
    total.agent_crashes += tally.agent_crashes;
    total.sessions_lost += tally.sessions_lost;
    total.attempts += tally.attempts;
    for (const auto& [state, count] : tally.ended) total.ended[state] += count;
  }
  std::printf(
      "%lld commits, %lld coordinator crashes, %lld agent crashes, %lld sessions lost, "
      "%lld attempts\n",
      static_cast<long long>(total.commits), static_cast<long long>(total.coordinator_crashes),
      static_cast<long long>(total.agent_crashes), static_cast<long long>(total.sessions_lost),
      static_cast<long long>(total.attempts));
  for (const auto& [state, count] : total.ended) {
    std::printf("%s %lld\n", StateLabel(state).c_str(), static_cast<long long>(count));
  }
  if (g_seed >= 0) return;
  // A simulator in which nothing goes wrong, or nothing ever succeeds, shows nothing.
  EXPECT_GT(total.coordinator_crashes, last);
  EXPECT_GT(total.agent_crashes, last / 2);
  EXPECT_GT(total.ended[v1::JOB_STATE_SUCCEEDED], last / 2);
  EXPECT_GT(total.ended[v1::JOB_STATE_FAILED], last / 10);
  EXPECT_GT(total.ended[v1::JOB_STATE_CANCELLED], last / 10);
}

TEST(CoordinatorSimTest, ASeedGivesTheSameRun) {
  World a(7, false), b(7, false);
  EXPECT_EQ(a.Run(), b.Run());
  EXPECT_EQ(a.tally().commits, b.tally().commits);
  EXPECT_EQ(a.tally().sessions_lost, b.tally().sessions_lost);
}

}  // namespace
}  // namespace attune::sim

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--seed=", 7) == 0) attune::sim::g_seed = std::stoll(argv[i] + 7);
    if (std::strncmp(argv[i], "--seeds=", 8) == 0) attune::sim::g_seeds = std::stoll(argv[i] + 8);
    if (std::strcmp(argv[i], "--trace") == 0) attune::sim::g_trace = true;
  }
  return RUN_ALL_TESTS();
}
