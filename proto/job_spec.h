// Job specs: reading YAML, defaults, validation. The one place for all three, used by the CLI,
// the coordinator and the trainer.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "attune/v1/job_spec.pb.h"

namespace attune {

// Something wrong with one field.
struct FieldViolation {
  std::string field;        // path in the spec: "optimizer.learning_rate", "datasets[0].source"
  std::string description;  // what is wrong, and what would be right
};

// A spec as written, with the line of every key, so that later errors can point at it.
struct ParsedJobSpec {
  v1::JobSpec spec;
  std::string file;                  // as given to ParseJobSpecYaml
  std::map<std::string, int> lines;  // field path -> line, from 1
};

// Reads one YAML document. Keys are the proto's field names, enum values their names in lower
// case without prefix. INVALID_ARGUMENT "file:line: field: what" for bad YAML, unknown or
// repeated fields, wrong types, a second member of a oneof. At most 1 MiB.
absl::StatusOr<ParsedJobSpec> ParseJobSpecYaml(absl::string_view text, absl::string_view file);

// The YAML that ParseJobSpecYaml reads back to the same spec.
std::string JobSpecToYaml(const v1::JobSpec& spec);

// Fills in every unset field with the default that job_spec.proto documents. `name` becomes
// `default_name` (lower-cased, other characters made '-') if it is empty. Idempotent.
void ApplyDefaults(absl::string_view default_name, v1::JobSpec* spec);

// Checks a spec with its defaults filled in. Empty if it is right. `on_coordinator`: `file`
// sources are refused, because only the client can read them.
struct ValidateOptions {
  bool on_coordinator = false;
};
std::vector<FieldViolation> ValidateJobSpec(const v1::JobSpec& spec,
                                            const ValidateOptions& options);

// One INVALID_ARGUMENT over all violations, a line each: "file:line: field: what" where the line
// is known, else "field: what". Ok if there is none.
absl::Status ViolationsToStatus(const std::vector<FieldViolation>& violations,
                                const ParsedJobSpec* parsed);

// "nf4" for WEIGHT_FORMAT_NF4: the name that YAML and people use.
std::string EnumLabel(const google::protobuf::EnumDescriptor& type, int value);

}  // namespace attune
