// What `submit`, `watch` and `local` share.
#pragma once

#include <string>

#include "client/commands/command.h"
#include "client/lib/live.h"

namespace attune {

// Uploads the spec's `file` sources, which are relative to `directory`, and creates the job.
// Idempotent in request_id.
absl::StatusOr<v1::Job> SubmitJob(const Invocation& invocation, const std::string& directory,
                                  const std::string& request_id, bool validate_only,
                                  Connection* connection, Cancellation* cancellation,
                                  ParsedJobSpec* parsed);

// Follows the job, says how it ended, and returns the exit code for that.
CliExit FollowToExit(const Invocation& invocation, const Connection& connection,
                     const std::string& job_name, const LiveOptions& live,
                     Cancellation* cancellation);

}  // namespace attune
