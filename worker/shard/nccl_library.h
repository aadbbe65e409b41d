// NCCL, found at run time as all CUDA libraries are (kernels/core/cuda_libraries.h).
#pragma once

#include <nccl.h>

#include "absl/status/statusor.h"

namespace attune {

struct NcclApi {
  decltype(&ncclGetVersion) GetVersion;
  decltype(&ncclGetUniqueId) GetUniqueId;
  decltype(&ncclGetErrorString) GetErrorString;
  decltype(&ncclGetLastError) GetLastError;
  decltype(&ncclCommInitRankConfig) CommInitRankConfig;
  decltype(&ncclCommGetAsyncError) CommGetAsyncError;
  decltype(&ncclCommFinalize) CommFinalize;
  decltype(&ncclCommDestroy) CommDestroy;
  decltype(&ncclCommAbort) CommAbort;
  decltype(&ncclAllReduce) AllReduce;
  decltype(&ncclAllGather) AllGather;
  decltype(&ncclBroadcast) Broadcast;
};

// Loaded at the first call, for the life of the process. FAILED_PRECONDITION says what was looked
// for, where, and what to do.
absl::StatusOr<const NcclApi*> LoadNccl();

}  // namespace attune
