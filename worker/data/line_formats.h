// Lines of other formats, written as lines of conversations: {"messages": [...], "tools": [...]}.
#pragma once

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/io/json.h"

namespace attune {

// INVALID_ARGUMENT: "<place> <what>", of a part of a line.
absl::Status Wrong(absl::string_view place, absl::string_view what);

// {"conversations": [{"from": "human", "value": "..."}, ...], "system": "...", "tools": ...}.
// INVALID_ARGUMENT says where: an unknown speaker, a missing value.
absl::StatusOr<OrderedJson> ChatFromShareGpt(const OrderedJson& line);

// {"instruction", "input", "output", "system", "history"}: instruction and input, on a line of its
// own, are what the user says; the output is the answer.
absl::StatusOr<OrderedJson> ChatFromAlpaca(const OrderedJson& line);

}  // namespace attune
