#include "worker/train/device_choice.h"

#include <filesystem>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "worker/memory/device.h"

#ifdef ATTUNE_HAS_CUDA
#include "kernels/core/cuda_libraries.h"
#endif

namespace attune {

#ifdef ATTUNE_HAS_CUDA
namespace {

// Whether the kernel has NVIDIA's driver: then someone expects the GPU to be used.
bool DriverIsLoaded() {
  std::error_code error;
  return std::filesystem::exists("/dev/nvidiactl", error) ||
         std::filesystem::exists("/dev/dxg", error);
}

}  // namespace
#endif

void SetLibraryDirectories(const std::vector<std::string>& directories) {
#ifdef ATTUNE_HAS_CUDA
  SetCudaLibraryDirectories(directories);
#endif
}

absl::StatusOr<DeviceChoice> ParseDeviceChoice(absl::string_view text) {
  if (text == "auto") return DeviceChoice{.decided = false};
  if (text == "cpu") return DeviceChoice{};
  DeviceChoice choice{.kind = DeviceKind::kCuda};
  absl::string_view rest = text;
  if (!absl::ConsumePrefix(&rest, "cuda")) rest = "?";
  if (rest.empty()) return choice;
  if (!absl::ConsumePrefix(&rest, ":") || !absl::SimpleAtoi(rest, &choice.index) ||
      choice.index < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is none of cpu, cuda, cuda:N, auto"));
  }
  return choice;
}

absl::Status OpenChosenDevice(DeviceChoice* choice, std::string* note) {
  if (choice->decided) {
    if (choice->kind == DeviceKind::kCpu) return absl::OkStatus();
    const absl::Status status = OpenDevice(DeviceKind::kCuda, choice->index);
    if (status.ok()) return status;
    return absl::Status(status.code(),
                        absl::StrCat(status.message(), "\nOr use the CPU: --device cpu"));
  }
  GuessDevice(choice);
  if (choice->kind == DeviceKind::kCpu) return absl::OkStatus();
  const absl::Status status = OpenDevice(DeviceKind::kCuda, choice->index);
  if (status.ok()) return status;
  *note = absl::StrCat("the CPU is used, and this machine's GPU is not: ", status.message());
  choice->kind = DeviceKind::kCpu;
  return absl::OkStatus();
}

void GuessDevice(DeviceChoice* choice) {
  if (choice->decided) return;
  choice->decided = true;
#ifdef ATTUNE_HAS_CUDA
  if (DriverIsLoaded()) choice->kind = DeviceKind::kCuda;
#endif
}

absl::Status OpenAssignedDevice(const v1::Device& device) {
  return OpenDevice(KindOf(device), 0);
}

DeviceKind KindOf(const v1::Device& device) {
  return device.type() == v1::DEVICE_TYPE_CUDA ? DeviceKind::kCuda : DeviceKind::kCpu;
}

v1::Device ToDevice(const DeviceChoice& choice, int threads) {
  v1::Device device;
  const bool cuda = choice.kind == DeviceKind::kCuda;
  device.set_id(cuda ? absl::StrCat("cuda:", choice.index) : "cpu:0");
  device.set_type(cuda ? v1::DEVICE_TYPE_CUDA : v1::DEVICE_TYPE_CPU);
  device.set_threads(threads);
  // Every GPU that the kernels are built for (sm_80 and later) has it.
  device.set_bf16(cuda);
  if (cuda) device.set_compute_capability(ComputeCapability());
  return device;
}

}  // namespace attune
