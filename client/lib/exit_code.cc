#include "client/lib/exit_code.h"

namespace attune {

CliExit ExitOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return CliExit::kOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnimplemented:
      return CliExit::kInvalid;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return CliExit::kUnreachable;
    case absl::StatusCode::kNotFound:
      return CliExit::kNotFound;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kAborted:
      return CliExit::kConflict;
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return CliExit::kDenied;
    case absl::StatusCode::kCancelled:
      return CliExit::kInterrupted;
    default:
      return CliExit::kError;
  }
}

CliExit ExitOf(v1::JobState state) {
  switch (state) {
    case v1::JOB_STATE_FAILED:
      return CliExit::kJobFailed;
    case v1::JOB_STATE_CANCELLED:
      return CliExit::kJobCancelled;
    case v1::JOB_STATE_PAUSED:
      return CliExit::kJobPaused;
    default:
      return CliExit::kOk;
  }
}

}  // namespace attune
