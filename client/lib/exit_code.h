// Exit codes of `attune`, the same for every command; docs/cli.md lists them.
#pragma once

#include "absl/status/status.h"
#include "attune/v1/job.pb.h"

namespace attune {

enum class CliExit : int {
  kOk = 0,            // done; of a job that was followed: SUCCEEDED
  kInvalid = 1,       // wrong usage, or a spec or argument that is refused
  kUnreachable = 2,   // the coordinator cannot be reached
  kJobFailed = 3,     // the job that was followed FAILED
  kJobCancelled = 4,  // ... was CANCELLED
  kNotFound = 5,      // no such job, checkpoint, file or program
  kJobPaused = 6,     // the job that was followed is PAUSED
  kConflict = 7,      // refused in this state: already exists, already final, changed meanwhile
  kDenied = 8,        // wrong or missing token
  kError = 9,         // anything else: disk, internal
  kInterrupted = 130  // Ctrl-C
};

CliExit ExitOf(const absl::Status& status);

// Of a job that was followed to the end. kOk for one that is not at its end.
CliExit ExitOf(v1::JobState state);

}  // namespace attune
