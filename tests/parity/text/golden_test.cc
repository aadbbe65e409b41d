// Tokenizer and chat templates against golden files that make_golden.py wrote with Hugging Face
// `tokenizers` and jinja2.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "worker/data/chat_template.h"
#include "worker/data/tokenizer.h"
#include "worker/io/file.h"
#include "worker/io/json.h"

namespace attune {
namespace {

const std::string kFolder = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/text/";

std::string Read(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path);
  EXPECT_TRUE(text.ok()) << text.status();
  return text.ok() ? *text : "";
}

std::vector<OrderedJson> ReadLines(const std::string& path) {
  std::vector<OrderedJson> lines;
  const std::string text = Read(path);
  for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    absl::StatusOr<OrderedJson> json = ParseOrderedJson(line, path);
    EXPECT_TRUE(json.ok()) << json.status();
    if (json.ok()) lines.push_back(*std::move(json));
  }
  return lines;
}

// CRC-32 of zlib, as make_golden.py takes it.
uint32_t Crc(absl::string_view text) {
  uint32_t crc = 0xFFFFFFFF;
  for (char c : text) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xEDB88320 & (0 - (crc & 1)));
  }
  return ~crc;
}

TEST(GoldenTokenizer, EqualsHuggingFaceOnStrings) {
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(kFolder + "tokenizer.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const std::vector<OrderedJson> cases = ReadLines(kFolder + "golden/strings.jsonl");
  ASSERT_GE(cases.size(), 2000u);
  for (const OrderedJson& golden : cases) {
    const std::string text = golden[0];
    absl::StatusOr<Encoding> encoding = tokenizer->Encode(text, /*add_special_tokens=*/false);
    ASSERT_TRUE(encoding.ok()) << encoding.status();
    ASSERT_EQ(encoding->ids, golden[1].get<std::vector<int32_t>>()) << golden[0];
    std::string offsets;
    for (const ByteSpan& span : encoding->offsets) {
      absl::StrAppend(&offsets, span.begin, ",", span.end, ";");
    }
    ASSERT_EQ(Crc(offsets), golden[2].get<uint32_t>()) << golden[0] << " has " << offsets;
    absl::StatusOr<std::string> decoded = tokenizer->Decode(encoding->ids, false);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    ASSERT_EQ(*decoded, golden.size() > 3 ? golden[3].get<std::string>() : text);
  }
}

// As `patched` in make_golden.py.
OrderedJson Patched(const OrderedJson& base, const OrderedJson& patch) {
  OrderedJson config = base;
  for (const auto& field : patch.items()) {
    if (field.key() != "model") {
      config[field.key()] = field.value();
      continue;
    }
    for (const auto& option : field.value().items()) {
      if (option.key() == "vocab_add") {
        config["model"]["vocab"].update(option.value());
      } else if (option.key() == "merges_as_text") {
        for (OrderedJson& merge : config["model"]["merges"]) {
          merge = absl::StrCat(merge[0].get<std::string>(), " ", merge[1].get<std::string>());
        }
      } else {
        config["model"][option.key()] = option.value();
      }
    }
  }
  return config;
}

TEST(GoldenTokenizer, EqualsHuggingFaceInOtherStages) {
  absl::StatusOr<OrderedJson> base =
      ParseOrderedJson(Read(kFolder + "tokenizer.json"), "tokenizer.json");
  absl::StatusOr<OrderedJson> variants =
      ParseOrderedJson(Read(kFolder + "golden/variants.json"), "variants.json");
  ASSERT_TRUE(base.ok() && variants.ok());
  ASSERT_GE(variants->size(), 25u);
  for (const OrderedJson& variant : *variants) {
    const std::string name = variant["name"];
    absl::StatusOr<Tokenizer> tokenizer =
        Tokenizer::FromJson(Patched(*base, variant["patch"]).dump(), name);
    ASSERT_TRUE(tokenizer.ok()) << name << ": " << tokenizer.status();
    for (const OrderedJson& golden : variant["cases"]) {
      const std::string text = golden[0];
      absl::StatusOr<Encoding> encoding = tokenizer->Encode(text, /*add_special_tokens=*/true);
      ASSERT_TRUE(encoding.ok()) << encoding.status();
      EXPECT_EQ(encoding->ids, golden[1].get<std::vector<int32_t>>()) << name << ": " << golden[0];
      absl::StatusOr<std::string> decoded = tokenizer->Decode(encoding->ids, true);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      EXPECT_EQ(*decoded, golden.size() > 2 ? golden[2].get<std::string>() : text)
          << name << ": " << golden[0];
    }
  }
}

TEST(GoldenTokenizer, EqualsHuggingFaceWithTheLlama3Vocabulary) {
  const std::string directory = std::string(ATTUNE_SHARED_DIR) + "/tokenizers/llama-bpe";
  if (!FileExists(directory + "/tokenizer.json")) {
    GTEST_SKIP() << "the Llama 3 vocabulary is not at hand in " << directory;
  }
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(directory);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ(tokenizer->vocab_size(), 128256);
  const std::vector<OrderedJson> cases = ReadLines(kFolder + "golden/strings.jsonl");
  const std::vector<std::string> sums =
      absl::StrSplit(Read(kFolder + "golden/llama3.txt"), '\n', absl::SkipEmpty());
  ASSERT_EQ(cases.size(), sums.size());
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::string text = cases[i][0];
    absl::StatusOr<Encoding> encoding = tokenizer->Encode(text, false);
    ASSERT_TRUE(encoding.ok()) << encoding.status();
    const std::string ids = absl::StrJoin(encoding->ids, ",");
    ASSERT_EQ(absl::StrCat(Crc(ids)), sums[i]) << cases[i][0] << " gave " << ids;
    absl::StatusOr<std::string> decoded = tokenizer->Decode(encoding->ids, false);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    ASSERT_EQ(*decoded, text);
  }
  for (const OrderedJson& golden : ReadLines(directory + "/cases.jsonl")) {
    absl::StatusOr<Encoding> encoding = tokenizer->Encode(golden["text"].get<std::string>(), false);
    ASSERT_TRUE(encoding.ok()) << encoding.status();
    EXPECT_EQ(encoding->ids, golden["ids"].get<std::vector<int32_t>>()) << golden["text"];
  }
}

absl::StatusOr<RenderedChat> Render(const std::string& source, const OrderedJson& job) {
  absl::StatusOr<ChatTemplate> chat_template = ChatTemplate::FromSource(source, "default");
  if (!chat_template.ok()) return chat_template.status();
  const auto now = job["now"].get<std::vector<int>>();
  chat_template->set_clock(
      [now] { return absl::CivilSecond(now[0], now[1], now[2], now[3], now[4], now[5]); });
  ChatRequest request;
  request.messages = job["messages"];
  request.tools = job["tools"];
  request.documents = job["documents"];
  request.add_generation_prompt = job["add_generation_prompt"].get<bool>();
  request.variables = job["variables"];
  return chat_template->Render(request);
}

TEST(GoldenChatTemplate, EqualsJinja2) {
  std::map<std::string, std::string> sources;
  for (const char* name :
       {"expressions", "filters", "headers", "loops", "turns", "whitespace"}) {
    sources[name] = Read(absl::StrCat(kFolder, "templates/", name, ".jinja"));
  }
  const std::vector<OrderedJson> lines = ReadLines(kFolder + "golden/chat.jsonl");
  ASSERT_GE(lines.size(), 100u);
  int compared = 0;
  for (const OrderedJson& line : lines) {
    for (const auto& output : line["outputs"].items()) {
      const OrderedJson& golden = output.value();
      const std::string where =
          absl::StrCat(output.key(), ": ", line["job"]["name"].get<std::string>());
      absl::StatusOr<RenderedChat> chat = Render(sources.at(output.key()), line["job"]);
      if (golden.contains("error")) {
        EXPECT_EQ(chat.status().code(), absl::StatusCode::kInvalidArgument) << where;
        EXPECT_NE(chat.status().message().find(golden["error"].get<std::string>()),
                  absl::string_view::npos)
            << chat.status();
        continue;
      }
      ASSERT_TRUE(chat.ok()) << where << ": " << chat.status();
      if (golden["text"].is_string()) {
        EXPECT_EQ(chat->text, golden["text"].get<std::string>()) << where;
      } else {
        EXPECT_EQ(Crc(chat->text), golden["text"].get<uint32_t>()) << where << "\n" << chat->text;
      }
      OrderedJson spans = OrderedJson::array();
      for (const ByteSpan& span : chat->generation) spans.push_back({span.begin, span.end});
      EXPECT_EQ(spans, golden["generation"]) << where;
      ++compared;
    }
  }
  EXPECT_GE(compared, 400);
}

}  // namespace
}  // namespace attune
