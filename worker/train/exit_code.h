// Exit codes of attune-trainer. The agent reports the typed cause; docs/trainer.md lists them.
#pragma once

#include "attune/v1/job.pb.h"

namespace attune {

enum class ExitCode : int {
  kOk = 0,            // trained to the end, stopped as asked, or the command succeeded
  kUsage = 2,         // command line
  kInvalid = 10,      // spec, model or data
  kOutOfMemory = 11,  // the plan does not fit
  kDiverged = 12,     // loss or gradient is not finite
  kPeerLost = 13,     // a collective failed
  kStorage = 14,      // a checkpoint could not be written
  kAgentLost = 15,    // the agent is gone
  kInternal = 16,     // a bug
  kCuda = 17,         // a CUDA call failed (kernels/core/cuda_error.h)
  kNoDevice = 18,     // the device, or a library that it needs, is not there
};

inline ExitCode ExitCodeOf(v1::FailureCause cause) {
  switch (cause) {
    case v1::FAILURE_CAUSE_INVALID:
      return ExitCode::kInvalid;
    case v1::FAILURE_CAUSE_OUT_OF_MEMORY:
      return ExitCode::kOutOfMemory;
    case v1::FAILURE_CAUSE_DIVERGED:
      return ExitCode::kDiverged;
    case v1::FAILURE_CAUSE_PEER_LOST:
      return ExitCode::kPeerLost;
    case v1::FAILURE_CAUSE_STORAGE:
      return ExitCode::kStorage;
    case v1::FAILURE_CAUSE_WORKER_LOST:
      return ExitCode::kAgentLost;
    case v1::FAILURE_CAUSE_DEVICE:
      return ExitCode::kNoDevice;
    default:
      return ExitCode::kInternal;
  }
}

}  // namespace attune
