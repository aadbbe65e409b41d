// The life of a job: the one table of legal transitions.
//
//   VALIDATING --> QUEUED --> STARTING --> RUNNING --> SUCCEEDED
//    |  |  ^       |  |  ^       |          |  |  |
//    |  |  |       |  |  |       v          v  |  |
//    |  |  |       |  |  +-- RECOVERING <------+  |        RECOVERING: old processes are removed,
//    |  |  |       |  |  |       |  |             |        then QUEUED again, FAILED, or PAUSED
//    |  |  |       |  |  |       |  +--> FAILED <-+-- VALIDATING, PAUSING
//    |  |  |       |  |  |       v                v
//    |  |  |       |  |  +-- PREEMPTING      PAUSING <-- STARTING, RECOVERING, PREEMPTING
//    |  |  |       |  |                           |
//    |  |  +-- PAUSED <---------------------------+        PAUSED goes to QUEUED, or to VALIDATING
//    |  +--------> ^                                       where it was not validated yet;
//    |             |  |                                    RECOVERING and VALIDATING lead to it
//    |             |  |                                    where storage failed again and again
//    v             v  v
//   CANCELLED <-- (PAUSED, QUEUED at once); every other state that holds devices goes
//                 through CANCELLING.
//
// An attempt whose final checkpoint is committed ends in SUCCEEDED from every state but
// CANCELLING. SUCCEEDED, FAILED and CANCELLED are final.
#pragma once

#include <string>

#include "attune/v1/job.pb.h"

namespace attune {

// The reason of a job that is PAUSED because there was no room for its files: made room for, it
// goes on from its last checkpoint.
constexpr char kPausedByStorage[] = "PAUSED_BY_STORAGE";

bool IsLegalTransition(v1::JobState from, v1::JobState to);

bool IsFinal(v1::JobState state);

// Processes of an attempt may be alive: the job has an epoch.
bool HoldsDevices(v1::JobState state);

// "RUNNING" for JOB_STATE_RUNNING.
std::string StateLabel(v1::JobState state);
// "TRAINER_CRASH" for FAILURE_CAUSE_TRAINER_CRASH.
std::string CauseLabel(v1::FailureCause cause);

}  // namespace attune
