#include "worker/agent/devices.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/log.h"

namespace attune {
namespace {

std::string CpuModel() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (!absl::StartsWith(line, "model name") && !absl::StartsWith(line, "Model")) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
  }
  return "CPU";
}

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max<int>(1, sysconf(_SC_NPROCESSORS_ONLN));
}

int64_t UsableMemory() {
  const int64_t physical = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  // Inside a container the control group's root is its own; elsewhere this file is not there.
  std::ifstream in("/sys/fs/cgroup/memory.max");
  std::string text;
  int64_t limit = std::numeric_limits<int64_t>::max();
  if (!(in >> text) || !absl::SimpleAtoi(text, &limit)) return physical;
  return std::min(physical, limit);
}

bool MultipliesBf16() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  // AMX-BF16: leaf 7.0, EDX 22. AVX512_BF16: leaf 7.1, EAX 5.
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1)) return true;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
  return false;
#endif
}

}  // namespace

HostCpu ReadHostCpu() {
  return {CpuModel(), UsableCores(), UsableMemory(), MultipliesBf16()};
}

std::vector<v1::Device> CpuSlots(const HostCpu& host, int slots) {
  std::vector<v1::Device> devices;
  for (int i = 0; i < slots; ++i) {
    v1::Device device;
    device.set_id(absl::StrCat("cpu:", i));
    device.set_type(v1::DEVICE_TYPE_CPU);
    device.set_model(host.model);
    device.set_memory_bytes(host.memory_bytes / slots);
    device.set_threads(std::max(1, host.cores / slots));
    device.set_bf16(host.bf16);
    devices.push_back(std::move(device));
  }
  return devices;
}

absl::StatusOr<std::vector<v1::Device>> FindDevices(const DeviceOptions& options,
                                                    std::unique_ptr<GpuMonitor>* gpus) {
  const HostCpu host = ReadHostCpu();
  std::vector<v1::Device> devices;
  if (options.offer != DeviceOffer::kCpu) {
    auto monitor = GpuMonitor::Open(options.visible_gpus.has_value() ? options.visible_gpus->c_str()
                                                                     : nullptr);
    if (monitor.ok()) {
      *gpus = *std::move(monitor);
      devices = (*gpus)->Devices(host.cores, options.trainers_per_gpu);
    } else if (options.offer == DeviceOffer::kCuda) {
      return monitor.status();
    } else if (!absl::IsNotFound(monitor.status())) {
      LOG(WARNING) << "no GPU is offered: " << monitor.status();
    }
  }
  if (options.offer == DeviceOffer::kCuda) return devices;
  const int slots = options.cpu_slots > 0 ? options.cpu_slots : devices.empty() ? 1 : 0;
  for (v1::Device& device : CpuSlots(host, slots)) devices.push_back(std::move(device));
  return devices;
}

}  // namespace attune
