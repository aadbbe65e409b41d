// The GPUs of this host, through NVML (libnvidia-ml.so.1, which comes with the driver and is opened
// at run time): what they are, how they do, and whether they may be used.
//
// A GPU becomes faulty, for as long as the agent runs, by
//   an XID that means the GPU or its driver (not those that a program brings about: 13, 31, 43,
//   45, 68, 94, 109)
//   an uncorrected memory error since the agent started
//   being lost to the driver
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attune/v1/job.pb.h"

namespace attune {

class GpuMonitor {
 public:
  // Of the GPUs that `visible` names in the way of CUDA_VISIBLE_DEVICES (numbers, UUIDs or their
  // beginnings; null: all). NOT_FOUND where there is no NVML or no such GPU; other errors are
  // NVML's.
  static absl::StatusOr<std::unique_ptr<GpuMonitor>> Open(
      const char* visible, const std::string& library = "libnvidia-ml.so.1");
  ~GpuMonitor();
  GpuMonitor(const GpuMonitor&) = delete;
  GpuMonitor& operator=(const GpuMonitor&) = delete;

  // "cuda:GPU-<uuid>", in NVML's order. `trainers` of them for each GPU: from the second on with
  // "/1", "/2" ... behind; `cores` are shared out among all.
  std::vector<v1::Device> Devices(int cores, int trainers);

  // Asks NVML: may take seconds where a GPU hangs. One status for each of Devices().
  std::vector<v1::DeviceStatus> Read();

 private:
  struct Nvml;
  struct Gpu;
  GpuMonitor();
  absl::Status OpenGpu(int index);
  void ReadEvents();
  void ReadGpu(Gpu* gpu);

  std::unique_ptr<Nvml> nvml_;
  std::vector<Gpu> gpus_;
  void* events_ = nullptr;  // nvmlEventSet_t; null where the driver has none
};

}  // namespace attune
