// YAML <-> JobSpec by reflection over the proto: a field added there needs nothing here.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/descriptor.h"
#include "proto/job_spec.h"

namespace attune {
namespace {

using google::protobuf::EnumDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr size_t kMaxBytes = 1 << 20;
constexpr int kMaxDepth = 16;

// Fields that people look for, and what to do without them.
constexpr std::pair<absl::string_view, absl::string_view> kNotBuilt[] = {
    {"lora.init_lora_weights",
     "is not built: A is drawn and B is zero, as is PEFT's default. PiSSA, LoftQ and OLoRA change "
     "the weights of the base, which docs/decisions.md has more of; lora.init_from takes an "
     "adapter "
     "that was made elsewhere"},
};

// The common prefix of an enum's values with the last '_': "WEIGHT_FORMAT_".
std::string EnumPrefix(const EnumDescriptor& type) {
  const std::string& zero = type.FindValueByNumber(0)->name();
  return zero.substr(0, zero.size() - std::string("UNSPECIFIED").size());
}

// What a proto's string has to be. YAML passes on whatever bytes it finds.
bool IsUtf8(const std::string& text) {
  try {
    nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    return false;
  }
  return true;
}

class YamlReader {
 public:
  explicit YamlReader(ParsedJobSpec* out) : out_(out) {}

  absl::Status ReadMessage(const YAML::Node& node, const std::string& path, int depth,
                           Message* message) {
    if (depth > kMaxDepth) return Error(node, path, "is nested too deeply");
    if (node.IsNull()) return absl::OkStatus();
    if (!node.IsMap()) {
      return Error(node, path.empty() ? "job" : path,
                   "must be a mapping of fields, like `key: value`");
    }
    for (const auto& entry : node) {
      if (absl::Status s = ReadEntry(entry.first, entry.second, path, depth, message); !s.ok()) {
        return s;
      }
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Error(const YAML::Node& node, const std::string& path, absl::string_view what) {
    return absl::InvalidArgumentError(
        absl::StrCat(out_->file, ":", node.Mark().line + 1, ": ", path, ": ", what));
  }

  absl::Status ReadEntry(const YAML::Node& key, const YAML::Node& value, const std::string& path,
                         int depth, Message* message) {
    if (!key.IsScalar()) return Error(key, path, "has a key that is no word");
    const std::string name = key.Scalar();
    const std::string field_path = path.empty() ? name : absl::StrCat(path, ".", name);
    const auto* descriptor = message->GetDescriptor();
    const FieldDescriptor* field = descriptor->FindFieldByName(name);
    if (field == nullptr) {
      for (const auto& [not_built, why] : kNotBuilt) {
        if (field_path == not_built) return Error(key, field_path, why);
      }
      std::vector<std::string> known;
      for (int i = 0; i < descriptor->field_count(); ++i) {
        known.push_back(descriptor->field(i)->name());
      }
      return Error(key, field_path,
                   absl::StrCat("unknown field; known here: ", absl::StrJoin(known, ", ")));
    }
    if (!out_->lines.emplace(field_path, key.Mark().line + 1).second) {
      return Error(key, field_path, "is given twice");
    }
    if (const auto* oneof = field->real_containing_oneof()) {
      const auto* set = message->GetReflection()->GetOneofFieldDescriptor(*message, oneof);
      if (set != nullptr) {
        return Error(
            key, field_path,
            absl::StrCat("only one of these may be given, and `", set->name(), "` already is"));
      }
    }
    if (field->is_repeated()) return ReadList(value, *field, field_path, depth, message);
    return ReadValue(value, *field, field_path, depth, message);
  }

  absl::Status ReadList(const YAML::Node& node, const FieldDescriptor& field,
                        const std::string& path, int depth, Message* message) {
    if (!node.IsSequence()) return Error(node, path, "must be a list, like `- item`");
    int i = 0;
    for (const YAML::Node& item : node) {
      const std::string item_path = absl::StrCat(path, "[", i++, "]");
      out_->lines.emplace(item_path, item.Mark().line + 1);
      if (absl::Status s = ReadValue(item, field, item_path, depth, message); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  absl::Status ReadValue(const YAML::Node& node, const FieldDescriptor& field,
                         const std::string& path, int depth, Message* message) {
    const Reflection* r = message->GetReflection();
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      Message* child =
          field.is_repeated() ? r->AddMessage(message, &field) : r->MutableMessage(message, &field);
      return ReadMessage(node, path, depth + 1, child);
    }
    if (!node.IsScalar()) return Error(node, path, "must be a single value");
    return ReadScalar(node, field, path, message);
  }

  absl::Status ReadScalar(const YAML::Node& node, const FieldDescriptor& field,
                          const std::string& path, Message* message) {
    const Reflection* r = message->GetReflection();
    const std::string& text = node.Scalar();
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        if (!IsUtf8(text)) return Error(node, path, "is not UTF-8: save the file as UTF-8");
        field.is_repeated() ? r->AddString(message, &field, text)
                            : r->SetString(message, &field, text);
        return absl::OkStatus();
      case FieldDescriptor::CPPTYPE_BOOL:
        if (text != "true" && text != "false") return Error(node, path, "must be true or false");
        r->SetBool(message, &field, text == "true");
        return absl::OkStatus();
      case FieldDescriptor::CPPTYPE_DOUBLE: {
        double value;
        if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) {
          return Error(node, path, absl::StrCat("must be a number, not `", text, "`"));
        }
        r->SetDouble(message, &field, value);
        return absl::OkStatus();
      }
      case FieldDescriptor::CPPTYPE_ENUM:
        return ReadEnum(node, field, path, message);
      default:
        return ReadInteger(node, field, path, message);
    }
  }

  absl::Status ReadInteger(const YAML::Node& node, const FieldDescriptor& field,
                           const std::string& path, Message* message) {
    const Reflection* r = message->GetReflection();
    const std::string& text = node.Scalar();
    int32_t i32;
    int64_t i64;
    uint64_t u64;
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_INT32 && absl::SimpleAtoi(text, &i32)) {
      r->SetInt32(message, &field, i32);
    } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_INT64 && absl::SimpleAtoi(text, &i64)) {
      r->SetInt64(message, &field, i64);
    } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_UINT64 &&
               absl::SimpleAtoi(text, &u64)) {
      r->SetUInt64(message, &field, u64);
    } else {
      return Error(node, path, absl::StrCat("must be a whole number in range, not `", text, "`"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadEnum(const YAML::Node& node, const FieldDescriptor& field,
                        const std::string& path, Message* message) {
    const EnumDescriptor& type = *field.enum_type();
    const std::string& text = node.Scalar();
    std::vector<std::string> known;
    for (int i = 0; i < type.value_count(); ++i) {
      if (type.value(i)->number() == 0) continue;
      known.push_back(EnumLabel(type, type.value(i)->number()));
      if (text == known.back()) {
        message->GetReflection()->SetEnum(message, &field, type.value(i));
        return absl::OkStatus();
      }
    }
    return Error(node, path,
                 absl::StrCat("`", text, "` is not one of: ", absl::StrJoin(known, ", ")));
  }

  ParsedJobSpec* out_;
};

// Parser events, thrown away.
class NoEvents : public YAML::EventHandler {
 public:
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t,
                const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}
};

// Documents in the text, counted to two. YAML::LoadAll would go on for ever over a text that
// begins with a comma: the parser reports a document and does not advance.
int CountDocuments(const std::string& text) {
  std::istringstream in(text);
  YAML::Parser parser(in);
  NoEvents events;
  int count = 0;
  while (count < 2 && parser.HandleNextDocument(events)) ++count;
  return count;
}

void EmitMessage(const Message& message, YAML::Emitter* out);

void EmitScalar(const Message& message, const FieldDescriptor& field, int index,
                YAML::Emitter* out) {
  const Reflection* r = message.GetReflection();
  const bool repeated = index >= 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING: {
      std::string scratch;
      *out << YAML::DoubleQuoted
           << (repeated ? r->GetRepeatedStringReference(message, &field, index, &scratch)
                        : r->GetStringReference(message, &field, &scratch));
      return;
    }
    case FieldDescriptor::CPPTYPE_BOOL:
      *out << r->GetBool(message, &field);
      return;
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      const double value = r->GetDouble(message, &field);
      char text[32];
      std::snprintf(text, sizeof(text), "%.15g", value);
      if (std::strtod(text, nullptr) != value) std::snprintf(text, sizeof(text), "%.17g", value);
      *out << text;
      return;
    }
    case FieldDescriptor::CPPTYPE_ENUM:
      *out << EnumLabel(*field.enum_type(), r->GetEnumValue(message, &field));
      return;
    case FieldDescriptor::CPPTYPE_INT32:
      *out << r->GetInt32(message, &field);
      return;
    case FieldDescriptor::CPPTYPE_INT64:
      *out << r->GetInt64(message, &field);
      return;
    case FieldDescriptor::CPPTYPE_UINT64:
      *out << r->GetUInt64(message, &field);
      return;
    default:
      EmitMessage(
          repeated ? r->GetRepeatedMessage(message, &field, index) : r->GetMessage(message, &field),
          out);
  }
}

void EmitMessage(const Message& message, YAML::Emitter* out) {
  const Reflection* r = message.GetReflection();
  *out << YAML::BeginMap;
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor& field = *message.GetDescriptor()->field(i);
    if (field.is_repeated()) {
      const int size = r->FieldSize(message, &field);
      if (size == 0) continue;
      *out << YAML::Key << field.name() << YAML::Value << YAML::BeginSeq;
      for (int k = 0; k < size; ++k) EmitScalar(message, field, k, out);
      *out << YAML::EndSeq;
    } else if (r->HasField(message, &field)) {
      *out << YAML::Key << field.name() << YAML::Value;
      EmitScalar(message, field, -1, out);
    }
  }
  *out << YAML::EndMap;
}

}  // namespace

std::string EnumLabel(const EnumDescriptor& type, int value) {
  const auto* descriptor = type.FindValueByNumber(value);
  if (descriptor == nullptr) return absl::StrCat(value);
  const std::string& name = descriptor->name();
  const std::string prefix = EnumPrefix(type);
  return absl::AsciiStrToLower(absl::StartsWith(name, prefix) ? name.substr(prefix.size()) : name);
}

absl::StatusOr<ParsedJobSpec> ParseJobSpecYaml(absl::string_view text, absl::string_view file) {
  ParsedJobSpec out;
  out.file = std::string(file.data(), file.size());
  if (text.size() > kMaxBytes) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": larger than 1 MiB: not a job spec"));
  }
  // Aliases cannot blow up: reading follows the schema, which does not recurse.
  try {
    const std::string bytes(text.data(), text.size());
    const int documents = CountDocuments(bytes);
    const YAML::Node root = documents == 1 ? YAML::Load(bytes) : YAML::Node();
    if (documents != 1 || root.IsNull()) {
      return absl::InvalidArgumentError(
          absl::StrCat(file, ": expected one YAML document with a job spec, found ",
                       documents < 2 ? "none" : "several"));
    }
    if (absl::Status s = YamlReader(&out).ReadMessage(root, "", 0, &out.spec); !s.ok()) {
      return s;
    }
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(file, ":", e.mark.line + 1, ": ", e.msg));
  }
  return out;
}

std::string JobSpecToYaml(const v1::JobSpec& spec) {
  YAML::Emitter out;
  EmitMessage(spec, &out);
  return absl::StrCat(out.c_str(), "\n");
}

}  // namespace attune
