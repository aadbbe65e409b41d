#include "worker/data/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/data/packing.h"
#include "worker/io/file.h"

namespace attune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kTokenizer = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/text/tokenizer.json";

// The layout of Llama 3: BOS in the template, no generation marks.
constexpr absl::string_view kHeaders =
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}";

const Tokenizer& TheTokenizer() {
  static const Tokenizer tokenizer = *Tokenizer::Load(kTokenizer);
  return tokenizer;
}

TokenizerConfig Config() {
  TokenizerConfig config;
  config.special_tokens = {{"bos_token", "<|begin_of_text|>"}, {"eos_token", "<|eot_id|>"}};
  return config;
}

class Fixture {
 public:
  explicit Fixture(absl::string_view source = kHeaders, DatasetOptions options = {},
                   TokenizerConfig config = Config())
      : template_(*ChatTemplate::FromSource(source, "test", config.special_tokens)),
        tokenizer_(&TheTokenizer(), config, &template_, options) {}

  absl::StatusOr<TokenizedExample> Tokenize(absl::string_view line,
                                            DatasetFormat format = DatasetFormat::kAuto) {
    return tokenizer_.Tokenize(line, format);
  }
  // The example's text with the trained parts in brackets.
  std::string Marked(absl::string_view line) {
    absl::StatusOr<TokenizedExample> example = Tokenize(line);
    if (!example.ok()) return example.status().ToString();
    return Mark(example->ids, example->trained);
  }
  std::string Error(absl::string_view line) {
    absl::StatusOr<TokenizedExample> example = Tokenize(line);
    EXPECT_FALSE(example.ok()) << line;
    return example.ok() ? "" : std::string(example.status().message());
  }
  const ExampleTokenizer& tokenizer() const { return tokenizer_; }

  static std::string Mark(absl::Span<const int32_t> ids, absl::Span<const uint8_t> trained) {
    std::string out;
    for (size_t begin = 0; begin < ids.size();) {
      size_t end = begin;
      while (end < ids.size() && trained[end] == trained[begin]) ++end;
      const std::string text =
          *TheTokenizer().Decode(ids.subspan(begin, end - begin), /*skip_special_tokens=*/false);
      absl::StrAppend(&out, trained[begin] ? "[" : "", text, trained[begin] ? "]" : "");
      begin = end;
    }
    return out;
  }

 private:
  ChatTemplate template_;
  ExampleTokenizer tokenizer_;
};

constexpr absl::string_view kTwoTurns =
    R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": " d "}]})";

TEST(ExampleTokenizerTest, TrainsAssistantTurnsWithTheirEnd) {
  EXPECT_EQ(Fixture().Marked(kTwoTurns),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[b<|eot_id|>]"
            "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[d<|eot_id|>]");
}

TEST(ExampleTokenizerTest, TrainsTheLastTurnOrAll) {
  EXPECT_THAT(Fixture(kHeaders, {.train_on = TrainOn::kLastAssistant}).Marked(kTwoTurns),
              HasSubstr("\n\nb<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
                        "<|start_header_id|>assistant<|end_header_id|>\n\n[d<|eot_id|>]"));
  const auto all = Fixture(kHeaders, {.train_on = TrainOn::kAll}).Tokenize(kTwoTurns);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->NumTrained(), static_cast<int64_t>(all->ids.size()) - 1);
}

TEST(ExampleTokenizerTest, WeightZeroIsNotTrained) {
  EXPECT_THAT(Fixture().Marked(
                  R"({"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b", "weight": 0},
                      {"role": "assistant", "content": "c", "weight": 1}]})"),
              HasSubstr("\n\nb<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
                        "[c<|eot_id|>]"));
}

TEST(ExampleTokenizerTest, GenerationMarksWin) {
  constexpr absl::string_view kMarked =
      "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
      "{{ m.content }}{% endgeneration %}<|eot_id|>\n{% else %}{{ m.content }}{% endif %}"
      "{% endfor %}";
  // The end lies outside of the mark and is trained all the same; the newline after it is not.
  EXPECT_EQ(Fixture(kMarked).Marked(kTwoTurns),
            "<|begin_of_text|><user>a<assistant>[b<|eot_id|>]\n<user>c<assistant>"
            "[ d <|eot_id|>]\n");
  EXPECT_THAT(Fixture(kMarked, {.train_on = TrainOn::kLastAssistant}).Marked(kTwoTurns),
              HasSubstr("<assistant>b<|eot_id|>\n<user>c<assistant>[ d <|eot_id|>]"));
}

TEST(ExampleTokenizerTest, WhiteSpaceAfterTheEndOfATurnIsNotTrained) {
  constexpr absl::string_view kWithNewlines =
      "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>\n"
      "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}";
  EXPECT_THAT(Fixture(kWithNewlines).Marked(kTwoTurns), HasSubstr("assistant\n[b<|eot_id|>]\n<|"));
}

TEST(ExampleTokenizerTest, ExactlyOneBos) {
  const int32_t bos = *TheTokenizer().TokenToId("<|begin_of_text|>");
  const auto starts = [&](Fixture fixture) {
    const auto example = fixture.Tokenize(kTwoTurns);
    EXPECT_TRUE(example.ok());
    return std::vector<bool>{example->ids[0] == bos, example->ids[1] == bos};
  };
  const std::string bare(kHeaders.substr(kHeaders.find("{% for")));
  const std::vector<bool> once = {true, false};
  EXPECT_EQ(starts(Fixture(kHeaders)), once) << "of the template";
  EXPECT_EQ(starts(Fixture(bare)), once) << "of the post-processor";
  EXPECT_EQ(starts(Fixture("{{ bos_token }}" + std::string(kHeaders))), once) << "twice";
  TokenizerConfig without = Config();
  without.add_bos_token = false;
  EXPECT_EQ(starts(Fixture(bare, {}, without)), (std::vector<bool>{false, false}));
  TokenizerConfig with = Config();
  with.add_bos_token = true;
  EXPECT_EQ(starts(Fixture(bare, {}, with)), once);
}

TEST(ExampleTokenizerTest, PromptAndCompletion) {
  Fixture fixture;
  EXPECT_EQ(fixture.Marked(R"({"prompt": "2 + 2 = ", "completion": "4"})"),
            "<|begin_of_text|>2 + 2 = [4<|eot_id|>]");
  EXPECT_EQ(fixture.Marked(R"({"prompt": "", "completion": "4<|eot_id|>"})"),
            "<|begin_of_text|>[4<|eot_id|>]")
      << "an end that is there is not doubled";
  EXPECT_EQ(fixture.Marked(
                R"({"prompt": [{"role": "user", "content": "a"},
                               {"role": "assistant", "content": "b"},
                               {"role": "user", "content": "c"}],
                    "completion": [{"role": "assistant", "content": "d"}]})"),
            Fixture(kHeaders, {.train_on = TrainOn::kLastAssistant}).Marked(kTwoTurns));
}

TEST(ExampleTokenizerTest, TextPartsAreTheirText) {
  EXPECT_EQ(Fixture().Marked(
                R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "b"},
                                                      {"type": "text", "text": "c"}]}]})"),
            Fixture().Marked(R"({"messages": [{"role": "user", "content": "a"},
                                              {"role": "assistant", "content": "bc"}]})"));
}

constexpr absl::string_view kCall =
    R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null,
        "tool_calls": [{"type": "function", "id": "x",
                        "function": {"name": "f", "arguments": "{\"k\": [1]}"}}]},
        {"role": "tool", "content": "r"}, {"role": "assistant", "content": "b"}],
        "tools": [{"type": "function", "function": {"name": "f"}}]})";

TEST(ExampleTokenizerTest, ToolArgumentsAreObjectsOrTextAsTheTemplateTakesThem) {
  const std::string loop =
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
      "{{ ARGS }}{% endfor %}<|eot_id|>{% endfor %}"
      "{% if add_generation_prompt %}<assistant>{% endif %}";
  std::string as_object = loop;
  as_object.replace(loop.find("ARGS"), 4,
                    "c.function.arguments.k[0] ~ c.function.arguments | tojson");
  std::string as_text = loop;
  as_text.replace(loop.find("ARGS"), 4, "'!' + c.function.arguments");
  EXPECT_THAT(Fixture(as_object).Marked(kCall), HasSubstr("[1{\"k\": [1]}<|eot_id|>]<tool>r"));
  EXPECT_THAT(Fixture(as_text).Marked(kCall), HasSubstr("[!{\"k\": [1]}<|eot_id|>]<tool>r"));
}

TEST(ExampleTokenizerTest, ATemplateWithoutPrefixesIsRefused) {
  // Writes the number of turns first, so nothing before the end is a prefix.
  const std::string counts = "{{ messages | length }} turns: " + std::string(kHeaders);
  EXPECT_THAT(Fixture(counts).Error(kTwoTurns),
              HasSubstr("messages[1] cannot be found in the text: the chat template writes the "
                        "conversation up to before it differently from the whole one: at byte 0 "
                        "\"1 turns: <|begin"));
  const std::string strict =
      "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no!') }}{% endif %}" +
      std::string(kHeaders);
  EXPECT_THAT(Fixture(strict).Error(kTwoTurns),
              AllOf(HasSubstr("refuses the conversation up to it"), HasSubstr("no!"),
                    HasSubstr("{% generation %}")));
}

TEST(ExampleTokenizerTest, BrokenLinesHaveTheirOwnMessage) {
  Fixture fixture;
  const auto messages = [](const std::string& list) { return "{\"messages\": " + list + "}"; };
  const auto after_user = [&](const std::string& message) {
    return messages(R"([{"role": "user", "content": "a"}, )" + message + "]");
  };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"messages\": [", "column 15: not valid JSON"},
      {"\"text\"", "the line is no JSON object"},
      {"{\"words\": \"a\"}", "has neither \"messages\" nor \"prompt\""},
      {"{\"messages\": [], \"prompt\": \"a\"}", "has both \"messages\" and \"prompt\""},
      {"{\"messages\": 1, \"messages\": 2}", "the key \"messages\" is there twice"},
      {messages("[]"), "messages is empty"},
      {messages("{}"), "messages is no list of messages"},
      {messages("[\"hi\"]"), "messages[0] is no object"},
      {messages(R"([{"content": "a"}])"), "messages[0] has no \"role\""},
      {after_user(R"({"role": "critic", "content": "a"})"),
       "messages[1].role is \"critic\"; known roles are system"},
      {after_user(R"({"role": "assistant"})"), "messages[1] has no \"content\""},
      {after_user(R"({"role": "assistant", "content": 5})"), "messages[1].content is a number"},
      {after_user(R"({"role": "assistant", "content": [{"type": "image_url"}]})"),
       "messages[1].content[0] has type \"image_url\"; attune trains on text only"},
      {after_user(R"({"role": "assistant", "content": [{"type": "text"}]})"),
       "messages[1].content[0] has no \"text\""},
      {after_user(R"({"role": "assistant", "content": ["x"]})"), "content[0] is no part"},
      {after_user(R"({"role": "assistant", "tool_calls": [{"id": 1}]})"),
       "messages[1].tool_calls[0] has no function.name"},
      {after_user(R"({"role": "assistant", "content": "b", "weight": 0.5})"),
       "messages[1].weight must be 0 or 1"},
      {messages(R"([{"role": "user", "content": "a"}])"),
       "the conversation has no assistant turn: nothing to train"},
      {after_user(R"({"role": "assistant", "content": "b", "weight": 0})"),
       "no assistant turn is to be trained"},
      {R"({"messages": [{"role": "assistant", "content": "a"}], "tools": {}})", "tools is no list"},
      {R"({"prompt": "a"})", "the line has no \"completion\""},
      {R"({"prompt": "a", "completion": ""})", "completion is empty: nothing to train"},
      {R"({"prompt": "a", "completion": []})", "must both be strings, or both be lists"},
      {"{\"prompt\": \"a\xff\", \"completion\": \"b\"}", "UTF-8"},
      {std::string(70, '[') + std::string(70, ']'), "nested more than 64 deep"},
  };
  for (const auto& [line, message] : cases) {
    EXPECT_THAT(fixture.Error(line), HasSubstr(message)) << line;
  }
  EXPECT_THAT(
      std::string(fixture.Tokenize("{\"prompt\": \"a\"}", DatasetFormat::kChat).status().message()),
      HasSubstr("has no \"messages\""));
}

TEST(ExampleTokenizerTest, ModelsThatLackSomethingAreFailedPreconditions) {
  const ExampleTokenizer no_template(&TheTokenizer(), Config(), nullptr, {});
  EXPECT_EQ(no_template.Tokenize(kTwoTurns, DatasetFormat::kAuto).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const ExampleTokenizer no_eos(&TheTokenizer(), {}, nullptr, {});
  const absl::Status status =
      no_eos.Tokenize(R"({"prompt": "a", "completion": "b"})", DatasetFormat::kAuto).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("eos_token"));
}

class LoadDatasetTest : public ::testing::Test {
 protected:
  void SetUp() override { directory_ = *CreateTempDirectory(::testing::TempDir(), "dataset_"); }
  void TearDown() override { EXPECT_TRUE(RemoveTree(directory_).ok()); }
  DatasetFile File(const std::string& name, const std::string& text) {
    const std::string path = directory_ + "/" + name;
    EXPECT_TRUE(WriteFileAtomic(path, text).ok());
    return {.path = path};
  }
  absl::StatusOr<Dataset> Load(const std::vector<DatasetFile>& files, DatasetOptions options = {}) {
    const Fixture fixture(kHeaders, options);
    return LoadDataset(files, fixture.tokenizer(), options);
  }
  static std::string Pair(const std::string& prompt, const std::string& completion) {
    return absl::StrCat("{\"prompt\": \"", prompt, "\", \"completion\": \"", completion, "\"}\n");
  }

  std::string directory_;
};

TEST_F(LoadDatasetTest, ReadsFilesInOrder) {
  const auto dataset = Load({File("a", "\n" + Pair("a", "b") + "  \n" + Pair("c", "d")),
                             File("b", "\xEF\xBB\xBF" + Pair("e", "f"))});
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  ASSERT_EQ(dataset->size(), 3);
  EXPECT_EQ((*dataset)[1].line, 4);
  EXPECT_EQ((*dataset)[1].file, 0);
  EXPECT_EQ((*dataset)[2].file, 1);
  EXPECT_EQ(Fixture::Mark((*dataset)[2].ids, (*dataset)[2].trained),
            "<|begin_of_text|>e[f<|eot_id|>]");
  EXPECT_EQ(dataset->counts().examples, 3);
  EXPECT_EQ(dataset->counts().tokens, 12);
  EXPECT_EQ(dataset->counts().trained_tokens, 6);
}

TEST_F(LoadDatasetTest, CollectsErrorsUpToTheLimit) {
  std::string text = Pair("ok", "ok");
  for (int i = 0; i < 30; ++i) text += "{\"prompt\": \"a\"}\n";
  const absl::Status status = Load({File("bad.jsonl", text)}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr("bad.jsonl:2: the line has no \"completion\"\n"));
  EXPECT_THAT(message, HasSubstr("bad.jsonl:21: the line has no"));
  EXPECT_THAT(message, Not(HasSubstr("bad.jsonl:22:")));
  EXPECT_THAT(message, HasSubstr("and perhaps more: reading stopped here"));
}

// Everything of a dataset, to compare two of them.
std::string Dump(const Dataset& dataset) {
  std::string out;
  for (int64_t i = 0; i < dataset.size(); ++i) {
    const ExampleView example = dataset[i];
    absl::StrAppend(&out, example.file, ":", example.line, " ",
                    Fixture::Mark(example.ids, example.trained), "\n");
  }
  return out;
}

TEST_F(LoadDatasetTest, ThreadsAndSpillingChangeNothing) {
  std::string text;
  for (int i = 0; i < 9000; ++i) text += Pair(absl::StrCat("q", i), std::string(i % 40 + 1, 'x'));
  const std::vector<DatasetFile> files = {File("a", text), File("b", Pair("last", "one"))};
  const auto one = Load(files, {.threads = 1});
  const auto many = Load(files, {.threads = 4, .spill_directory = directory_, .spill_bytes = 5000});
  ASSERT_TRUE(one.ok() && many.ok()) << one.status() << many.status();
  ASSERT_EQ(one->size(), 9001);
  EXPECT_EQ(Dump(*one), Dump(*many));
  EXPECT_EQ(one->counts().trained_tokens, many->counts().trained_tokens);
  EXPECT_EQ(Load(files, {.spill_directory = directory_ + "/none", .spill_bytes = 5000})
                .status()
                .code(),
            absl::StatusCode::kNotFound);
}

TEST_F(LoadDatasetTest, ErrorsComeInTheOrderOfLines) {
  std::string text;
  for (int i = 1; i <= 200; ++i) text += i % 20 == 7 ? "{}\n" : Pair("a", "b");
  const std::string message(Load({File("d", text)}, {.threads = 4}).status().message());
  size_t at = 0;
  for (int line = 7; line <= 187; line += 20) {
    const size_t found = message.find(absl::StrCat("d:", line, ": "), at);
    ASSERT_NE(found, std::string::npos) << line << " in " << message;
    at = found;
  }
}

TEST_F(LoadDatasetTest, DocumentsAreCutIntoExamples) {
  std::string words;
  for (int i = 0; i < 12; ++i) absl::StrAppend(&words, "harbour ");
  const auto dataset =
      Load({File("d", absl::StrCat("{\"text\": \"", words, "\"}\n"))}, {.max_tokens = 10});
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  ASSERT_GE(dataset->size(), 2);
  std::string whole;
  for (int64_t i = 0; i < dataset->size(); ++i) {
    EXPECT_LE(dataset->length(i), 10);
    const auto ids = (*dataset)[i].ids;
    EXPECT_EQ((*dataset)[i].line, 1);
    whole += *TheTokenizer().Decode(ids, false);
  }
  EXPECT_EQ(whole, absl::StrCat("<|begin_of_text|>", words, "<|eot_id|>"));
  EXPECT_EQ(dataset->counts().truncated, 0);
}

TEST_F(LoadDatasetTest, PreferencesAreRefusedForSft) {
  const absl::Status status =
      Load({File("d", Pair("a", "b") + R"({"prompt": "p", "chosen": "a", "rejected": "b"})")})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("d:2: is a preference pair"));
}

TEST_F(LoadDatasetTest, CountsRepeatsAndLeaks) {
  std::string story;
  for (int i = 0; i < 60; ++i) absl::StrAppend(&story, "word", i * i % 97, " ");
  const std::string train = Pair("q", "a") + Pair("q", story) + Pair("Q", "a ") +
                            Pair("q", story + "end") + Pair("other", "b");
  const std::string evaluation = Pair("new", "c") + Pair("q", "a") + Pair("q", "the " + story);
  const Fixture fixture;
  DuplicateFinder finder;
  const std::vector<DatasetFile> files = {File("t", train)}, held_out = {File("e", evaluation)};
  const auto dataset = LoadDataset(files, fixture.tokenizer(), {}, {.own = &finder});
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ(dataset->counts().exact_duplicates, 1);
  EXPECT_EQ(dataset->counts().near_duplicates, 1);
  ASSERT_EQ(dataset->repeats().size(), 2u);
  EXPECT_EQ(dataset->repeats()[0].example, 2);
  EXPECT_EQ(dataset->repeats()[0].first, 0);
  EXPECT_TRUE(dataset->repeats()[0].exact);
  EXPECT_EQ(dataset->repeats()[1].example, 3);
  EXPECT_EQ(dataset->repeats()[1].first, 1);
  const auto other = LoadDataset(held_out, fixture.tokenizer(), {}, {.training = &finder});
  ASSERT_TRUE(other.ok()) << other.status();
  ASSERT_EQ(other->leaks().size(), 2u);
  EXPECT_EQ(other->leaks()[0].example, 1);
  EXPECT_EQ(other->leaks()[0].first, 0);
  EXPECT_EQ(other->leaks()[1].first, 1);
  EXPECT_TRUE(other->repeats().empty());
}

TEST_F(LoadDatasetTest, EmptyAndMissingFiles) {
  EXPECT_THAT(Load({File("empty", "")}).status().ToString(),
              AllOf(HasSubstr("the dataset is empty"), HasSubstr("has no line")));
  EXPECT_THAT(Load({File("blank", "\n \n")}).status().ToString(), HasSubstr("has no line"));
  EXPECT_EQ(Load({{.path = directory_ + "/none"}}).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Load({File("long", Pair("a", std::string(100, 'x')))}, {.max_line_bytes = 50})
                  .status()
                  .ToString(),
              HasSubstr("long:1: the line is longer than 50 bytes"));
}

TEST_F(LoadDatasetTest, OverLongExamples) {
  const std::string words = "one two three four five six seven eight nine ten";
  const std::string text = Pair("a", "b") + Pair("a", words) + Pair(words, "late");
  DatasetOptions options{.max_tokens = 10};
  EXPECT_THAT(Load({File("d", text)}, options).status().ToString(),
              AllOf(HasSubstr("d:2: the example has "), HasSubstr("but at most 10 fit")));
  options.over_long = OverLong::kDrop;
  const auto dropped = Load({File("d", text)}, options);
  ASSERT_TRUE(dropped.ok());
  EXPECT_EQ(dropped->size(), 1);
  EXPECT_EQ(dropped->counts().dropped_over_long, 2);
  EXPECT_GT(dropped->counts().longest_tokens, 10);
  options.over_long = OverLong::kTruncate;
  const auto cut = Load({File("d", text)}, options);
  ASSERT_TRUE(cut.ok());
  EXPECT_EQ(cut->size(), 2);
  EXPECT_EQ(cut->length(1), 10);
  EXPECT_EQ(cut->counts().truncated, 1);
  EXPECT_EQ(cut->counts().dropped_untrained, 1) << "its completion was cut away";
  EXPECT_THAT(Load({File("e", Pair(words, "late"))}, options).status().ToString(),
              HasSubstr("has 1 examples, but 0 were dropped as too long and 1 had nothing"));
}

TEST_F(LoadDatasetTest, FillsPacks) {
  const auto dataset = Load({File("d", Pair("a", "bc") + Pair("d", "e"))});
  ASSERT_TRUE(dataset.ok());
  const ExampleView first = (*dataset)[0];
  const ExampleView second = (*dataset)[1];
  ASSERT_EQ(second.ids.size(), 4u);
  const int32_t n = static_cast<int32_t>(second.ids.size() + first.ids.size());
  const Pack pack = BuildPack(*dataset, std::vector<int64_t>{1, 0}, n + 3);
  EXPECT_EQ(pack.num_segments, 2);
  EXPECT_THAT(pack.q_begin, ElementsAre(0, 4, n));
  EXPECT_EQ(pack.ids.size(), static_cast<size_t>(n + 3));
  EXPECT_THAT(absl::MakeSpan(pack.positions).subspan(0, 6), ElementsAre(0, 1, 2, 3, 0, 1));
  // <bos> d [e <eot>]: "d" predicts e, e predicts <eot>, <eot> predicts nothing.
  EXPECT_THAT(absl::MakeSpan(pack.targets).subspan(0, 4),
              ElementsAre(-1, second.ids[2], second.ids[3], -1));
  EXPECT_EQ(pack.targets[n - 2], first.ids.back());
  EXPECT_EQ(pack.targets[n - 1], -1);
  EXPECT_EQ(pack.trained_tokens, dataset->counts().trained_tokens);
  for (int32_t row = n; row < n + 3; ++row) {
    EXPECT_EQ(pack.ids[row], 0);
    EXPECT_EQ(pack.targets[row], -1);
    EXPECT_EQ(pack.positions[row], 0);
  }
}

}  // namespace
}  // namespace attune
