#include "worker/train/data_preview.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "worker/io/file.h"

namespace attune {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

const std::string kTokenizer = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/text/tokenizer.json";

// A job with its data read, as PrepareData leaves it.
PreparedJob Job(const std::string& lines) {
  PreparedJob job;
  const std::string path = absl::StrCat(testing::TempDir(), "/preview.jsonl");
  EXPECT_TRUE(WriteFileAtomic(path, lines).ok());
  job.assignment.add_dataset_files(path);
  job.tokenizer = std::make_shared<const Tokenizer>(*Tokenizer::Load(kTokenizer));
  TokenizerConfig config;
  config.special_tokens = {{"bos_token", "<|begin_of_text|>"}, {"eos_token", "<|eot_id|>"}};
  const ExampleTokenizer examples(job.tokenizer.get(), config, nullptr, {});
  absl::StatusOr<Dataset> dataset = LoadDataset({{path}}, examples, {});
  EXPECT_TRUE(dataset.ok()) << dataset.status();
  for (int64_t i = 0; i < dataset->size(); ++i) job.train.examples.push_back(i);
  job.train.dataset = std::make_shared<const Dataset>(*std::move(dataset));
  return job;
}

constexpr char kPair[] = R"({"prompt": "Who?", "completion": "Me \u001b[2J and\nyou"})";

TEST(DataPreview, MarksWhatIsTrained) {
  const std::string plain = PreviewExamples(Job(kPair), {.samples = 1});
  EXPECT_THAT(plain, HasSubstr("preview.jsonl:1"));
  EXPECT_THAT(plain, HasSubstr("<|begin_of_text|>Who?⟦Me \\x1B[2J and\nyou<|eot_id|>⟧"));
  const std::string color = PreviewExamples(Job(kPair), {.samples = 1, .color = true});
  EXPECT_THAT(color, HasSubstr("Who?\x1b[32mMe \\x1B[2J and\nyou<|eot_id|>\x1b[0m"));
}

TEST(DataPreview, ShowsNoMoreThanWasAskedFor) {
  const std::string three = absl::StrCat(kPair, "\n", kPair, "\n", kPair, "\n");
  const std::string two = PreviewExamples(Job(three), {.samples = 2});
  EXPECT_THAT(two, HasSubstr("preview.jsonl:2"));
  EXPECT_THAT(two, Not(HasSubstr("preview.jsonl:3")));
  EXPECT_THAT(PreviewExamples(Job(kPair), {.samples = 1, .max_tokens = 3}),
              HasSubstr("tokens more"));
}

TEST(DataPreview, HistogramCountsEveryExample) {
  std::string lines;
  for (int i = 0; i < 30; ++i) {
    absl::StrAppend(&lines, R"({"prompt": "a", "completion": ")",
                    std::string(i < 20 ? 1 : 300, '7'), "\"}\n");
  }
  const PreparedJob job = Job(lines);
  const std::string text = DescribeData(job);
  EXPECT_THAT(text, HasSubstr("30 examples"));
  EXPECT_THAT(text, HasSubstr("       4-7               20 "
                              "████████████████████████████████████████\n"));
  EXPECT_THAT(text, HasSubstr("10 ████████████████████\n"));
}

}  // namespace
}  // namespace attune
