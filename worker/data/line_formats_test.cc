// Lines of every format: what they become, and what wrong ones are told.
#include "worker/data/line_formats.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "worker/data/chat_example.h"

namespace attune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Kind = ExampleText::Kind;

ExampleText Parse(absl::string_view line) {
  absl::StatusOr<ExampleText> example = ParseExample(line, LineFormat::kAuto);
  EXPECT_TRUE(example.ok()) << line << ": " << example.status();
  return example.ok() ? *example : ExampleText();
}

std::string Error(absl::string_view line, LineFormat format = LineFormat::kAuto) {
  absl::StatusOr<ExampleText> example = ParseExample(line, format);
  EXPECT_EQ(example.status().code(), absl::StatusCode::kInvalidArgument) << line;
  return std::string(example.status().message());
}

TEST(LineFormats, ShareGptIsAConversation) {
  const ExampleText example = Parse(
      R"({"system": "Be brief.", "conversations": [{"from": "human", "value": "a"},
          {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
          {"from": "observation", "value": "7"}, {"from": "gpt", "value": "b", "weight": 0}],
          "tools": "[{\"name\": \"f\"}]"})");
  EXPECT_EQ(example.kind, Kind::kChat);
  EXPECT_EQ(example.request.messages.dump(),
            R"([{"role":"system","content":"Be brief."},{"role":"user","content":"a"},)"
            R"({"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f",)"
            R"("arguments":{"x":1}}}]},{"role":"tool","content":"7"},)"
            R"({"role":"assistant","content":"b"}])");
  EXPECT_EQ(example.request.tools.dump(), R"([{"name":"f"}])");
  EXPECT_THAT(example.assistant_turns, ElementsAre(2, 4));
  EXPECT_THAT(example.trained_turns, ElementsAre(true, false));
}

TEST(LineFormats, AlpacaIsAConversation) {
  EXPECT_EQ(Parse(R"({"instruction": "Add.", "input": "1 2", "output": "3"})")
                .request.messages.dump(),
            R"([{"role":"user","content":"Add.\n1 2"},{"role":"assistant","content":"3"}])");
  EXPECT_EQ(Parse(R"({"instruction": "Hi", "input": "", "output": "Ho", "system": "S",
                      "history": [["a", "b"]]})")
                .request.messages.dump(),
            R"([{"role":"system","content":"S"},{"role":"user","content":"a"},)"
            R"({"role":"assistant","content":"b"},{"role":"user","content":"Hi"},)"
            R"({"role":"assistant","content":"Ho"}])");
}

TEST(LineFormats, TextIsADocument) {
  const ExampleText example = Parse(R"({"text": "Once", "meta": {"source": "x"}})");
  EXPECT_EQ(example.kind, Kind::kDocument);
  EXPECT_EQ(example.completion, "Once");
}

TEST(LineFormats, PreferencesAreReadWhole) {
  const ExampleText strings = Parse(R"({"prompt": "p", "chosen": "c", "rejected": "r"})");
  EXPECT_EQ(strings.kind, Kind::kPreference);
  EXPECT_EQ(strings.prompt + strings.completion + strings.rejected, "pcr");
  const ExampleText messages = Parse(
      R"({"prompt": [{"role": "user", "content": "p"}],
          "chosen": [{"role": "assistant", "content": "c"}],
          "rejected": [{"role": "assistant", "content": "r"}]})");
  EXPECT_EQ(messages.kind, Kind::kPreference);
  EXPECT_EQ(messages.request.messages.size(), 2u);
  EXPECT_EQ(messages.rejected_messages[0]["content"], "r");
}

TEST(LineFormats, ContentLeavesTheSystemOut) {
  EXPECT_EQ(Parse(R"({"messages": [{"role": "system", "content": "S"},
                      {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})")
                .Content(),
            "\n\na\nb");
}

struct Broken {
  const char* line;
  const char* what;
};

TEST(LineFormats, WrongLinesAreToldWhere) {
  const Broken kBroken[] = {
      {R"({"conversations": [{"from": "alien", "value": "x"}]})",
       "conversations[0].from is \"alien\"; known speakers are"},
      {R"({"conversations": [{"from": "human"}]})", "conversations[0] has no \"value\""},
      {R"({"conversations": [{"from": "human", "value": 3}]})", "\"value\" is a number"},
      {R"({"conversations": ["x"]})", "conversations[0] is no object"},
      {R"({"conversations": "x"})", "has no list \"conversations\""},
      {R"({"conversations": [{"from": "function_call", "value": "f"}]})", "value is no JSON"},
      {R"({"conversations": [{"from": "function_call", "value": "{}"}]})", "without \"name\""},
      {R"({"conversations": [{"from": "gpt", "value": "x"}], "tools": "["})",
       "tools is a string that is no JSON"},
      {R"({"instruction": "a"})", "the line has no \"output\""},
      {R"({"instruction": "a", "output": ""})", "output is empty"},
      {R"({"instruction": "a", "output": "b", "history": [["x"]]})", "history[0] is no pair"},
      {R"({"instruction": ["a"], "output": "b"})", "\"instruction\" is a array"},
      {R"({"text": 5})", "has no \"text\""},
      {R"({"text": ""})", "text is empty"},
      {R"({"chosen": "a", "prompt": "p"})", "has no \"rejected\""},
      {R"({"chosen": "a", "rejected": "a", "prompt": "p"})", "are the same"},
      {R"({"chosen": "a", "rejected": "b"})", "has no \"prompt\""},
      {R"({"chosen": [], "rejected": [1], "prompt": []})", "chosen is empty"},
      {R"({"chosen": "a", "rejected": [], "prompt": "p"})", "must both be strings, or both"},
      {R"({"question": "a"})", "has neither \"messages\" nor"},
  };
  for (const Broken& broken : kBroken) {
    EXPECT_THAT(Error(broken.line), HasSubstr(broken.what)) << broken.line;
  }
  EXPECT_THAT(Error(R"({"messages": []})", LineFormat::kAlpaca), HasSubstr("\"instruction\""));
}

}  // namespace
}  // namespace attune
