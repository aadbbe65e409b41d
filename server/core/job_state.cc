#include "server/core/job_state.h"

#include <cstring>

namespace attune {
namespace {

constexpr unsigned Bit(v1::JobState state) {
  return 1u << state;
}

unsigned Successors(v1::JobState from) {
  using namespace v1;  // NOLINT: the table is unreadable otherwise
  switch (from) {
    case JOB_STATE_VALIDATING:
      return Bit(JOB_STATE_QUEUED) | Bit(JOB_STATE_PAUSED) | Bit(JOB_STATE_FAILED) |
             Bit(JOB_STATE_CANCELLED);
    case JOB_STATE_QUEUED:
      return Bit(JOB_STATE_STARTING) | Bit(JOB_STATE_PAUSED) | Bit(JOB_STATE_CANCELLED);
    case JOB_STATE_STARTING:
      return Bit(JOB_STATE_RUNNING) | Bit(JOB_STATE_PAUSING) | Bit(JOB_STATE_RECOVERING) |
             Bit(JOB_STATE_CANCELLING);
    case JOB_STATE_RUNNING:
      return Bit(JOB_STATE_PAUSING) | Bit(JOB_STATE_PREEMPTING) | Bit(JOB_STATE_RECOVERING) |
             Bit(JOB_STATE_CANCELLING) | Bit(JOB_STATE_SUCCEEDED);
    case JOB_STATE_PAUSING:
      return Bit(JOB_STATE_PAUSED) | Bit(JOB_STATE_CANCELLING) | Bit(JOB_STATE_FAILED) |
             Bit(JOB_STATE_SUCCEEDED);
    case JOB_STATE_PAUSED:
      return Bit(JOB_STATE_QUEUED) | Bit(JOB_STATE_VALIDATING) | Bit(JOB_STATE_CANCELLED);
    case JOB_STATE_PREEMPTING:
      return Bit(JOB_STATE_QUEUED) | Bit(JOB_STATE_PAUSING) | Bit(JOB_STATE_RECOVERING) |
             Bit(JOB_STATE_CANCELLING) | Bit(JOB_STATE_SUCCEEDED);
    case JOB_STATE_RECOVERING:
      return Bit(JOB_STATE_QUEUED) | Bit(JOB_STATE_PAUSING) | Bit(JOB_STATE_PAUSED) |
             Bit(JOB_STATE_CANCELLING) | Bit(JOB_STATE_FAILED) | Bit(JOB_STATE_SUCCEEDED);
    case JOB_STATE_CANCELLING:
      return Bit(JOB_STATE_CANCELLED);
    default:
      return 0;
  }
}

}  // namespace

bool IsLegalTransition(v1::JobState from, v1::JobState to) {
  return v1::JobState_IsValid(to) && (Successors(from) & Bit(to)) != 0;
}

bool IsFinal(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED ||
         state == v1::JOB_STATE_CANCELLED;
}

bool HoldsDevices(v1::JobState state) {
  return state == v1::JOB_STATE_STARTING || state == v1::JOB_STATE_RUNNING ||
         state == v1::JOB_STATE_PAUSING || state == v1::JOB_STATE_PREEMPTING ||
         state == v1::JOB_STATE_RECOVERING || state == v1::JOB_STATE_CANCELLING;
}

std::string StateLabel(v1::JobState state) {
  const std::string name = v1::JobState_Name(state);
  return name.empty() ? "UNKNOWN" : name.substr(std::strlen("JOB_STATE_"));
}

std::string CauseLabel(v1::FailureCause cause) {
  const std::string name = v1::FailureCause_Name(cause);
  return name.empty() ? "UNKNOWN" : name.substr(std::strlen("FAILURE_CAUSE_"));
}

}  // namespace attune
