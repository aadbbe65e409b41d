// Texts are held to jinja2 in tests/parity/text; here are errors, limits, and where templates lie.
#include "worker/data/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "worker/data/jinja/value.h"
#include "worker/io/file.h"

namespace attune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::string> Render(absl::string_view source, OrderedJson variables = {}) {
  absl::StatusOr<ChatTemplate> chat_template =
      ChatTemplate::FromSource(source, "t", {{"bos_token", "<s>"}});
  if (!chat_template.ok()) return chat_template.status();
  ChatRequest request;
  if (!variables.is_null()) request.variables = std::move(variables);
  absl::StatusOr<RenderedChat> chat = chat_template->Render(request);
  if (!chat.ok()) return chat.status();
  return chat->text;
}

std::string Error(absl::string_view source, absl::StatusCode code) {
  const absl::Status status = Render(source).status();
  EXPECT_EQ(status.code(), code) << source << ": " << status;
  return std::string(status.message());
}

TEST(ChatTemplateTest, RaisedExceptionsCarryTheirMessage) {
  EXPECT_EQ(Error("a\n{% if true %}{{ raise_exception('Roles must ' ~ 'alternate') }}{% endif %}",
                  absl::StatusCode::kInvalidArgument),
            "chat template 't', line 2: the template refuses: Roles must alternate");
}

TEST(ChatTemplateTest, ErrorsNameTheLine) {
  const auto code = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(Error("\n\n{{ x.y }}", code), HasSubstr("line 3: 'x' is undefined"));
  EXPECT_THAT(Error("{% for i in [1] %}\n{{ 1 + 'a' }}\n{% endfor %}", code),
              HasSubstr("line 2: '+' does not work between int and str"));
  EXPECT_THAT(Error("{% if x %}", code), HasSubstr("{% endif %} is missing"));
  EXPECT_THAT(Error("\n{{ 1 + }}", code),
              HasSubstr("line 2: expected an expression, but found }}"));
  EXPECT_THAT(Error("{{ 'abc }}", code), HasSubstr("line 1: a string has no end"));
  EXPECT_THAT(Error("{{ (1] }}", code), HasSubstr("unexpected ]"));
  EXPECT_THAT(Error("{# never ends", code), HasSubstr("has no #}"));
  EXPECT_THAT(Error("{% raw %} x", code), HasSubstr("has no {% endraw %}"));
  EXPECT_THAT(Error("{% frobnicate %}", code), HasSubstr("unknown tag {% frobnicate %}"));
  EXPECT_THAT(Error("{% break %}", code), HasSubstr("{% break %} outside of a loop"));
  EXPECT_THAT(Error("{% set a, b = [1] %}", code), HasSubstr("cannot unpack 1 values into 2"));
  EXPECT_THAT(Error("{% set x.y = 1 %}", code), HasSubstr("it is no namespace"));
  EXPECT_THAT(Error("{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}", code),
              HasSubstr("takes not more than 1"));
  EXPECT_THAT(Error("{{ 9223372036854775807 + 1 }}", code), HasSubstr("overflows"));
  EXPECT_THAT(Error("{{ 1 // 0 }}", code), HasSubstr("division by zero"));
  EXPECT_THAT(Error("{{ namespace() }}", code), HasSubstr("cannot be printed"));
  EXPECT_THAT(Error("\xff", code), HasSubstr("not UTF-8"));
}

TEST(ChatTemplateTest, WhatIsOutsideTheSubsetIsNamedAtLoad) {
  const auto code = absl::StatusCode::kUnimplemented;
  EXPECT_THAT(Error("\n{% include 'x' %}", code), HasSubstr("line 2: {% include %}"));
  EXPECT_THAT(Error("{% call f() %}{% endcall %}", code), HasSubstr("{% call %}"));
  EXPECT_THAT(Error("{{ 1 | filesizeformat }}", code), HasSubstr("no filter 'filesizeformat'"));
  EXPECT_THAT(Error("{{ 1 is escaped }}", code), HasSubstr("no test 'escaped'"));
  EXPECT_THAT(Error("{{ '%s' % 1 }}", code), HasSubstr("% formatting"));
  EXPECT_THAT(Error("{{ 'x'.zfill(3) }}", code), HasSubstr("has not this method"));
  EXPECT_THAT(
      Error("{% macro m() %}{% generation %}{% endgeneration %}{% endmacro %}{{ m() }}", code),
      HasSubstr("inside a macro"));
}

TEST(ChatTemplateTest, TheSandboxHolds) {
  EXPECT_EQ(*Render("{{ ''.__class__ is defined }}{{ messages.__init__ is defined }}"),
            "FalseFalse");
  EXPECT_THAT(Error("{{ messages.append(1) }}", absl::StatusCode::kInvalidArgument),
              HasSubstr("a template cannot change a list"));
  EXPECT_THAT(Error("{{ ''.__class__.__mro__ }}", absl::StatusCode::kInvalidArgument),
              HasSubstr("no attribute '__class__'"));
}

TEST(ChatTemplateTest, RunawaysEnd) {
  const auto code = absl::StatusCode::kResourceExhausted;
  Error("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", code);
  Error(
      "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
      "{% endfor %}{% endfor %}{% endfor %}",
      code);
  Error("{{ range(10000000) }}", code);
  Error("{{ 'x' * 1000000000000 }}", code);
  Error(
      "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}"
      "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
      code);
  Error(
      "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}"
      "{% endfor %}",
      code);
  Error(
      "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
      "{% endfor %}{{ ns.x == ns.x }}",
      code);
  Error(std::string("{{ ") + std::string(5000, '(') + std::string(5000, ')') + " }}", code);
  std::string chain = "{{ a";
  for (int i = 0; i < 5000; ++i) chain += ".a";
  Error(chain + " }}", code);
  std::string nested;
  for (int i = 0; i < 5000; ++i) nested += "{% if 1 %}";
  Error(nested, code);
}

TEST(ChatTemplateTest, NamespacesThatHoldThemselvesDie) {
  EXPECT_EQ(*Render("{% set ns = namespace() %}{% set ns.me = ns %}{% macro m() %}{{ ns.me is "
                    "defined }}{% endmacro %}{% set ns.m = m %}{{ ns.m() }}"),
            "True");
}

TEST(ChatTemplateTest, MacrosOutliveTheLoopTheyCameFrom) {
  EXPECT_EQ(*Render("{% set ns = namespace() %}{% for i in [1, 2] %}{% macro m() %}{{ i }}"
                    "{% endmacro %}{% if loop.first %}{% set ns.m = m %}{% endif %}{% endfor %}"
                    "{{ ns.m() }}"),
            "1");
}

TEST(ChatTemplateTest, VariablesAndClock) {
  EXPECT_EQ(*Render("{{ bos_token }}{{ x }}{{ tools is none }}", {{"x", 5}}), "<s>5True");
  EXPECT_EQ(*Render("{{ bos_token }}", {{"bos_token", "mine"}}), "mine");
  EXPECT_EQ(*Render("{{ strftime_now('%d %b %Y') }}"), "26 Jul 2024");
  absl::StatusOr<ChatTemplate> chat_template =
      ChatTemplate::FromSource("{{ strftime_now('%Y-%m-%d %H:%M:%S %j %a') }}", "t");
  chat_template->set_clock([] { return absl::CivilSecond(2025, 12, 31, 23, 59, 58); });
  EXPECT_EQ(chat_template->Render({})->text, "2025-12-31 23:59:58 365 Wed");
}

TEST(ChatTemplateTest, GenerationSpans) {
  absl::StatusOr<ChatTemplate> chat_template = ChatTemplate::FromSource(
      "é{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
      "t");
  EXPECT_TRUE(chat_template->HasGenerationTags(false));
  ChatRequest request;
  request.messages = OrderedJson::parse(R"([{"content": "ü"}, {"content": "xy"}])");
  absl::StatusOr<RenderedChat> chat = chat_template->Render(request);
  EXPECT_EQ(chat->text, "éü|xy|");
  EXPECT_THAT(chat->generation, ElementsAre(ByteSpan{2, 4}, ByteSpan{5, 7}));
}

TEST(FloatReprTest, IsPythons) {
  for (const auto& [value, text] :
       std::vector<std::pair<double, std::string>>{{1, "1.0"},
                                                   {0.1, "0.1"},
                                                   {-0.0, "-0.0"},
                                                   {1e16, "1e+16"},
                                                   {123456789012345680.0, "1.2345678901234568e+17"},
                                                   {9999999999999998, "9999999999999998.0"},
                                                   {1e-4, "0.0001"},
                                                   {1e-5, "1e-05"},
                                                   {1.5e300, "1.5e+300"},
                                                   {5e-324, "5e-324"},
                                                   {100, "100.0"}}) {
    EXPECT_EQ(jinja::FloatRepr(value), text);
  }
}

class DirectoryTest : public ::testing::Test {
 protected:
  void SetUp() override { directory_ = *CreateTempDirectory(::testing::TempDir(), "template_"); }
  void TearDown() override { EXPECT_TRUE(RemoveTree(directory_).ok()); }
  void Write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(WriteFileAtomic(directory_ + "/" + name, text).ok());
  }
  std::string RenderWithTools(bool tools) {
    absl::StatusOr<ChatTemplate> chat_template = ChatTemplate::Load(directory_);
    if (!chat_template.ok()) return chat_template.status().ToString();
    ChatRequest request;
    if (tools) request.tools = OrderedJson::array({OrderedJson::object()});
    absl::StatusOr<RenderedChat> chat = chat_template->Render(request);
    return chat.ok() ? chat->text : chat.status().ToString();
  }
  std::string directory_;
};

TEST_F(DirectoryTest, OneTemplateAndTokensOfBothKinds) {
  Write("tokenizer_config.json",
        R"({"chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}",
            "bos_token": {"__type": "AddedToken", "content": "<b>", "lstrip": false},
            "eos_token": "<e>", "pad_token": null, "add_bos_token": true})");
  EXPECT_EQ(RenderWithTools(false), "<b>|<e>|False");
  absl::StatusOr<TokenizerConfig> config = TokenizerConfig::Load(directory_);
  EXPECT_EQ(config->add_bos_token, true);
  EXPECT_EQ(config->add_eos_token, std::nullopt);
  Write("special_tokens_map.json", R"({"eos_token": "<other>", "pad_token": {"content": "<p>"}})");
  EXPECT_EQ(RenderWithTools(false), "<b>|<e>|True");
  Write("chat_template.jinja", "from the file\n");
  EXPECT_EQ(RenderWithTools(false), "from the file");
}

TEST_F(DirectoryTest, NamedTemplates) {
  Write("tokenizer_config.json",
        R"({"chat_template": [{"name": "default", "template": "plain"},
                              {"name": "tool_use", "template": "tools"}]})");
  EXPECT_EQ(RenderWithTools(false), "plain");
  EXPECT_EQ(RenderWithTools(true), "tools");
  ASSERT_EQ(mkdir((directory_ + "/additional_chat_templates").c_str(), 0700), 0);
  Write("additional_chat_templates/tool_use.jinja", "more tools");
  EXPECT_EQ(RenderWithTools(true), "more tools");
}

TEST_F(DirectoryTest, BrokenDirectoriesHaveTheirOwnMessage) {
  EXPECT_THAT(RenderWithTools(false), HasSubstr("has no chat template"));
  Write("tokenizer_config.json", R"({"chat_template": 5})");
  EXPECT_THAT(RenderWithTools(false), HasSubstr("chat_template is neither a string nor a list"));
  Write("tokenizer_config.json", R"({"chat_template": "x", "bos_token": 5})");
  EXPECT_THAT(RenderWithTools(false), HasSubstr("bos_token is a number (5)"));
  Write("tokenizer_config.json", R"({"chat_template": "{{ x")");
  EXPECT_THAT(RenderWithTools(false), HasSubstr("tokenizer_config.json:1:"));
  Write("tokenizer_config.json",
        R"({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]})");
  EXPECT_THAT(RenderWithTools(false), HasSubstr("none named 'default'"));
}

}  // namespace
}  // namespace attune
