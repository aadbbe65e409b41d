#include "worker/data/mixing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace attune {
namespace {

using ::testing::ElementsAre;

TEST(DrawEpoch, WholeWeightsAreExact) {
  for (uint64_t epoch = 0; epoch < 5; ++epoch) {
    EXPECT_THAT(DrawEpoch({1, 1, 1}, 42, epoch), ElementsAre(0, 1, 2));
    EXPECT_THAT(DrawEpoch({2, 0, 1}, 42, epoch), ElementsAre(0, 0, 2));
  }
}

TEST(DrawEpoch, FractionsHoldOnAverageAndChangeByEpoch) {
  const std::vector<double> weights(1000, 0.25);
  std::vector<int> seen(weights.size());
  int64_t total = 0;
  for (uint64_t epoch = 0; epoch < 200; ++epoch) {
    const std::vector<int64_t> drawn = DrawEpoch(weights, 7, epoch);
    total += static_cast<int64_t>(drawn.size());
    for (int64_t i : drawn) ++seen[static_cast<size_t>(i)];
    EXPECT_EQ(drawn, DrawEpoch(weights, 7, epoch));
  }
  EXPECT_NEAR(static_cast<double>(total), 50000, 1000);
  for (int times : seen) EXPECT_NEAR(times, 50, 30);
}

TEST(DrawEpoch, AnEpochIsNeverEmpty) {
  for (uint64_t epoch = 0; epoch < 50; ++epoch) {
    EXPECT_EQ(DrawEpoch({0.001, 0}, 1, epoch), std::vector<int64_t>{0});
  }
}

}  // namespace
}  // namespace attune
