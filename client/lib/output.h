// What a command prints: a table for people, or the proto's JSON (field names as in the proto) as
// JSON or YAML for programs.
#pragma once

#include <google/protobuf/message.h>

#include <string>

#include "absl/status/statusor.h"

namespace attune {

enum class OutputFormat { kTable, kJson, kYaml };

std::string ToJson(const google::protobuf::Message& message);
// The same document in YAML's block style.
std::string ToYaml(const google::protobuf::Message& message);

// `message` in the format, or `table` for kTable.
std::string Render(OutputFormat format, const google::protobuf::Message& message,
                   const std::string& table);

}  // namespace attune
