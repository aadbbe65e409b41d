#include "worker/io/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string ErrorOf(absl::string_view text, const JsonOptions& options = {}) {
  const absl::StatusOr<Json> json = ParseJson(text, "f.json", options);
  EXPECT_FALSE(json.ok());
  EXPECT_EQ(json.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(json.status().message());
}

TEST(JsonTest, ParsesWhatTheLibraryParses) {
  const std::string text =
      R"({"b": [1, -2, 3.5, true, false, null, "x\u00e9\ud83d\ude80"], "a": {}, "c": [[], {}], "": 0})";
  absl::StatusOr<Json> json = ParseJson(text, "f.json");
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(*json, Json::parse(text));
  absl::StatusOr<OrderedJson> ordered = ParseOrderedJson(text, "f.json");
  ASSERT_TRUE(ordered.ok());
  EXPECT_EQ(ordered->dump(), OrderedJson::parse(text).dump());
}

TEST(JsonTest, ErrorsHaveLineAndColumn) {
  EXPECT_THAT(ErrorOf("{\"a\": [1, }"), StartsWith("f.json:1:11: not valid JSON"));
  EXPECT_THAT(ErrorOf("{\n  \"a\": 1\n  \"b\": 2}"), StartsWith("f.json:3:"));
  EXPECT_THAT(ErrorOf("{\"a\": 1", {.first_line = 7}), StartsWith("f.json:7:"));
  EXPECT_THAT(ErrorOf(""), StartsWith("f.json:1:"));
  EXPECT_THAT(ErrorOf("{} x"), HasSubstr("f.json:1:4"));
  EXPECT_THAT(ErrorOf("\"\xff\""), HasSubstr("UTF-8"));
  EXPECT_THAT(ErrorOf("\"\\ud800\""), HasSubstr("surrogate"));
}

TEST(JsonTest, BoundsDepth) {
  const std::string deep = std::string(129, '[') + std::string(129, ']');
  EXPECT_THAT(ErrorOf(deep), HasSubstr("nested more than 128 deep"));
  EXPECT_TRUE(ParseJson(absl::string_view(deep).substr(1, 256), "f").ok());
}

TEST(JsonTest, DuplicateKeys) {
  const absl::string_view text = R"({"a": 1, "b": 2, "a": [3]})";
  EXPECT_EQ(ParseJson(text, "f")->dump(), R"({"a":[3],"b":2})");
  EXPECT_EQ(ParseOrderedJson(text, "f")->dump(), R"({"a":[3],"b":2})");
  const JsonOptions reject{.duplicate_keys = DuplicateKeys::kReject};
  EXPECT_THAT(ErrorOf(text, reject), HasSubstr("the key \"a\" is there twice"));
  EXPECT_FALSE(ParseOrderedJson(text, "f", reject).ok());
}

TEST(JsonTest, ManyKeysInOneOrderedObjectStayLinear) {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) absl::StrAppend(&text, i > 0 ? "," : "", "\"k", i, "\":0");
  text += "}";
  absl::StatusOr<OrderedJson> json = ParseOrderedJson(text, "f");
  ASSERT_TRUE(json.ok());
  EXPECT_EQ(json->size(), 200000u);
}

TEST(JsonFieldTest, GettersAndTheirErrors) {
  const Json json = Json::parse(
      R"({"rope": {"factor": "x", "n": 8, "half": 0.5, "whole": 2.0, "list": [1, "2"],
          "none": null, "yes": true, "big": 18446744073709551615}})");
  const JsonField root(json, "config.json");
  const JsonField rope = root.Get("rope");
  EXPECT_EQ(*rope.Get("n").Int(), 8);
  EXPECT_EQ(*rope.Get("whole").Int(), 2);
  EXPECT_EQ(*rope.Get("half").Double(), 0.5);
  EXPECT_EQ(*rope.Get("factor").String(), "x");
  EXPECT_TRUE(*rope.Get("yes").Bool());
  EXPECT_EQ(*rope.Get("none").IntOr(5), 5);
  EXPECT_EQ(*rope.Get("missing").StringOr("d"), "d");
  EXPECT_FALSE(rope.Get("none").has_value());
  EXPECT_FALSE(rope.Get("n").Get("deeper").has_value());
  EXPECT_EQ(rope.Get("factor").Double().status().message(),
            "config.json: rope.factor is a string (\"x\"), but a number is needed");
  EXPECT_EQ(rope.Get("missing").Int().status().message(),
            "config.json: rope.missing is missing: an integer is needed");
  EXPECT_FALSE(rope.Get("half").Int().ok());
  EXPECT_FALSE(rope.Get("big").Int().ok());
  EXPECT_FALSE(rope.Get("factor").DoubleOr(1).ok());
  EXPECT_THAT(std::string(rope.Get("list").IntArray().status().message()),
              HasSubstr("rope.list[1] is a string"));
  EXPECT_EQ(root.Array().status().message(),
            "config.json: the whole value is an object, but an array is needed");
}

}  // namespace
}  // namespace attune
