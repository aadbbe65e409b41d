// The devices that this host offers: CPU slots, and GPUs (gpu_monitor.h).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attune/v1/job.pb.h"
#include "worker/agent/gpu_monitor.h"

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

enum class DeviceOffer {
  kAuto,  // GPUs where there are any; CPU slots where there are none, or where they are asked for
  kCpu,
  kCuda,
};

struct DeviceOptions {
  DeviceOffer offer = DeviceOffer::kAuto;
  int cpu_slots = 0;  // 0: one, where no GPU is offered
  int trainers_per_gpu = 1;
  // As CUDA_VISIBLE_DEVICES of the agent says; none: all.
  std::optional<std::string> visible_gpus;
};

// The devices, GPUs first. *gpus stays null where none is offered. NOT_FOUND if GPUs are required
// and there are none.
absl::StatusOr<std::vector<v1::Device>> FindDevices(const DeviceOptions& options,
                                                    std::unique_ptr<GpuMonitor>* gpus);

}  // namespace attune
