// Bytes as a YAML job spec: no crash, and what is read survives being written and read again.
#include <google/protobuf/util/message_differencer.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "proto/job_spec.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  absl::StatusOr<attune::ParsedJobSpec> parsed = attune::ParseJobSpecYaml(text, "job.yaml");
  if (!parsed.ok()) return 0;
  attune::ApplyDefaults("job", &parsed->spec);
  const auto violations = attune::ValidateJobSpec(parsed->spec, {.on_coordinator = true});
  attune::ViolationsToStatus(violations, &*parsed).IgnoreError();
  if (!violations.empty()) return 0;
  const std::string yaml = attune::JobSpecToYaml(parsed->spec);
  const auto again = attune::ParseJobSpecYaml(yaml, "again.yaml");
  if (!again.ok() ||
      !google::protobuf::util::MessageDifferencer::Equals(parsed->spec, again->spec)) {
    std::fprintf(stderr, "not the same again:\n%s\n", yaml.c_str());
    abort();
  }
  return 0;
}
