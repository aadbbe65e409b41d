#include "worker/data/line_formats.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace attune {

absl::Status Wrong(absl::string_view place, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(place, " ", what));
}

namespace {

// A member that is a string; `required` decides about one that is missing or null.
absl::StatusOr<std::string> Text(const OrderedJson& object, const std::string& place,
                                 const char* key, bool required) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) {
    if (required) return Wrong(place, absl::StrCat("has no \"", key, "\""));
    return std::string();
  }
  if (!it->is_string()) {
    return Wrong(absl::StrCat(place, " \"", key, "\""),
                 absl::StrCat("is a ", it->type_name(), "; a string is needed"));
  }
  return it->get<std::string>();
}

OrderedJson Message(absl::string_view role, std::string content) {
  return {{"role", std::string(role)}, {"content", std::move(content)}};
}

struct Speaker {
  absl::string_view from;
  absl::string_view role;
};

constexpr Speaker kSpeakers[] = {
    {"human", "user"},         {"user", "user"},         {"gpt", "assistant"},
    {"assistant", "assistant"}, {"chatgpt", "assistant"}, {"bing", "assistant"},
    {"bard", "assistant"},     {"model", "assistant"},   {"system", "system"},
    {"tool", "tool"},          {"observation", "tool"},  {"function_response", "tool"},
    {"function_call", "assistant"},
};

// A call is written as JSON text: {"name", "arguments"}, or a list of them.
absl::StatusOr<OrderedJson> CallMessage(const std::string& place, const std::string& value) {
  absl::StatusOr<OrderedJson> json = ParseOrderedJson(value, "function_call");
  if (!json.ok()) return Wrong(place, "is a function_call whose value is no JSON");
  const OrderedJson calls = json->is_array() ? *json : OrderedJson::array({*json});
  OrderedJson message = {{"role", "assistant"}, {"tool_calls", OrderedJson::array()}};
  for (const OrderedJson& call : calls) {
    if (!call.is_object() || !call.contains("name")) {
      return Wrong(place, "is a function_call without \"name\"");
    }
    OrderedJson function = {{"name", call["name"]},
                            {"arguments", call.value("arguments", OrderedJson::object())}};
    message["tool_calls"].push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return message;
}

absl::StatusOr<OrderedJson> ShareGptMessage(const std::string& place, const OrderedJson& turn) {
  if (!turn.is_object()) return Wrong(place, "is no object");
  absl::StatusOr<std::string> from = Text(turn, place, "from", /*required=*/true);
  if (!from.ok()) return from.status();
  absl::StatusOr<std::string> value = Text(turn, place, "value", /*required=*/true);
  if (!value.ok()) return value.status();
  const auto speaker = std::find_if(std::begin(kSpeakers), std::end(kSpeakers),
                                    [&](const Speaker& known) { return known.from == *from; });
  if (speaker == std::end(kSpeakers)) {
    return Wrong(absl::StrCat(place, ".from"),
                 absl::StrCat("is \"", absl::Utf8SafeCEscape(*from),
                              "\"; known speakers are human, user, gpt, assistant, model, system, "
                              "tool, observation, function_call and function_response"));
  }
  if (*from == "function_call") return CallMessage(place, *value);
  OrderedJson message = Message(speaker->role, *std::move(value));
  if (turn.contains("weight")) message["weight"] = turn["weight"];
  return message;
}

}  // namespace

absl::StatusOr<OrderedJson> ChatFromShareGpt(const OrderedJson& line) {
  OrderedJson chat = {{"messages", OrderedJson::array()}};
  absl::StatusOr<std::string> system = Text(line, "the line", "system", /*required=*/false);
  if (!system.ok()) return system.status();
  if (!system->empty()) chat["messages"].push_back(Message("system", *std::move(system)));
  const auto turns = line.find("conversations");
  if (turns == line.end() || !turns->is_array()) {
    return Wrong("the line", "has no list \"conversations\"");
  }
  for (size_t i = 0; i < turns->size(); ++i) {
    absl::StatusOr<OrderedJson> message =
        ShareGptMessage(absl::StrCat("conversations[", i, "]"), (*turns)[i]);
    if (!message.ok()) return message.status();
    chat["messages"].push_back(*std::move(message));
  }
  const auto tools = line.find("tools");
  if (tools == line.end() || tools->is_null()) return chat;
  if (!tools->is_string()) {
    chat["tools"] = *tools;
  } else if (!tools->get_ref<const std::string&>().empty()) {  // often written as JSON text
    absl::StatusOr<OrderedJson> parsed =
        ParseOrderedJson(tools->get_ref<const std::string&>(), "tools");
    if (!parsed.ok()) return Wrong("tools", "is a string that is no JSON");
    chat["tools"] = *std::move(parsed);
  }
  return chat;
}

absl::StatusOr<OrderedJson> ChatFromAlpaca(const OrderedJson& line) {
  std::string texts[4];
  const std::pair<const char*, bool> keys[4] = {
      {"instruction", true}, {"input", false}, {"output", true}, {"system", false}};
  for (int i = 0; i < 4; ++i) {
    absl::StatusOr<std::string> text = Text(line, "the line", keys[i].first, keys[i].second);
    if (!text.ok()) return text.status();
    texts[i] = *std::move(text);
  }
  if (texts[2].empty()) return Wrong("output", "is empty: nothing to train");
  OrderedJson messages = OrderedJson::array();
  if (!texts[3].empty()) messages.push_back(Message("system", texts[3]));
  const auto history = line.find("history");
  if (history != line.end() && !history->is_null()) {
    if (!history->is_array()) return Wrong("history", "is no list of [asked, answered]");
    for (size_t i = 0; i < history->size(); ++i) {
      const OrderedJson& turn = (*history)[i];
      if (!turn.is_array() || turn.size() != 2 || !turn[0].is_string() || !turn[1].is_string()) {
        return Wrong(absl::StrCat("history[", i, "]"), "is no pair [asked, answered]");
      }
      messages.push_back(Message("user", turn[0].get<std::string>()));
      messages.push_back(Message("assistant", turn[1].get<std::string>()));
    }
  }
  const bool both = !texts[0].empty() && !texts[1].empty();
  messages.push_back(Message("user", absl::StrCat(texts[0], both ? "\n" : "", texts[1])));
  messages.push_back(Message("assistant", texts[2]));
  return OrderedJson{{"messages", std::move(messages)}};
}

}  // namespace attune
