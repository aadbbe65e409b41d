#include "client/lib/output.h"

#include <google/protobuf/util/json_util.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

using Json = nlohmann::ordered_json;

void EmitYaml(const Json& value, int indent, std::string* out);

// A JSON string is a YAML double-quoted string: no ambiguity about numbers, dates or booleans.
std::string Scalar(const Json& value) {
  if (value.is_object()) return "{}";
  if (value.is_array()) return "[]";
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// After "key:" or "-": on the same line what fits there, else below.
void EmitChild(const Json& value, int indent, std::string* out) {
  if (value.is_structured() && !value.empty()) {
    absl::StrAppend(out, "\n");
    EmitYaml(value, indent, out);
  } else {
    absl::StrAppend(out, " ", Scalar(value), "\n");
  }
}

void EmitYaml(const Json& value, int indent, std::string* out) {
  const std::string margin(indent, ' ');
  if (value.is_object() && !value.empty()) {
    for (const auto& [key, child] : value.items()) {
      absl::StrAppend(out, margin, key, ":");
      EmitChild(child, indent + 2, out);
    }
  } else if (value.is_array() && !value.empty()) {
    for (const Json& child : value) {
      if (child.is_object() && !child.empty()) {
        // The first key stands beside the dash.
        std::string nested;
        EmitYaml(child, indent + 2, &nested);
        absl::StrAppend(out, margin, "- ", nested.substr(indent + 2));
      } else {
        absl::StrAppend(out, margin, "-");
        EmitChild(child, indent + 2, out);
      }
    }
  } else {
    absl::StrAppend(out, margin, Scalar(value), "\n");
  }
}

}  // namespace

std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  // Only a message that was built wrongly has no JSON.
  return status.ok() ? json : absl::StrCat("{\"error\": \"", status.ToString(), "\"}\n");
}

std::string ToYaml(const google::protobuf::Message& message) {
  const Json json = Json::parse(ToJson(message), nullptr, /*allow_exceptions=*/false);
  std::string out;
  EmitYaml(json, 0, &out);
  return out;
}

std::string Render(OutputFormat format, const google::protobuf::Message& message,
                   const std::string& table) {
  switch (format) {
    case OutputFormat::kJson:
      return ToJson(message);
    case OutputFormat::kYaml:
      return ToYaml(message);
    case OutputFormat::kTable:
      break;
  }
  return table;
}

}  // namespace attune
