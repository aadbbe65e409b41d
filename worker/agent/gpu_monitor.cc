#include "worker/agent/gpu_monitor.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "proto/log.h"

namespace attune {
namespace {

// What is used of NVML's ABI, which is stable; its header comes with toolkits only.
using NvmlDevice = void*;
using NvmlEventSet = void*;
struct NvmlMemory {
  unsigned long long total, free, used;
};
struct NvmlUtilization {
  unsigned int gpu, memory;  // percent
};
struct NvmlEventData {
  NvmlDevice device;
  unsigned long long event_type;
  unsigned long long event_data;
  unsigned int gpu_instance, compute_instance;
};
enum NvmlReturn : int { kNvmlSuccess = 0, kNvmlGpuIsLost = 15 };
constexpr int kNvmlTemperatureGpu = 0;
constexpr int kNvmlErrorsCorrected = 0;
constexpr int kNvmlErrorsUncorrected = 1;
constexpr int kNvmlErrorsSinceLoad = 0;
constexpr unsigned long long kNvmlEventXid = 8;

// Brought about by the program that runs, not by the GPU.
constexpr unsigned long long kProgramXids[] = {13, 31, 43, 45, 68, 94, 109};
constexpr int kEventsAtOnce = 64;

// Whether the `index`-th GPU is named in a list as CUDA_VISIBLE_DEVICES has it.
bool IsVisible(const char* visible, int index, absl::string_view uuid) {
  if (visible == nullptr) return true;
  for (absl::string_view part : absl::StrSplit(visible, ',')) {
    part = absl::StripAsciiWhitespace(part);
    int number = -1;
    if (absl::SimpleAtoi(part, &number) ? number == index
                                        : !part.empty() && absl::StartsWith(uuid, part)) {
      return true;
    }
  }
  return false;
}

}  // namespace

struct GpuMonitor::Nvml {
  ~Nvml() {
    if (Shutdown != nullptr) Shutdown();
    if (library != nullptr) dlclose(library);
  }
  std::string Explain(int result) const {
    return ErrorString == nullptr ? absl::StrCat("NVML error ", result) : ErrorString(result);
  }

  void* library = nullptr;
  int (*Init)() = nullptr;
  int (*Shutdown)() = nullptr;
  const char* (*ErrorString)(int) = nullptr;
  int (*DeviceGetCount)(unsigned int*) = nullptr;
  int (*DeviceGetHandleByIndex)(unsigned int, NvmlDevice*) = nullptr;
  int (*DeviceGetUuid)(NvmlDevice, char*, unsigned int) = nullptr;
  int (*DeviceGetName)(NvmlDevice, char*, unsigned int) = nullptr;
  int (*DeviceGetMemoryInfo)(NvmlDevice, NvmlMemory*) = nullptr;
  int (*DeviceGetCudaComputeCapability)(NvmlDevice, int*, int*) = nullptr;
  int (*DeviceGetUtilizationRates)(NvmlDevice, NvmlUtilization*) = nullptr;
  int (*DeviceGetPowerUsage)(NvmlDevice, unsigned int*) = nullptr;
  int (*DeviceGetTemperature)(NvmlDevice, int, unsigned int*) = nullptr;
  int (*DeviceGetTotalEccErrors)(NvmlDevice, int, int, unsigned long long*) = nullptr;
  int (*EventSetCreate)(NvmlEventSet*) = nullptr;
  int (*EventSetFree)(NvmlEventSet) = nullptr;
  int (*DeviceRegisterEvents)(NvmlDevice, unsigned long long, NvmlEventSet) = nullptr;
  int (*EventSetWait)(NvmlEventSet, NvmlEventData*, unsigned int) = nullptr;

  // The name of a function that is missing, or empty.
  std::string FindAll() {
    std::string missing;
    const auto find = [&](const char* name, auto* function) {
      *function = reinterpret_cast<std::decay_t<decltype(*function)>>(dlsym(library, name));
      if (*function == nullptr && missing.empty()) missing = name;
    };
    find("nvmlInit_v2", &Init);
    find("nvmlErrorString", &ErrorString);
    find("nvmlDeviceGetCount_v2", &DeviceGetCount);
    find("nvmlDeviceGetHandleByIndex_v2", &DeviceGetHandleByIndex);
    find("nvmlDeviceGetUUID", &DeviceGetUuid);
    find("nvmlDeviceGetName", &DeviceGetName);
    find("nvmlDeviceGetMemoryInfo", &DeviceGetMemoryInfo);
    find("nvmlDeviceGetCudaComputeCapability", &DeviceGetCudaComputeCapability);
    find("nvmlDeviceGetUtilizationRates", &DeviceGetUtilizationRates);
    find("nvmlDeviceGetPowerUsage", &DeviceGetPowerUsage);
    find("nvmlDeviceGetTemperature", &DeviceGetTemperature);
    find("nvmlDeviceGetTotalEccErrors", &DeviceGetTotalEccErrors);
    find("nvmlEventSetCreate", &EventSetCreate);
    find("nvmlEventSetFree", &EventSetFree);
    find("nvmlDeviceRegisterEvents", &DeviceRegisterEvents);
    find("nvmlEventSetWait_v2", &EventSetWait);
    return missing;
  }
};

struct GpuMonitor::Gpu {
  NvmlDevice handle = nullptr;
  std::string uuid, name;
  int64_t memory_bytes = 0;
  int compute_capability = 0;
  int64_t uncorrected_at_start = 0;
  int64_t xid_errors = 0;
  std::string fault;
  v1::DeviceStatus status;  // as last read
  int trainers = 1;
};

GpuMonitor::GpuMonitor() : nvml_(std::make_unique<Nvml>()) {}

GpuMonitor::~GpuMonitor() {
  if (events_ != nullptr) nvml_->EventSetFree(events_);
}

absl::StatusOr<std::unique_ptr<GpuMonitor>> GpuMonitor::Open(const char* visible,
                                                             const std::string& library) {
  std::unique_ptr<GpuMonitor> monitor(new GpuMonitor());
  Nvml& nvml = *monitor->nvml_;
  nvml.library = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (nvml.library == nullptr) {
    return absl::NotFoundError(absl::StrCat("there is no NVIDIA driver here: ", dlerror()));
  }
  if (const std::string missing = nvml.FindAll(); !missing.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(library, " has no ", missing));
  }
  if (const int result = nvml.Init(); result != kNvmlSuccess) {
    return absl::NotFoundError(absl::StrCat("NVML: ", nvml.Explain(result)));
  }
  nvml.Shutdown = reinterpret_cast<int (*)()>(dlsym(nvml.library, "nvmlShutdown"));
  unsigned int count = 0;
  if (const int result = nvml.DeviceGetCount(&count); result != kNvmlSuccess) {
    return absl::InternalError(absl::StrCat("NVML counts no GPUs: ", nvml.Explain(result)));
  }
  if (nvml.EventSetCreate(&monitor->events_) != kNvmlSuccess) monitor->events_ = nullptr;
  auto& gpus = monitor->gpus_;
  for (unsigned int i = 0; i < count; ++i) {
    if (absl::Status s = monitor->OpenGpu(static_cast<int>(i)); !s.ok()) {
      LOG(WARNING) << "GPU " << i << " is not offered: " << s;
    } else if (!IsVisible(visible, static_cast<int>(i), gpus.back().uuid)) {
      gpus.pop_back();
    }
  }
  if (gpus.empty()) return absl::NotFoundError("NVML shows no GPU that may be used");
  return monitor;
}

absl::Status GpuMonitor::OpenGpu(int index) {
  Gpu gpu;
  char text[128] = "";
  NvmlMemory memory{};
  int major = 0, minor = 0;
  const auto check = [&](int result) {
    return result == kNvmlSuccess ? absl::OkStatus() : absl::InternalError(nvml_->Explain(result));
  };
  absl::Status s = check(nvml_->DeviceGetHandleByIndex(index, &gpu.handle));
  if (s.ok()) s = check(nvml_->DeviceGetUuid(gpu.handle, text, sizeof(text)));
  gpu.uuid = text;
  if (s.ok()) s = check(nvml_->DeviceGetName(gpu.handle, text, sizeof(text)));
  gpu.name = text;
  if (s.ok()) s = check(nvml_->DeviceGetMemoryInfo(gpu.handle, &memory));
  if (s.ok()) s = check(nvml_->DeviceGetCudaComputeCapability(gpu.handle, &major, &minor));
  if (!s.ok()) return s;
  gpu.memory_bytes = static_cast<int64_t>(memory.total);
  gpu.compute_capability = 10 * major + minor;
  unsigned long long errors = 0;
  if (nvml_->DeviceGetTotalEccErrors(gpu.handle, kNvmlErrorsUncorrected, kNvmlErrorsSinceLoad,
                                     &errors) == kNvmlSuccess) {
    gpu.uncorrected_at_start = static_cast<int64_t>(errors);
  }
  if (events_ != nullptr) nvml_->DeviceRegisterEvents(gpu.handle, kNvmlEventXid, events_);
  gpus_.push_back(std::move(gpu));
  return absl::OkStatus();
}

std::vector<v1::Device> GpuMonitor::Devices(int cores, int trainers) {
  std::vector<v1::Device> devices;
  const int all = static_cast<int>(gpus_.size()) * trainers;
  for (Gpu& gpu : gpus_) {
    gpu.trainers = trainers;
    for (int i = 0; i < trainers; ++i) {
      v1::Device device;
      device.set_id(absl::StrCat("cuda:", gpu.uuid, i == 0 ? "" : absl::StrCat("/", i)));
      device.set_type(v1::DEVICE_TYPE_CUDA);
      device.set_model(gpu.name);
      device.set_memory_bytes(gpu.memory_bytes / trainers);
      device.set_threads(std::max(1, cores / all));
      device.set_bf16(gpu.compute_capability >= 80);
      device.set_uuid(gpu.uuid);
      device.set_compute_capability(gpu.compute_capability);
      devices.push_back(std::move(device));
    }
  }
  return devices;
}

void GpuMonitor::ReadEvents() {
  NvmlEventData event;
  for (int i = 0; events_ != nullptr && i < kEventsAtOnce; ++i) {
    if (nvml_->EventSetWait(events_, &event, 0) != kNvmlSuccess) return;
    if (event.event_type != kNvmlEventXid) continue;
    for (Gpu& gpu : gpus_) {
      if (gpu.handle != event.device) continue;
      gpu.xid_errors += 1;
      const bool program =
          std::count(std::begin(kProgramXids), std::end(kProgramXids), event.event_data) != 0;
      if (program || !gpu.fault.empty()) continue;
      gpu.fault = absl::StrCat("the driver reported XID ", event.event_data);
    }
  }
}

void GpuMonitor::ReadGpu(Gpu* gpu) {
  NvmlUtilization utilization{};
  NvmlMemory memory{};
  unsigned int value = 0;
  unsigned long long errors = 0;
  v1::DeviceStatus& status = gpu->status;
  // What a GPU does not have (ECC, power) stays 0.
  const int result = nvml_->DeviceGetMemoryInfo(gpu->handle, &memory);
  if (result == kNvmlSuccess) status.set_memory_used_bytes(static_cast<int64_t>(memory.used));
  if (result == kNvmlGpuIsLost && gpu->fault.empty()) gpu->fault = nvml_->Explain(result);
  if (nvml_->DeviceGetUtilizationRates(gpu->handle, &utilization) == kNvmlSuccess) {
    status.set_utilization(utilization.gpu / 100.0);
  }
  if (nvml_->DeviceGetPowerUsage(gpu->handle, &value) == kNvmlSuccess) {
    status.set_power_w(value / 1000.0);
  }
  if (nvml_->DeviceGetTemperature(gpu->handle, kNvmlTemperatureGpu, &value) == kNvmlSuccess) {
    status.set_temperature_c(value);
  }
  if (nvml_->DeviceGetTotalEccErrors(gpu->handle, kNvmlErrorsCorrected, kNvmlErrorsSinceLoad,
                                     &errors) == kNvmlSuccess) {
    status.set_ecc_corrected_errors(static_cast<int64_t>(errors));
  }
  if (nvml_->DeviceGetTotalEccErrors(gpu->handle, kNvmlErrorsUncorrected, kNvmlErrorsSinceLoad,
                                     &errors) == kNvmlSuccess) {
    status.set_ecc_uncorrected_errors(static_cast<int64_t>(errors));
  }
  const int64_t fresh = status.ecc_uncorrected_errors() - gpu->uncorrected_at_start;
  if (fresh > 0 && gpu->fault.empty()) {
    gpu->fault = absl::StrCat(fresh, " uncorrected memory errors");
  }
  status.set_xid_errors(gpu->xid_errors);
  status.set_fault(gpu->fault);
}

std::vector<v1::DeviceStatus> GpuMonitor::Read() {
  ReadEvents();
  std::vector<v1::DeviceStatus> statuses;
  for (Gpu& gpu : gpus_) {
    const bool healthy = gpu.fault.empty();
    ReadGpu(&gpu);
    if (healthy && !gpu.fault.empty()) {
      LOG(ERROR) << gpu.uuid << " is not offered any more: " << gpu.fault;
    }
    for (int i = 0; i < gpu.trainers; ++i) {
      gpu.status.set_device(absl::StrCat("cuda:", gpu.uuid, i == 0 ? "" : absl::StrCat("/", i)));
      statuses.push_back(gpu.status);
    }
  }
  return statuses;
}

}  // namespace attune
