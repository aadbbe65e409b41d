#include "worker/data/chat_example.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "worker/data/line_formats.h"

namespace attune {
namespace {

constexpr absl::string_view kRoles[] = {"system",    "developer", "user",
                                        "assistant", "tool",      "function"};

const OrderedJson* FindKey(const OrderedJson& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

// A list of text parts becomes their text: templates of text models print a list as Python would.
absl::Status FlattenContent(const std::string& place, OrderedJson* content) {
  if (content->is_string()) return absl::OkStatus();
  if (!content->is_array()) {
    return Wrong(place, absl::StrCat("is a ", content->type_name(),
                                     "; a string or a list of text parts is needed"));
  }
  std::string text;
  for (size_t i = 0; i < content->size(); ++i) {
    const OrderedJson& part = (*content)[i];
    const std::string part_place = absl::StrCat(place, "[", i, "]");
    const OrderedJson* type = part.is_object() ? FindKey(part, "type") : nullptr;
    if (type == nullptr || !type->is_string()) {
      return Wrong(part_place, "is no part: {\"type\": \"text\", \"text\": ...} is needed");
    }
    if (*type != "text") {
      return Wrong(part_place,
                   absl::StrCat("has type \"", absl::Utf8SafeCEscape(type->get<std::string>()),
                                "\"; attune trains on text only"));
    }
    const OrderedJson* part_text = FindKey(part, "text");
    if (part_text == nullptr || !part_text->is_string()) {
      return Wrong(part_place, "has no \"text\"");
    }
    text += part_text->get_ref<const std::string&>();
  }
  *content = std::move(text);
  return absl::OkStatus();
}

// Checks the calls, and reads arguments that are JSON text into `parsed`.
absl::Status CheckToolCalls(const std::string& place, const OrderedJson& calls,
                            OrderedJson* parsed) {
  if (!calls.is_array()) return Wrong(place, "is no list");
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::string call_place = absl::StrCat(place, "[", i, "]");
    const OrderedJson* function = calls[i].is_object() ? FindKey(calls[i], "function") : nullptr;
    const OrderedJson* name =
        function != nullptr && function->is_object() ? FindKey(*function, "name") : nullptr;
    if (name == nullptr || !name->is_string()) {
      return Wrong(call_place, "has no function.name");
    }
    const OrderedJson* arguments = FindKey(*function, "arguments");
    if (arguments == nullptr || !arguments->is_string()) continue;
    absl::StatusOr<OrderedJson> object =
        ParseOrderedJson(arguments->get_ref<const std::string&>(), "arguments");
    if (object.ok() && object->is_object()) {
      (*parsed)[i]["function"]["arguments"] = *std::move(object);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> TakeWeight(const std::string& place, OrderedJson* message) {
  const auto it = message->find("weight");
  if (it == message->end()) return true;
  if (!it->is_number() || (*it != 0 && *it != 1)) {
    return Wrong(absl::StrCat(place, ".weight"), "must be 0 or 1");
  }
  const bool trained = *it == 1;
  message->erase("weight");
  return trained;
}

absl::Status AddMessage(const std::string& place, const OrderedJson& source, bool trained,
                        ExampleText* example) {
  if (!source.is_object()) return Wrong(place, "is no object");
  OrderedJson message = source;
  const OrderedJson* role_value = FindKey(message, "role");
  if (role_value == nullptr || !role_value->is_string()) return Wrong(place, "has no \"role\"");
  const std::string role = role_value->get<std::string>();
  if (std::find(std::begin(kRoles), std::end(kRoles), role) == std::end(kRoles)) {
    return Wrong(absl::StrCat(place, ".role"),
                 absl::StrCat("is \"", absl::Utf8SafeCEscape(role),
                              "\"; known roles are system, developer, user, assistant, tool and "
                              "function"));
  }
  const bool has_calls = role == "assistant" && FindKey(message, "tool_calls") != nullptr;
  if (FindKey(message, "content") != nullptr) {
    absl::Status status = FlattenContent(place + ".content", &message["content"]);
    if (!status.ok()) return status;
  } else if (!has_calls) {
    return Wrong(place, "has no \"content\"");
  }
  absl::StatusOr<bool> weight = TakeWeight(place, &message);
  if (!weight.ok()) return weight.status();
  if (role == "assistant") {
    example->assistant_turns.push_back(static_cast<int64_t>(example->request.messages.size()));
    example->trained_turns.push_back(trained && *weight);
  }
  example->verbatim_request.messages.push_back(message);
  if (has_calls) {
    const OrderedJson calls = message["tool_calls"];
    absl::Status status = CheckToolCalls(place + ".tool_calls", calls, &message["tool_calls"]);
    if (!status.ok()) return status;
  }
  example->request.messages.push_back(std::move(message));
  return absl::OkStatus();
}

absl::Status AddMessages(const std::string& place, const OrderedJson& list, bool trained,
                         ExampleText* example) {
  if (!list.is_array()) return Wrong(place, "is no list of messages");
  for (size_t i = 0; i < list.size(); ++i) {
    absl::Status status = AddMessage(absl::StrCat(place, "[", i, "]"), list[i], trained, example);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status AddTools(const OrderedJson& line, ExampleText* example) {
  const OrderedJson* tools = FindKey(line, "tools");
  if (tools == nullptr) return absl::OkStatus();
  if (!tools->is_array()) return Wrong("tools", "is no list");
  for (size_t i = 0; i < tools->size(); ++i) {
    if (!(*tools)[i].is_object()) return Wrong(absl::StrCat("tools[", i, "]"), "is no object");
  }
  if (tools->empty()) return absl::OkStatus();  // as if there were none
  example->request.tools = *tools;
  example->verbatim_request.tools = *tools;
  return absl::OkStatus();
}

absl::Status ParseChat(const OrderedJson& line, ExampleText* example) {
  example->kind = ExampleText::Kind::kChat;
  const OrderedJson* messages = FindKey(line, "messages");
  if (messages == nullptr) return Wrong("the line", "has no \"messages\"");
  if (messages->is_array() && messages->empty()) return Wrong("messages", "is empty");
  absl::Status status = AddMessages("messages", *messages, /*trained=*/true, example);
  status.Update(AddTools(line, example));
  return status;
}

absl::Status ParsePromptCompletion(const OrderedJson& line, ExampleText* example) {
  const OrderedJson* prompt = FindKey(line, "prompt");
  const OrderedJson* completion = FindKey(line, "completion");
  if (prompt == nullptr) return Wrong("the line", "has no \"prompt\"");
  if (completion == nullptr) return Wrong("the line", "has no \"completion\"");
  if (prompt->is_string() && completion->is_string()) {
    example->prompt = prompt->get<std::string>();
    example->completion = completion->get<std::string>();
    if (example->completion.empty()) return Wrong("completion", "is empty: nothing to train");
    return absl::OkStatus();
  }
  if (!prompt->is_array() || !completion->is_array()) {
    return Wrong("prompt and completion", "must both be strings, or both be lists of messages");
  }
  example->kind = ExampleText::Kind::kChat;
  absl::Status status = AddMessages("prompt", *prompt, /*trained=*/false, example);
  status.Update(AddMessages("completion", *completion, /*trained=*/true, example));
  status.Update(AddTools(line, example));
  if (status.ok() && completion->empty()) return Wrong("completion", "is empty: nothing to train");
  return status;
}

absl::Status ParseText(const OrderedJson& line, ExampleText* example) {
  const OrderedJson* text = FindKey(line, "text");
  if (text == nullptr || !text->is_string()) return Wrong("the line", "has no \"text\"");
  example->kind = ExampleText::Kind::kDocument;
  example->completion = text->get<std::string>();
  if (example->completion.empty()) return Wrong("text", "is empty: nothing to train");
  return absl::OkStatus();
}

absl::Status ParsePreference(const OrderedJson& line, ExampleText* example) {
  const OrderedJson* prompt = FindKey(line, "prompt");
  const OrderedJson* chosen = FindKey(line, "chosen");
  const OrderedJson* rejected = FindKey(line, "rejected");
  if (chosen == nullptr) return Wrong("the line", "has no \"chosen\"");
  if (rejected == nullptr) return Wrong("the line", "has no \"rejected\"");
  if (*chosen == *rejected)
    return Wrong("chosen and rejected", "are the same: nothing is preferred");
  example->kind = ExampleText::Kind::kPreference;
  if (chosen->is_string() && rejected->is_string()) {
    if (prompt == nullptr || !prompt->is_string()) {
      return Wrong("the line", "has no \"prompt\", which answers that are strings need");
    }
    example->prompt = prompt->get<std::string>();
    example->completion = chosen->get<std::string>();
    example->rejected = rejected->get<std::string>();
    return absl::OkStatus();
  }
  if (!chosen->is_array() || !rejected->is_array()) {
    return Wrong("chosen and rejected", "must both be strings, or both be lists of messages");
  }
  if (chosen->empty()) return Wrong("chosen", "is empty");
  if (rejected->empty()) return Wrong("rejected", "is empty");
  ExampleText other;
  absl::Status status;
  if (prompt != nullptr) status = AddMessages("prompt", *prompt, /*trained=*/false, example);
  status.Update(AddMessages("chosen", *chosen, /*trained=*/true, example));
  status.Update(AddMessages("rejected", *rejected, /*trained=*/true, &other));
  status.Update(AddTools(line, example));
  example->rejected_messages = std::move(other.request.messages);
  return status;
}

// The format that the keys of a line speak of.
absl::StatusOr<LineFormat> FormatOf(const OrderedJson& line) {
  const auto has = [&](const char* key) { return FindKey(line, key) != nullptr; };
  if (has("chosen") || has("rejected")) return LineFormat::kPreference;
  if (has("messages")) {
    if (has("prompt") || has("completion")) {
      return Wrong("the line",
                   "has both \"messages\" and \"prompt\" or \"completion\"; set the format");
    }
    return LineFormat::kChat;
  }
  if (has("prompt") || has("completion")) return LineFormat::kPromptCompletion;
  if (has("conversations")) return LineFormat::kShareGpt;
  if (has("instruction")) return LineFormat::kAlpaca;
  if (has("text")) return LineFormat::kText;
  return Wrong("the line",
               "has neither \"messages\" nor \"prompt\" and \"completion\", nor "
               "\"conversations\", \"instruction\", \"text\" or \"chosen\" and \"rejected\"");
}

absl::Status ParseAs(LineFormat format, const OrderedJson& line, ExampleText* example) {
  switch (format) {
    case LineFormat::kPromptCompletion:
      return ParsePromptCompletion(line, example);
    case LineFormat::kText:
      return ParseText(line, example);
    case LineFormat::kPreference:
      return ParsePreference(line, example);
    case LineFormat::kShareGpt:
    case LineFormat::kAlpaca: {
      absl::StatusOr<OrderedJson> chat =
          format == LineFormat::kAlpaca ? ChatFromAlpaca(line) : ChatFromShareGpt(line);
      return chat.ok() ? ParseChat(*chat, example) : chat.status();
    }
    default:
      return ParseChat(line, example);
  }
}

}  // namespace

std::string ExampleText::Content() const {
  std::string content = absl::StrCat(prompt, "\n", completion);
  for (const OrderedJson& message : request.messages) {
    const auto role = message.find("role");
    const auto text = message.find("content");
    if (*role == "system" || *role == "developer") continue;
    if (text != message.end() && text->is_string()) {
      absl::StrAppend(&content, "\n", text->get_ref<const std::string&>());
    }
    const auto calls = message.find("tool_calls");
    if (calls != message.end()) absl::StrAppend(&content, "\n", calls->dump());
  }
  return content;
}

absl::StatusOr<ExampleText> ParseExample(absl::string_view line, LineFormat format) {
  absl::StatusOr<OrderedJson> json =
      ParseOrderedJson(line, "", {.duplicate_keys = DuplicateKeys::kReject, .max_depth = 64});
  if (!json.ok()) {
    // ":1:17: not valid JSON ...": the line's number is the caller's to say.
    absl::string_view message = json.status().message();
    if (absl::ConsumePrefix(&message, ":1: ")) return absl::InvalidArgumentError(message);
    absl::ConsumePrefix(&message, ":1:");
    return absl::InvalidArgumentError(absl::StrCat("column ", message));
  }
  if (!json->is_object()) return Wrong("the line", "is no JSON object");
  if (format == LineFormat::kAuto) {
    absl::StatusOr<LineFormat> found = FormatOf(*json);
    if (!found.ok()) return found.status();
    format = *found;
  }
  ExampleText example;
  if (absl::Status s = ParseAs(format, *json, &example); !s.ok()) return s;
  return example;
}

}  // namespace attune
