// Ids are held to Hugging Face in tests/parity/text; here are the parts' contracts and broken
// files.
#include "worker/data/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "worker/data/stages/regex.h"
#include "worker/data/unicode.h"
#include "worker/io/json.h"

namespace attune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Bytes a-e and space, "ab", "abc" and " a"; <s> and <e> around a text.
constexpr absl::string_view kSmall = R"({
  "added_tokens": [{"id": 20, "content": "<s>", "special": true, "normalized": false},
                   {"id": 21, "content": "<e>", "special": true, "normalized": false},
                   {"id": 22, "content": "tag", "special": false, "normalized": false}],
  "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
  "post_processor": {"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}},
               {"SpecialToken": {"id": "<e>", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [20], "tokens": ["<s>"]},
                       "<e>": {"id": "<e>", "ids": [21], "tokens": ["<e>"]}}},
  "decoder": {"type": "ByteLevel"},
  "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
    "end_of_word_suffix": "", "fuse_unk": false,
    "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "Ġ": 5, "ab": 6, "abc": 7, "Ġa": 8, "bc": 9,
              "ð": 10, "Ł": 11, "z": 12, "Ģ": 13},
    "merges": ["Ġ a", "a b", "b c", "ab c"]}})";

Tokenizer Small() {
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::FromJson(kSmall, "small");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

TEST(TokenizerTest, MergesByRankThenPosition) {
  const Tokenizer tokenizer = Small();
  EXPECT_THAT(tokenizer.Encode("abc", false)->ids, ElementsAre(7));
  EXPECT_THAT(tokenizer.Encode("dbc", false)->ids, ElementsAre(3, 9));
  // " a" has the lowest rank, so "ab" cannot form in " abc".
  EXPECT_THAT(tokenizer.Encode("e abc", false)->ids, ElementsAre(4, 8, 9));
  EXPECT_THAT(tokenizer.Encode("abababc", false)->ids, ElementsAre(6, 6, 7));
}

TEST(TokenizerTest, SpecialTokensAndOffsets) {
  const Tokenizer tokenizer = Small();
  absl::StatusOr<Encoding> encoding = tokenizer.Encode("ab<e>tag a", true);
  ASSERT_TRUE(encoding.ok());
  EXPECT_THAT(encoding->ids, ElementsAre(20, 6, 21, 22, 8, 21));
  EXPECT_THAT(encoding->offsets, ElementsAre(ByteSpan{0, 0}, ByteSpan{0, 2}, ByteSpan{2, 5},
                                             ByteSpan{5, 8}, ByteSpan{8, 10}, ByteSpan{10, 10}));
  EXPECT_THAT(tokenizer.prefix_ids(), ElementsAre(20));
  EXPECT_THAT(tokenizer.suffix_ids(), ElementsAre(21));
  EXPECT_EQ(*tokenizer.Decode(encoding->ids, false), "<s>ab<e>tag a<e>");
  EXPECT_EQ(*tokenizer.Decode(encoding->ids, true), "abtag a");
  EXPECT_TRUE(tokenizer.is_special(20));
  EXPECT_FALSE(tokenizer.is_special(22));
  EXPECT_FALSE(tokenizer.is_special(-1));
  EXPECT_EQ(tokenizer.vocab_size(), 23);
  EXPECT_EQ(tokenizer.TokenToId("tag"), 22);
  EXPECT_EQ(tokenizer.TokenToId("Ġa"), 8);
  EXPECT_EQ(tokenizer.TokenToId("zz"), std::nullopt);
  EXPECT_EQ(tokenizer.IdToToken(8), "Ġa");
  EXPECT_EQ(tokenizer.IdToToken(15), std::nullopt);
}

TEST(TokenizerTest, PartsOfACharacterHaveTheWholeCharacter) {
  const Tokenizer tokenizer = Small();
  absl::StatusOr<Encoding> encoding = tokenizer.Encode("a\xF0\x9F\x9A\x80", false);
  // 0x9A is not in this vocabulary and falls away.
  EXPECT_THAT(encoding->ids, ElementsAre(0, 10, 11, 13));
  EXPECT_THAT(encoding->offsets,
              ElementsAre(ByteSpan{0, 1}, ByteSpan{1, 5}, ByteSpan{1, 5}, ByteSpan{1, 5}));
  EXPECT_EQ(tokenizer.Encode("\xF0\x9F\x9A\x80 a", false)->offsets.back(), (ByteSpan{4, 6}));
  EXPECT_EQ(*tokenizer.Decode(std::vector<int32_t>{0, 10, 11}, false), "a\xEF\xBF\xBD");
}

TEST(TokenizerTest, BadInputOfEncodeAndDecode) {
  const Tokenizer tokenizer = Small();
  const absl::Status status = tokenizer.Encode("ab\xff", false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "the text is not UTF-8 at byte 2");
  EXPECT_FALSE(tokenizer.Encode("\xED\xA0\x80", false).ok()) << "a surrogate";
  EXPECT_FALSE(tokenizer.Decode(std::vector<int32_t>{-1}, false).ok());
  EXPECT_EQ(*tokenizer.Decode(std::vector<int32_t>{0, 19, 999999}, false), "a");
  EXPECT_TRUE(tokenizer.Encode("", false)->ids.empty());
}

TEST(TokenizerTest, LongPiecesAreNotQuadratic) {
  const Tokenizer tokenizer = Small();
  const std::string text(2'000'000, 'a');
  absl::StatusOr<Encoding> encoding = tokenizer.Encode(text, false);
  ASSERT_TRUE(encoding.ok());
  EXPECT_EQ(encoding->ids.size(), text.size());
}

TEST(TokenizerTest, ThreadsShareIt) {
  const Tokenizer tokenizer = Small();
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 2000; ++i) {
        const std::string text = absl::StrCat("abc ", std::string(i % 50, 'b'), "cd");
        const auto encoding = tokenizer.Encode(text, false);
        if (*tokenizer.Decode(encoding->ids, false) != text) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, ElementsAre(0, 0, 0, 0));
}

std::string LoadError(const std::string& from, const std::string& to, absl::StatusCode code) {
  const std::string json = absl::StrReplaceAll(kSmall, {{from, to}});
  EXPECT_NE(json, kSmall) << from;
  const absl::Status status = Tokenizer::FromJson(json, "t.json").status();
  EXPECT_EQ(status.code(), code) << status;
  return std::string(status.message());
}

TEST(TokenizerTest, StagesThatAreNotThereAreNamed) {
  const auto code = absl::StatusCode::kUnimplemented;
  EXPECT_THAT(LoadError("\"BPE\"", "\"Morfessor\"", code),
              HasSubstr("model.type is \"Morfessor\""));
  EXPECT_THAT(LoadError("\"normalizer\": null", R"("normalizer": {"type": "Romanize"})", code),
              HasSubstr("normalizer.type is \"Romanize\""));
  EXPECT_THAT(LoadError("{\"type\": \"ByteLevel\", \"add", "{\"type\": \"Jieba\", \"add", code),
              HasSubstr("pre_tokenizer.type is \"Jieba\""));
  EXPECT_THAT(LoadError("TemplateProcessing", "GenericProcessing", code),
              HasSubstr("post_processor.type is \"GenericProcessing\""));
  EXPECT_THAT(LoadError("\"decoder\": {\"type\": \"ByteLevel\"}",
                        R"("decoder": {"type": "Moses"})", code),
              HasSubstr("decoder.type is \"Moses\""));
  EXPECT_THAT(LoadError("\"dropout\": null", "\"dropout\": 0.1", code), HasSubstr("model.dropout"));
  EXPECT_THAT(LoadError("\"end_of_word_suffix\": \"\"", "\"end_of_word_suffix\": \"</w>\"", code),
              HasSubstr("model.end_of_word_suffix"));
}

TEST(TokenizerTest, BrokenFilesHaveTheirOwnMessage) {
  const auto code = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(LoadError("\"a\": 0,", "\"a\": 1,", code), HasSubstr("has the id 1 twice"));
  EXPECT_THAT(LoadError("\"a\": 0,", "\"a\": -3,", code),
              HasSubstr("model.vocab.a is no token id"));
  EXPECT_THAT(LoadError("\"a\": 0,", "\"a\": 4194304,", code), HasSubstr("is no token id"));
  EXPECT_THAT(LoadError("\"Ġ a\",", "\"Ġ y\",", code),
              HasSubstr("model.merges[0] merges \"Ġ\" and \"y\", but \"y\" is not in"));
  EXPECT_THAT(LoadError("\"Ġ a\",", "\"Ġa\",", code), HasSubstr("model.merges[0] is no merge"));
  EXPECT_THAT(LoadError("\"ids\": [20]", "\"ids\": [15]", code),
              HasSubstr("adds the token 15, which the vocabulary does not have"));
  EXPECT_THAT(LoadError("\"id\": 22", "\"id\": 3", code),
              HasSubstr("\"tag\" has the id 3, which \"d\" has already"));
  EXPECT_THAT(LoadError("\"unk_token\": null", "\"unk_token\": \"<unk>\"", code),
              HasSubstr("model.unk_token is not in the vocabulary"));
  EXPECT_THAT(LoadError("\"id\": \"A\"", "\"id\": \"B\"", code),
              HasSubstr("must have the sequence A exactly once"));
  EXPECT_THAT(LoadError("\"use_regex\": true", "\"use_regex\": 1", code),
              HasSubstr("pre_tokenizer.use_regex is a number (1)"));
  EXPECT_EQ(Tokenizer::Load("/nonexistent").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Tokenizer::FromJson("{\"model\": ", "t.json").status().message()),
              HasSubstr("t.json:1:"));
}

TEST(RegexTest, RewritesOniguruma) {
  EXPECT_EQ(*TranslateOniguruma(R"(\s+[^\s\w]\S)"),
            R"(\p{White_Space}+[^\p{White_Space}\p{L}\p{M}\p{Nd}\p{Pc}]\P{White_Space})");
  EXPECT_EQ(*TranslateOniguruma(R"(a(bc){1,2}+d)"), R"(a(?:(bc){1,2})+d)");
  EXPECT_EQ(*TranslateOniguruma(R"([\]x]{,3}\u00e9)"), R"([\]x]{0,3}\x{00e9})");
  for (const char* pattern : {"[a[b]]", "[a&&b]", R"([\W])", R"(\h)", "(*UTF)a"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kUnimplemented) << pattern;
  }
  EXPECT_THAT(std::string(Regex::Compile("a(b").status().message()), HasSubstr("does not compile"));
}

TEST(RegexTest, FindsAllAndGivesUpOnRunaways) {
  std::vector<ByteSpan> matches;
  ASSERT_TRUE(Regex::Compile("b*")->FindAll("abba", &matches).ok());
  EXPECT_THAT(matches, ElementsAre(ByteSpan{0, 0}, ByteSpan{1, 3}, ByteSpan{4, 4}));
  const absl::Status status =
      Regex::Compile("(a|aa)+$")->FindAll(std::string(200, 'a') + "b", &matches);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

TEST(UnicodeTest, ReplacesMaximalSubparts) {
  EXPECT_EQ(ReplaceInvalidUtf8("a\xF0\x9F\x92z\xC0\x80\xE2\x82"), "a\uFFFDz\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(FindInvalidUtf8("ascii and \xC3\xA9 and more"), std::nullopt);
  EXPECT_EQ(FindInvalidUtf8("12345678\xF4\x90\x80\x80"), 8);
}

}  // namespace
}  // namespace attune
