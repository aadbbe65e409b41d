#include "worker/data/packing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

namespace attune {
namespace {

using ::testing::HasSubstr;

using Packs = std::vector<std::vector<int64_t>>;

std::vector<int64_t> UsualLengths(int n, int64_t most) {
  std::mt19937 draw(1);
  std::lognormal_distribution<double> length(std::log(300.0), 0.8);
  std::vector<int64_t> lengths;
  for (int i = 0; i < n; ++i) {
    lengths.push_back(std::clamp<int64_t>(static_cast<int64_t>(length(draw)), 1, most));
  }
  return lengths;
}

int64_t Sum(const std::vector<int64_t>& lengths, const std::vector<int64_t>& pack) {
  int64_t sum = 0;
  for (int64_t i : pack) sum += lengths[i];
  return sum;
}

TEST(FormPacksTest, EachExampleOnceWithinTheLimits) {
  const std::vector<int64_t> lengths = UsualLengths(5000, 2048);
  const Packs packs = *FormPacks(lengths, {.pack_tokens = 2048, .max_segments = 8, .seed = 3});
  std::set<int64_t> seen;
  for (const auto& pack : packs) {
    EXPECT_FALSE(pack.empty());
    EXPECT_LE(pack.size(), 8u);
    EXPECT_LE(Sum(lengths, pack), 2048);
    for (int64_t i : pack) EXPECT_TRUE(seen.insert(i).second) << i;
  }
  EXPECT_EQ(seen.size(), lengths.size());
}

TEST(FormPacksTest, PacksAreNearlyFull) {
  for (int64_t tokens : {1024, 2048, 8192}) {
    const std::vector<int64_t> lengths = UsualLengths(5000, tokens);
    const Packs packs = *FormPacks(lengths, {.pack_tokens = tokens, .seed = 3});
    int64_t total = 0;
    for (int64_t length : lengths) total += length;
    const double fill = static_cast<double>(total) /
                        static_cast<double>(tokens * static_cast<int64_t>(packs.size()));
    EXPECT_GE(fill, 0.95) << tokens;
  }
}

TEST(FormPacksTest, IsAFunctionOfSeedAndEpoch) {
  const std::vector<int64_t> lengths = UsualLengths(500, 1024);
  const PackOptions options{.pack_tokens = 1024, .seed = 3, .epoch = 1};
  const Packs packs = *FormPacks(lengths, options);
  EXPECT_EQ(packs, *FormPacks(lengths, options));
  PackOptions other = options;
  other.epoch = 2;
  EXPECT_NE(packs, *FormPacks(lengths, other));
  other = options;
  other.seed = 4;
  EXPECT_NE(packs, *FormPacks(lengths, other));
  // Pinned: resumed runs of later versions must see the same order.
  const std::vector<int64_t> ten = {5, 3, 8, 1, 9, 2, 7, 4, 6, 10};
  const Packs pinned = {{6, 1}, {8, 7}, {2, 5}, {0}, {9}, {4, 3}};
  EXPECT_EQ(*FormPacks(ten, {.pack_tokens = 10, .seed = 1, .epoch = 0}), pinned);
}

TEST(FormPacksTest, FullPacksAreNotAllInFront) {
  const std::vector<int64_t> lengths = UsualLengths(4000, 1024);
  const Packs packs = *FormPacks(lengths, {.pack_tokens = 1024, .seed = 9});
  int64_t halves[2] = {0, 0};
  for (size_t i = 0; i < packs.size(); ++i) {
    halves[i * 2 / packs.size()] += static_cast<int64_t>(packs[i].size());
  }
  EXPECT_NEAR(static_cast<double>(halves[0]) / static_cast<double>(halves[1]), 1.0, 0.1);
}

TEST(FormPacksTest, RefusesLengthsThatDoNotFit) {
  const std::vector<int64_t> lengths = {5, 11};
  EXPECT_THAT(std::string(FormPacks(lengths, {.pack_tokens = 10}).status().message()),
              HasSubstr("example 1 has 11 tokens; a pack holds 1 to 10"));
  EXPECT_TRUE(FormPacks({}, {.pack_tokens = 10})->empty());
}

TEST(SplitHeldOutTest, HoldsOutByIndexAlone) {
  const HeldOutSplit split = SplitHeldOut(10000, 0.1, 5);
  EXPECT_NEAR(static_cast<double>(split.held_out.size()), 1000, 100);
  EXPECT_EQ(split.held_out.size() + split.train.size(), 10000u);
  // An example's side does not depend on how many others there are.
  const HeldOutSplit fewer = SplitHeldOut(5000, 0.1, 5);
  EXPECT_TRUE(std::equal(fewer.held_out.begin(), fewer.held_out.end(), split.held_out.begin()));
  EXPECT_TRUE(SplitHeldOut(100, 0, 5).held_out.empty());
  for (uint64_t seed = 0; seed < 50; ++seed) {
    EXPECT_FALSE(SplitHeldOut(2, 0.01, seed).held_out.empty());
    EXPECT_FALSE(SplitHeldOut(2, 0.99, seed).train.empty());
  }
}

}  // namespace
}  // namespace attune
