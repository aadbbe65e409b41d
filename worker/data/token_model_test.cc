// Unigram, WordPiece and WordLevel, and the stages that come with them: what they do on a few
// texts, and what a broken file is told. Ids are held to Hugging Face in tests/parity/text.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "worker/data/stages/trie.h"
#include "worker/data/tokenizer.h"

namespace attune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<Tokenizer> Make(const std::string& model, const std::string& more = "") {
  return Tokenizer::FromJson(absl::StrCat("{\"model\": ", model, more, "}"), "t.json");
}

std::string ErrorOf(const std::string& model, const std::string& more = "") {
  const absl::Status status = Make(model, more).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  return std::string(status.message());
}

constexpr char kUnigram[] = R"({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0],
    ["a", -2], ["b", -2.5], ["ab", -4], ["abc", -9], ["c", -3], ["<0xC3>", -20], ["<0xA9>", -20]])";

TEST(Unigram, TakesTheBestSumOfScores) {
  absl::StatusOr<Tokenizer> tokenizer = Make(absl::StrCat(kUnigram, "}"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(tokenizer->Encode("ab", false)->ids, ElementsAre(3));      // -4 against -4.5
  EXPECT_THAT(tokenizer->Encode("abc", false)->ids, ElementsAre(3, 5));  // -7 against -9
  EXPECT_THAT(tokenizer->Encode("xya", false)->ids, ElementsAre(0, 1));  // one unknown
  EXPECT_THAT(tokenizer->Encode("xya", false)->offsets,
              ElementsAre(ByteSpan{0, 2}, ByteSpan{2, 3}));
}

TEST(Unigram, FallsBackToBytes) {
  absl::StatusOr<Tokenizer> tokenizer = Make(absl::StrCat(kUnigram, ", \"byte_fallback\": true}"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(tokenizer->Encode("aéb", false)->ids, ElementsAre(1, 6, 7, 2));
  EXPECT_THAT(tokenizer->Encode("aüb", false)->ids, ElementsAre(1, 0, 2));  // <0xBC> is not there
}

TEST(Unigram, BrokenVocabulariesAreNamed) {
  EXPECT_THAT(ErrorOf(R"({"type": "Unigram", "vocab": [["a"]]})"),
              HasSubstr("model.vocab[0] is no token"));
  EXPECT_THAT(ErrorOf(R"({"type": "Unigram", "vocab": {"a": 1}})"), HasSubstr("model.vocab"));
  EXPECT_THAT(ErrorOf(R"({"type": "Unigram", "unk_id": 5, "vocab": [["a", 0]]})"),
              HasSubstr("model.unk_id is 5, but the vocabulary has 1 tokens"));
}

TEST(Unigram, ATextWithoutTokensIsAnErrorWhereNothingIsUnknown) {
  absl::StatusOr<Tokenizer> tokenizer = Make(R"({"type": "Unigram", "vocab": [["a", 0]]})");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE(tokenizer->Encode("aa", false).ok());
  const absl::Status status = tokenizer->Encode("ax", false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("unk_id"));
}

TEST(WordPiece, CutsGreedilyOrNotAtAll) {
  absl::StatusOr<Tokenizer> tokenizer = Make(
      R"({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
          "max_input_chars_per_word": 6, "vocab": {"[UNK]": 0, "un": 1, "##do": 2, "##don": 3,
          "##e": 4, "##n": 5}})",
      R"(, "pre_tokenizer": {"type": "WhitespaceSplit"})");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(tokenizer->Encode("undone undo", false)->ids, ElementsAre(1, 3, 4, 1, 2));
  EXPECT_THAT(tokenizer->Encode("undox", false)->ids, ElementsAre(0));    // a rest without token
  EXPECT_THAT(tokenizer->Encode("undonen", false)->ids, ElementsAre(0));  // seven characters
  EXPECT_THAT(tokenizer->Encode("e", false)->ids, ElementsAre(0));        // only as a continuation
}

TEST(WordPiece, BrokenModelsAreNamed) {
  EXPECT_THAT(ErrorOf(R"({"type": "WordPiece", "vocab": {"a": -1}})"), HasSubstr("model.vocab.a"));
  EXPECT_THAT(ErrorOf(R"({"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": -1})"),
              HasSubstr("max_input_chars_per_word is negative"));
}

constexpr char kWords[] = R"({"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "a": 1}})";

TEST(Stages, BrokenOnesAreNamed) {
  const auto error = [](const std::string& stage) { return ErrorOf(kWords, ", " + stage); };
  EXPECT_THAT(error(R"("normalizer": {"type": "Precompiled", "precompiled_charsmap": "*"})"),
              HasSubstr("precompiled_charsmap is not base64"));
  EXPECT_THAT(error(R"("normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="})"),
              HasSubstr("precompiled_charsmap is no character map"));
  EXPECT_THAT(
      error(R"("normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""})"),
      HasSubstr("normalizer.pattern.Regex"));
  EXPECT_THAT(error(R"("pre_tokenizer": {"type": "Metaspace", "replacement": "__"})"),
              HasSubstr("replacement is not one character"));
  EXPECT_THAT(error(R"("pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "last"})"),
              HasSubstr("must be always, first or never"));
  EXPECT_THAT(error(R"("pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": ""})"),
              HasSubstr("delimiter is not one character"));
  EXPECT_THAT(error(R"("pre_tokenizer": {"type": "FixedLength", "length": 0})"),
              HasSubstr("length must be at least 1"));
  EXPECT_THAT(
      error(R"("post_processor": {"type": "BertProcessing", "sep": ["x"], "cls": ["y", 1]})"),
      HasSubstr("post_processor.sep is no token"));
  EXPECT_THAT(error(R"("decoder": {"type": "Strip", "content": "ab"})"),
              HasSubstr("decoder.content is not one character"));
  EXPECT_THAT(error(R"("decoder": {"type": "CTC", "pad_token": ""})"),
              HasSubstr("decoder.pad_token is empty"));
}

// A map whose trie leads out of itself: nothing is replaced, nothing is read beyond it.
TEST(Stages, DamagedCharacterMapsStayInTheirBounds) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::string bytes = {64, 0, 0, 0};
    for (int i = 0; i < 64; ++i) bytes.push_back(static_cast<char>(random()));
    bytes += "abc";
    absl::StatusOr<Tokenizer> tokenizer = Make(
        kWords, absl::StrCat(R"(, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ")",
                             absl::Base64Escape(bytes), "\"}"));
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    EXPECT_TRUE(tokenizer->Encode("aé\r\n👩‍👩‍👧‍👦 ÿ", false).ok());
  }
}

TEST(Trie, FindsEveryPrefixAmongMany) {
  std::mt19937 random(7);
  std::vector<std::string> keys;
  for (int i = 0; i < 20000; ++i) {
    std::string key;
    for (int n = 1 + static_cast<int>(random() % 6); n > 0; --n) {
      key.push_back(static_cast<char>(random() % 4 == 0 ? random() : 'a' + random() % 5));
    }
    keys.push_back(key);
  }
  std::vector<std::pair<absl::string_view, int32_t>> pairs;
  absl::flat_hash_map<std::string, int32_t> wanted;
  for (size_t i = 0; i < keys.size(); ++i) {
    pairs.emplace_back(keys[i], static_cast<int32_t>(i));
    wanted[keys[i]] = static_cast<int32_t>(i);
  }
  const Trie trie(pairs);
  for (int i = 0; i < 5000; ++i) {
    const std::string text = keys[random() % keys.size()] + keys[random() % keys.size()];
    std::vector<std::pair<size_t, int32_t>> found, brute;
    trie.ForEachPrefix(text, [&](size_t n, int32_t value) { found.emplace_back(n, value); });
    for (size_t n = 1; n <= text.size(); ++n) {
      if (const auto it = wanted.find(text.substr(0, n)); it != wanted.end()) {
        brute.emplace_back(n, it->second);
      }
    }
    ASSERT_EQ(found, brute);
  }
}

}  // namespace
}  // namespace attune
