// Text from a model: the key-value cache against the whole text at once, and what is drawn.
#include "worker/train/generator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "tests/parity/engine/golden_case.h"
#include "tests/parity/engine/golden_folder.h"

namespace attune {
namespace {

using Ids = std::vector<int32_t>;

std::unique_ptr<Generator> Start(const std::string& name, bool adapter,
                                 int64_t max_context = 4096) {
  GeneratorOptions options{.model_directory = kGolden + name + "/model",
                           .max_context = max_context};
  if (adapter) options.adapter_directory = kGolden + name + "/adapter";
  return Generator::Create(options).value();
}

Ids Prompt(int64_t n, int64_t vocabulary) {
  Ids ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>((7 + 13 * i * i) % vocabulary);
  return ids;
}

Ids Generate(Generator* generator, const Ids& prompt, const SamplingOptions& options) {
  Ids ids;
  const absl::Status s =
      generator->Generate(prompt, options, [&](int32_t id) { ids.push_back(id); });
  EXPECT_TRUE(s.ok()) << s;
  return ids;
}

int32_t Likeliest(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// A token at a time through the cache gives what the whole text gives at once. The prompt is
// longer than a chunk of the prefill.
class CacheTest : public testing::TestWithParam<const char*> {};

TEST_P(CacheTest, TheCacheGivesTheLogitsOfTheWholeText) {
  std::unique_ptr<Generator> generator = Start(GetParam(), /*adapter=*/true);
  for (const int64_t length : {10, 300}) {
    Ids text = Prompt(length, generator->config().vocab_size);
    const Ids answer = Generate(generator.get(), text, {.max_tokens = 12});
    ASSERT_EQ(answer.size(), 12u);
    for (int32_t token : answer) {
      const std::vector<float> logits = generator->NextLogits(text).value();
      EXPECT_EQ(token, Likeliest(logits)) << "after " << text.size();
      text.push_back(token);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, CacheTest, testing::Values("dense", "nf4"));
INSTANTIATE_TEST_SUITE_P(Families, CacheTest, testing::ValuesIn(kFamilyCases));

// Through the cache and its chunks, Transformers' logits of every place of a document.
class FamilyGeneratorTest : public testing::TestWithParam<const char*> {};

TEST_P(FamilyGeneratorTest, GivesTheOraclesLogits) {
  const GoldenCase golden = LoadGoldenCase(kGolden + GetParam(), DType::kF32);
  std::unique_ptr<Generator> generator =
      Generator::Create({.model_directory = golden.directory + "/model",
                         .adapter_directory = golden.directory + "/adapter",
                         .storage = WeightStorage::kNf4Double})
          .value();
  const std::vector<float> expected = golden.Expected("logits.0");
  const Pack& pack = golden.steps[0][0];
  const int64_t V = generator->config().vocab_size;
  for (int32_t s = 0; s < pack.num_segments; ++s) {
    for (int32_t t = pack.q_begin[s]; t < pack.q_begin[s + 1]; ++t) {
      // Rows of short prefixes of a document with two kinds of frequencies are not its own.
      if (t + 1 < pack.q_begin[s + 1] && generator->config().ropes[0].long_factors.size() > 0) {
        continue;
      }
      const std::vector<float> logits =
          generator
              ->NextLogits(
                  {pack.ids.data() + pack.q_begin[s], static_cast<size_t>(t + 1 - pack.q_begin[s])})
              .value();
      double error = 0, norm = 0;
      for (int64_t v = 0; v < V; ++v) {
        error += std::pow(logits[v] - expected[t * V + v], 2);
        norm += std::pow(expected[t * V + v], 2);
      }
      EXPECT_LT(std::sqrt(error / norm), 1e-4) << "document " << s << ", token " << t;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Trained, FamilyGeneratorTest,
                         testing::Values("modules", "modules_head", "modules_tied", "dora"));
INSTANTIATE_TEST_SUITE_P(Families, FamilyGeneratorTest, testing::ValuesIn(kFamilyCases));

TEST(GeneratorTest, TheAdapterChangesTheLogits) {
  const Ids prompt = {1, 2, 3};
  EXPECT_NE(Start("dense", true)->NextLogits(prompt).value(),
            Start("dense", false)->NextLogits(prompt).value());
}

TEST(GeneratorTest, EndsAtAStopTokenAtTheLimitAndAtTheEndOfTheContext) {
  std::unique_ptr<Generator> generator = Start("dense", true, /*max_context=*/16);
  const Ids prompt = Prompt(10, generator->config().vocab_size);
  // The token after the last place of the context is still known, but not fed back.
  const Ids all = Generate(generator.get(), prompt, {});
  EXPECT_EQ(all.size(), 7u);
  EXPECT_EQ(Generate(generator.get(), prompt, {.max_tokens = 3}),
            Ids(all.begin(), all.begin() + 3));
  const Ids until(all.begin(), std::find(all.begin(), all.end(), all[4]));
  EXPECT_EQ(Generate(generator.get(), prompt, {.stop_ids = {all[4]}}), until);
  const auto ignore = [](int32_t) {};
  EXPECT_TRUE(absl::IsInvalidArgument(generator->Generate({}, {}, ignore)));
  EXPECT_TRUE(absl::IsInvalidArgument(generator->Generate(Ids(17, 1), {}, ignore)));
  EXPECT_TRUE(absl::IsInvalidArgument(
      generator->Generate({static_cast<int32_t>(generator->config().vocab_size)}, {}, ignore)));
}

TEST(GeneratorTest, TheSameSeedIsTheSameText) {
  std::unique_ptr<Generator> generator = Start("dense", true);
  const Ids prompt = Prompt(5, generator->config().vocab_size);
  SamplingOptions options{.temperature = 1.5, .seed = 1, .max_tokens = 20};
  const Ids one = Generate(generator.get(), prompt, options);
  EXPECT_EQ(Generate(generator.get(), prompt, options), one);
  options.seed = 2;
  EXPECT_NE(Generate(generator.get(), prompt, options), one);
}

// Frequencies of many draws: softmax(logits / temperature), cut to the nucleus and scaled anew.
TEST(SampleTokenTest, DrawsFromTheNucleusAtTheTemperature) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.2f),
                                     std::log(0.3f)};
  constexpr int kDraws = 40000;
  const auto frequencies = [&](const SamplingOptions& options) {
    std::map<int32_t, double> of;
    for (int i = 0; i < kDraws; ++i) of[SampleToken(logits, options, i)] += 1.0 / kDraws;
    return of;
  };
  const auto expect = [](const std::map<int32_t, double>& found,
                         const std::map<int32_t, double>& wanted) {
    ASSERT_EQ(found.size(), wanted.size());
    for (const auto& [token, p] : wanted) {
      EXPECT_NEAR(found.at(token), p, 4 * std::sqrt(p * (1 - p) / kDraws) + 1e-9) << token;
    }
  };
  expect(frequencies({.temperature = 1}), {{0, 0.1}, {1, 0.4}, {2, 0.2}, {3, 0.3}});
  // 0.4 + 0.3 reaches 0.65; the next one is out.
  expect(frequencies({.temperature = 1, .top_p = 0.65}), {{1, 4.0 / 7}, {3, 3.0 / 7}});
  // p^2, scaled anew.
  expect(frequencies({.temperature = 0.5}),
         {{0, 0.01 / 0.3}, {1, 0.16 / 0.3}, {2, 0.04 / 0.3}, {3, 0.09 / 0.3}});
  expect(frequencies({.temperature = 1, .top_p = 0}), {{1, 1.0}});
  expect(frequencies({.temperature = 0}), {{1, 1.0}});
}

}  // namespace
}  // namespace attune
