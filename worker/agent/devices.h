// The devices that this host offers. CPU slots today; GPUs are listed here too, once there are
// kernels for them: nothing else in the agent knows the kinds of devices.
#pragma once

#include <string>
#include <vector>

#include "attune/v1/job.pb.h"

namespace attune {

// What is known of the host, so that the slots can be computed without asking it.
struct HostCpu {
  std::string model;         // as /proc/cpuinfo names it
  int cores = 1;             // that this process may run on
  int64_t memory_bytes = 0;  // of the host, or of the control group if that is less
  bool bf16 = false;         // AVX512_BF16 or AMX-BF16
};
HostCpu ReadHostCpu();

// "cpu:0" ... "cpu:<slots-1>", each with an equal share of cores (at least one) and memory.
std::vector<v1::Device> CpuSlots(const HostCpu& host, int slots);

}  // namespace attune
