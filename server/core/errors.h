// Statuses with the details of AIP-193 attached as payloads; rpc carries them to the client
// unchanged.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/job_spec.h"

namespace attune {

// `reason` is UPPER_SNAKE_CASE and never changes; the message says what, where and what to do.
absl::Status ErrorWithReason(absl::StatusCode code, const std::string& reason,
                             const std::string& message,
                             const std::map<std::string, std::string>& metadata = {});

// INVALID_ARGUMENT with BadRequest; field paths get `prefix` in front ("spec.").
absl::Status InvalidFields(const std::vector<FieldViolation>& violations,
                           const std::string& prefix);

// The reason that ErrorWithReason attached, or "".
std::string ReasonOf(const absl::Status& status);

}  // namespace attune
