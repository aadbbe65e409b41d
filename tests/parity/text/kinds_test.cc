// Tokenizers of every kind against golden files that make_kinds_golden.py wrote with Hugging Face
// `tokenizers`: 10,000 strings for each, and every stage type and option on fewer.
#include <gtest/gtest.h>
#include <zlib.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "worker/data/tokenizer.h"
#include "worker/io/file.h"
#include "worker/io/json.h"

namespace attune {
namespace {

const std::string kFolder = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/text/";

std::string ReadGzip(const std::string& path) {
  std::string text;
  gzFile file = gzopen(path.c_str(), "rb");
  EXPECT_NE(file, nullptr) << path;
  char buffer[1 << 16];
  for (int n; (n = gzread(file, buffer, sizeof(buffer))) > 0;) {
    text.append(buffer, static_cast<size_t>(n));
  }
  EXPECT_EQ(gzclose(file), Z_OK) << path;
  return text;
}

const std::vector<std::string>& Strings() {
  static const std::vector<std::string>* strings = [] {
    auto* list = new std::vector<std::string>;
    const std::string text = ReadGzip(kFolder + "golden/many.jsonl.gz");
    for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
      absl::StatusOr<Json> json = ParseJson(line, "many.jsonl");
      EXPECT_TRUE(json.ok()) << json.status();
      list->push_back(json->get<std::string>());
    }
    return list;
  }();
  return *strings;
}

std::vector<uint32_t> ReadSums(const std::string& name) {
  absl::StatusOr<std::string> bytes = ReadFile(absl::StrCat(kFolder, "golden/kinds/", name));
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  std::vector<uint32_t> sums(bytes->size() / 4);
  std::memcpy(sums.data(), bytes->data(), sums.size() * 4);
  return sums;
}

// Spans lie in the text and begin in order, so that ranges of text can be looked up among them.
void CheckOffsets(const Encoding& encoding, const std::string& text) {
  ASSERT_EQ(encoding.offsets.size(), encoding.ids.size());
  int64_t begin = 0;
  for (const ByteSpan& span : encoding.offsets) {
    ASSERT_LE(begin, span.begin) << text;
    ASSERT_LE(span.begin, span.end) << text;
    ASSERT_LE(span.end, static_cast<int64_t>(text.size())) << text;
    begin = span.begin;
  }
}

void Compare(const std::string& path, const std::string& sums_file) {
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(path);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const std::vector<uint32_t> sums = ReadSums(sums_file);
  ASSERT_GE(Strings().size(), 10000u);
  ASSERT_EQ(sums.size(), Strings().size());
  int different = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const std::string& text = Strings()[i];
    absl::StatusOr<Encoding> encoding = tokenizer->Encode(text, /*add_special_tokens=*/true);
    ASSERT_TRUE(encoding.ok()) << encoding.status() << " of " << text;
    CheckOffsets(*encoding, text);
    absl::StatusOr<std::string> decoded = tokenizer->Decode(encoding->ids, false);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    const std::string shown = absl::StrCat(absl::StrJoin(encoding->ids, ","), "|", *decoded);
    const uLong sum = crc32(0, reinterpret_cast<const Bytef*>(shown.data()),
                            static_cast<uInt>(shown.size()));
    if (sum == sums[i]) continue;
    if (++different <= 5) ADD_FAILURE() << "string " << i << " " << Json(text) << " gave " << shown;
  }
  EXPECT_EQ(different, 0);
}

class TrainedTokenizer : public testing::TestWithParam<const char*> {};

TEST_P(TrainedTokenizer, EqualsHuggingFace) {
  Compare(absl::StrCat(kFolder, "tokenizers/", GetParam(), ".json"),
          absl::StrCat(GetParam(), ".crc32"));
}

INSTANTIATE_TEST_SUITE_P(Kinds, TrainedTokenizer,
                         testing::Values("metaspace", "mistral", "gemma", "t5", "albert", "bert",
                                         "bert-cased"),
                         [](const auto& info) {
                           std::string name = info.param;
                           return name == "bert-cased" ? std::string("bert_cased") : name;
                         });

class RealTokenizer : public testing::TestWithParam<const char*> {};

TEST_P(RealTokenizer, EqualsHuggingFace) {
  const std::string directory = absl::StrCat(ATTUNE_SHARED_DIR, "/tokenizers/", GetParam());
  if (!FileExists(directory + "/tokenizer.json")) {
    GTEST_SKIP() << "this vocabulary is not at hand in " << directory;
  }
  Compare(directory, absl::StrCat("real-", GetParam(), ".crc32"));
}

INSTANTIATE_TEST_SUITE_P(Kinds, RealTokenizer,
                         testing::Values("llama-bpe", "llama-spm", "bert-bge"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

// As `patched` in make_golden.py.
Json Patched(Json config, const Json& patch) {
  for (const auto& field : patch.items()) {
    if (field.key() == "model") {
      config["model"].update(field.value());
    } else {
      config[field.key()] = field.value();
    }
  }
  return config;
}

TEST(StageVariants, EqualHuggingFace) {
  absl::StatusOr<Json> variants = ReadJsonFile(kFolder + "golden/kinds/variants.json");
  ASSERT_TRUE(variants.ok()) << variants.status();
  ASSERT_GE(variants->size(), 40u);
  for (const Json& variant : *variants) {
    const std::string name = variant["name"];
    absl::StatusOr<Json> base = ReadJsonFile(
        absl::StrCat(kFolder, "tokenizers/", variant["base"].get<std::string>(), ".json"));
    ASSERT_TRUE(base.ok()) << base.status();
    absl::StatusOr<Tokenizer> tokenizer =
        Tokenizer::FromJson(Patched(*base, variant["patch"]).dump(), name);
    ASSERT_TRUE(tokenizer.ok()) << name << ": " << tokenizer.status();
    for (const Json& golden : variant["cases"]) {
      const std::string text = golden[0];
      absl::StatusOr<Encoding> encoding = tokenizer->Encode(text, /*add_special_tokens=*/true);
      if (golden[1].is_string()) {
        EXPECT_EQ(encoding.status().code(), absl::StatusCode::kFailedPrecondition) << name;
        continue;
      }
      ASSERT_TRUE(encoding.ok()) << name << ": " << encoding.status();
      EXPECT_EQ(encoding->ids, golden[1].get<std::vector<int32_t>>()) << name << ": " << golden[0];
      CheckOffsets(*encoding, text);
      absl::StatusOr<std::string> decoded = tokenizer->Decode(encoding->ids, true);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      EXPECT_EQ(*decoded, golden[2].get<std::string>()) << name << ": " << golden[0];
    }
  }
}

}  // namespace
}  // namespace attune
