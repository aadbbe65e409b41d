// Which device a trainer runs on: as --device says, or as the agent's assignment does.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "attune/v1/job.pb.h"
#include "attune/v1/job_spec.pb.h"
#include "kernels/core/exec.h"

namespace attune {

struct DeviceChoice {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;        // of the CUDA devices that this process sees
  bool decided = true;  // false: "auto", a GPU if one can be used
};

// "cpu", "cuda", "cuda:N" or "auto". INVALID_ARGUMENT for anything else.
absl::StatusOr<DeviceChoice> ParseDeviceChoice(absl::string_view text);

// Where to look for CUDA libraries, beside where the system looks (kernels/core/cuda_libraries.h).
void SetLibraryDirectories(const std::vector<std::string>& directories);

// Decides "auto" without touching a device: a GPU where there is a driver for one.
void GuessDevice(DeviceChoice* choice);

// Opens the device that was chosen. An undecided choice becomes the CPU where no GPU can be used;
// *note then says why, if the machine has a GPU. FAILED_PRECONDITION says what is missing, where
// it was looked for, and what to do.
absl::Status OpenChosenDevice(DeviceChoice* choice, std::string* note);

// Opens the device of an assignment. The agent lets its trainer see that one alone.
absl::Status OpenAssignedDevice(const v1::Device& device);

DeviceKind KindOf(const v1::Device& device);

// The device as an assignment names it.
v1::Device ToDevice(const DeviceChoice& choice, int threads);

}  // namespace attune
