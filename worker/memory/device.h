// The device of a trainer: opening it, copies between it and the host, streams and their order.
//
// On the CPU a stream is nothing and everything happens at once; on the plan device nothing
// happens. So the code above has one form.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
#include "worker/memory/staging_ring.h"

namespace attune {

// Makes the device usable from this process: loads the libraries that its ops need and selects it.
// Call it once, before anything else here. FAILED_PRECONDITION says what is missing, where it was
// looked for, and what to do.
absl::Status OpenDevice(DeviceKind kind, int index);

// Of the opened CUDA device, as its driver says ("NVIDIA H100 80GB HBM3"); empty without one.
std::string DeviceName();
// Likewise (90 is 9.0, sm_90); 0 without one.
int ComputeCapability();

struct DeviceMemory {
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};
// Of the opened device, as its driver says. On the CPU: of the machine.
absl::StatusOr<DeviceMemory> QueryDeviceMemory(DeviceKind kind);

// Of copies between the opened CUDA device and pinned memory, from some milliseconds of them: the
// same GPU's link differs from host to host. 0 without a device, or without room to try.
double MeasureHostCopyBytesPerSecond();

// A new stream of the opened device, for the life of the process; null on the CPU.
void* NewStream(DeviceKind kind);
// Returns when everything that was put into the stream has run.
void Synchronize(const Exec& exec);

// A point in a stream that another stream can wait for. Without effect where streams have none.
class StreamEvent {
 public:
  StreamEvent() = default;
  StreamEvent(const StreamEvent&) = delete;
  StreamEvent& operator=(const StreamEvent&) = delete;
  StreamEvent(StreamEvent&& other) noexcept;
  ~StreamEvent();

  void Record(const Exec& exec);
  // What is put into the stream from now on runs after the recorded point (nothing recorded: no
  // wait).
  void MakeWait(const Exec& exec) const;
  // Returns when the recorded point has been reached.
  void Wait() const;

 private:
  void* event_ = nullptr;
};

// Copies between host memory and a contiguous view, in the order of the stream. To the device:
// on return the host bytes may be reused, though the copy may still be under way. To the host: on
// return they may be read.
void CopyToDevice(const Exec& exec, const void* host, const TensorView& view);
// The same of bytes that are read meanwhile; an error is the reader's.
absl::Status CopyToDevice(const Exec& exec, const HostReader& reader, const void* host,
                          const TensorView& view);
void CopyToHost(const Exec& exec, const TensorView& view, void* host);

// Of the host, in bytes.
constexpr int64_t kHugePage = int64_t{2} << 20;

// Host memory that the device copies to and from while others run. Freed with the object. All
// threads make its pages present, huge ones where the system has them, before they are pinned: 23
// GB/s where the driver, which takes page by page, makes 2.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory();

  // RESOURCE_EXHAUSTED if the host has no such room.
  absl::Status Allocate(DeviceKind kind, int64_t bytes);
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  absl::Status Pin();

  DeviceKind kind_ = DeviceKind::kCpu;
  bool registered_ = false;  // with the device's driver, that is; else it is the driver's own
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Copies between a contiguous view and pinned memory without waiting, in the order of the stream.
void CopyToPinned(const Exec& exec, const TensorView& view, void* pinned);
void CopyFromPinned(const Exec& exec, const void* pinned, const TensorView& view);

}  // namespace attune
