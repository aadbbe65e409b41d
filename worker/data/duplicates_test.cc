#include "worker/data/duplicates.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

std::vector<std::string> Words(uint32_t seed, int count) {
  std::mt19937 random(seed);
  std::vector<std::string> words;
  for (int i = 0; i < count; ++i) words.push_back(absl::StrCat("w", random() % 5000));
  return words;
}

std::string Join(const std::vector<std::string>& words, const char* space = " ") {
  std::string text;
  for (const std::string& word : words) absl::StrAppend(&text, word, space);
  return text;
}

double Jaccard(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  const auto shingles = [](const std::vector<std::string>& words) {
    std::set<std::string> set;
    for (size_t i = 0; i + 2 < words.size(); ++i) {
      set.insert(words[i] + " " + words[i + 1] + " " + words[i + 2]);
    }
    return set;
  };
  const std::set<std::string> x = shingles(a), y = shingles(b);
  int both = 0;
  for (const std::string& s : x) both += static_cast<int>(y.count(s));
  return static_cast<double>(both) / static_cast<double>(x.size() + y.size() - both);
}

TEST(TextFingerprint, EstimatesJaccard) {
  double error = 0;
  const int rounds = 100;
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::string> a = Words(static_cast<uint32_t>(round), 400);
    std::vector<std::string> b = a;
    for (int i = 0; i < round; ++i) b[static_cast<size_t>(i * 4)] = "changed";
    const double estimate = TextFingerprint::Of(Join(a)).Similarity(TextFingerprint::Of(Join(b)));
    EXPECT_NEAR(estimate, Jaccard(a, b), 0.25);
    error += estimate - Jaccard(a, b);
  }
  EXPECT_NEAR(error / rounds, 0, 0.03);  // without bias
}

TEST(DuplicateFinder, FindsExactAndNearOnes) {
  DuplicateFinder finder;
  const std::vector<std::string> words = Words(1, 200);
  EXPECT_EQ(finder.FindOrAdd(TextFingerprint::Of(Join(words)), 5).first, -1);
  DuplicateFinder::Match match = finder.FindOrAdd(TextFingerprint::Of(Join(words, " \n")), 6);
  EXPECT_EQ(match.first, 5);
  EXPECT_TRUE(match.exact);  // white space does not count
  std::vector<std::string> near = words;
  near[100] = "other";
  match = finder.FindOrAdd(TextFingerprint::Of(Join(near)), 7);
  EXPECT_EQ(match.first, 5);
  EXPECT_FALSE(match.exact);
  EXPECT_EQ(finder.FindOrAdd(TextFingerprint::Of(Join(Words(2, 200))), 8).first, -1);
  // Half of it is another text.
  std::vector<std::string> half = words;
  for (size_t i = 100; i < 200; ++i) half[i] = absl::StrCat("n", i);
  EXPECT_EQ(finder.FindOrAdd(TextFingerprint::Of(Join(half)), 9).first, -1);
}

TEST(DuplicateFinder, ShortTextsAreComparedExactly) {
  DuplicateFinder finder;
  finder.FindOrAdd(TextFingerprint::Of("Yes."), 0);
  EXPECT_EQ(finder.Find(TextFingerprint::Of("No.")).first, -1);
  EXPECT_EQ(finder.Find(TextFingerprint::Of("yes.")).first, 0);
}

TEST(DuplicateFinder, ScriptsWithoutSpacesHaveWords) {
  DuplicateFinder finder;
  std::string text, near;
  for (int i = 0; i < 60; ++i) absl::StrAppend(&text, i % 7 == 0 ? "漁" : i % 3 == 0 ? "師" : "海", i);
  near = text + "船";
  finder.FindOrAdd(TextFingerprint::Of(text), 3);
  EXPECT_EQ(finder.Find(TextFingerprint::Of(near)).first, 3);
}

TEST(DuplicateFinder, FewFalseAlarmsAmongMany) {
  DuplicateFinder finder;
  for (int i = 0; i < 5000; ++i) {
    finder.FindOrAdd(TextFingerprint::Of(Join(Words(static_cast<uint32_t>(i), 60))), i);
  }
  int found = 0;
  for (int i = 5000; i < 7000; ++i) {
    found += finder.Find(TextFingerprint::Of(Join(Words(static_cast<uint32_t>(i), 60)))).first >= 0;
  }
  EXPECT_EQ(found, 0);
}

}  // namespace
}  // namespace attune
