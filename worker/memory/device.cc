#include "worker/memory/device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#ifdef ATTUNE_HAS_CUDA
#include "kernels/core/cuda_error.h"
#include "kernels/core/cuda_libraries.h"
#endif

namespace attune {
namespace {

constexpr char kNoCuda[] =
    "this attune-trainer was built without the CUDA backend; use the CPU, or build it where nvcc "
    "is";

#ifdef ATTUNE_HAS_CUDA

// The one ring of the process, and what is under way out of its slots.
class CudaStaging : public DeviceLink {
 public:
  static CudaStaging& Get() {
    static auto* staging = new CudaStaging();
    return *staging;
  }

  absl::Status Copy(const HostReader& reader, const void* host, const TensorView& view,
                    cudaStream_t stream) {
    stream_ = stream;
    return ring_.Copy(reader, static_cast<const char*>(host), view.bytes(),
                      static_cast<char*>(view.data), this);
  }

  void Send(int slot, const char* from, int64_t bytes, char* to) override {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    CUDA_CHECK(cudaEventRecord(copied_[slot], stream_));
  }

  bool Arrived(int slot) override {
    const cudaError_t error = cudaEventQuery(copied_[slot]);
    if (error != cudaErrorNotReady) CUDA_CHECK(error);
    if (error == cudaErrorNotReady) cudaGetLastError();  // it is no error
    return error == cudaSuccess;
  }

 private:
  static constexpr int kSlots = 16;
  static constexpr int64_t kSlotBytes = int64_t{4} << 20;
  // Small enough that a thread that is held up leaves its share to the others, and no smaller:
  // each read is a call of the system.
  static constexpr int64_t kPartBytes = int64_t{512} << 10;

  CudaStaging() : ring_(TakeSlots(), kSlotBytes, kPartBytes) {
    for (cudaEvent_t& event : copied_) {
      CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
  }

  std::vector<char*> TakeSlots() {
    const absl::Status status = memory_.Allocate(DeviceKind::kCuda, kSlots * kSlotBytes);
    CHECK(status.ok());
    std::vector<char*> slots;
    slots.reserve(kSlots);
    for (int i = 0; i < kSlots; ++i) slots.push_back(memory_.data() + i * kSlotBytes);
    return slots;
  }

  PinnedMemory memory_;
  StagingRing ring_;
  cudaEvent_t copied_[kSlots];
  cudaStream_t stream_ = nullptr;
};

cudaEvent_t EventOf(void* event) {
  return static_cast<cudaEvent_t>(event);
}

bool IsCuda(const Exec& exec) {
  return exec.device == DeviceKind::kCuda;
}

#endif

}  // namespace

absl::Status OpenDevice(DeviceKind kind, int index) {
  if (kind == DeviceKind::kCpu) return absl::OkStatus();
#ifdef ATTUNE_HAS_CUDA
  // First: the names of what is missing help more than what the CUDA runtime makes of it.
  if (const std::string missing = LoadCudaLibraries(); !missing.empty()) {
    return absl::FailedPreconditionError(missing);
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device can be used: ",
                     error != cudaSuccess ? cudaGetErrorString(error) : "the driver shows none",
                     ". Check `nvidia-smi`, or train on the CPU (resources.device: cpu)"));
  }
  if (index < 0 || index >= count) {
    return absl::FailedPreconditionError(
        absl::StrCat("there is no CUDA device ", index, "; the driver shows ", count));
  }
  CUDA_CHECK(cudaSetDevice(index));
  CUDA_CHECK(cudaFree(nullptr));  // makes the context
  return absl::OkStatus();
#else
  return absl::FailedPreconditionError(kNoCuda);
#endif
}

std::string DeviceName() {
#ifdef ATTUNE_HAS_CUDA
  int index = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&index) == cudaSuccess &&
      cudaGetDeviceProperties(&properties, index) == cudaSuccess) {
    return properties.name;
  }
#endif
  return "";
}

int ComputeCapability() {
#ifdef ATTUNE_HAS_CUDA
  int index = 0, major = 0, minor = 0;
  if (cudaGetDevice(&index) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess) {
    return 10 * major + minor;
  }
#endif
  return 0;
}

absl::StatusOr<DeviceMemory> QueryDeviceMemory(DeviceKind kind) {
#ifdef ATTUNE_HAS_CUDA
  if (kind == DeviceKind::kCuda) {
    size_t free = 0, total = 0;
    const cudaError_t error = cudaMemGetInfo(&free, &total);
    if (error != cudaSuccess) return absl::InternalError(cudaGetErrorString(error));
    return DeviceMemory{static_cast<int64_t>(free), static_cast<int64_t>(total)};
  }
#endif
  if (kind == DeviceKind::kCuda) return absl::FailedPreconditionError(kNoCuda);
  const int64_t page = sysconf(_SC_PAGESIZE);
  return DeviceMemory{sysconf(_SC_AVPHYS_PAGES) * page, sysconf(_SC_PHYS_PAGES) * page};
}

void* NewStream(DeviceKind kind) {
#ifdef ATTUNE_HAS_CUDA
  if (kind == DeviceKind::kCuda) {
    cudaStream_t stream = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
#endif
  return nullptr;
}

void Synchronize(const Exec& exec) {
#ifdef ATTUNE_HAS_CUDA
  if (IsCuda(exec) && !exec.plan) CUDA_CHECK(cudaStreamSynchronize(StreamOf(exec.stream)));
#endif
}

StreamEvent::StreamEvent(StreamEvent&& other) noexcept
    : event_(std::exchange(other.event_, nullptr)) {}

StreamEvent::~StreamEvent() {
#ifdef ATTUNE_HAS_CUDA
  if (event_ != nullptr) cudaEventDestroy(EventOf(event_));
#endif
}

void StreamEvent::Record(const Exec& exec) {
#ifdef ATTUNE_HAS_CUDA
  if (!IsCuda(exec) || exec.plan) return;
  if (event_ == nullptr) {
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    event_ = event;
  }
  CUDA_CHECK(cudaEventRecord(EventOf(event_), StreamOf(exec.stream)));
#endif
}

void StreamEvent::MakeWait(const Exec& exec) const {
#ifdef ATTUNE_HAS_CUDA
  if (event_ == nullptr || exec.plan) return;
  CUDA_CHECK(cudaStreamWaitEvent(StreamOf(exec.stream), EventOf(event_), 0));
#endif
}

void StreamEvent::Wait() const {
#ifdef ATTUNE_HAS_CUDA
  if (event_ != nullptr) CUDA_CHECK(cudaEventSynchronize(EventOf(event_)));
#endif
}

void CopyToDevice(const Exec& exec, const void* host, const TensorView& view) {
  if (exec.plan || view.size() == 0) return;
  CHECK(view.contiguous());
#ifdef ATTUNE_HAS_CUDA
  if (IsCuda(exec)) {
    return CudaStaging::Get().Copy(HostReader(), host, view, StreamOf(exec.stream)).IgnoreError();
  }
#endif
  std::memcpy(view.data, host, view.bytes());
}

absl::Status CopyToDevice(const Exec& exec, const HostReader& reader, const void* host,
                          const TensorView& view) {
  if (exec.plan || view.size() == 0) return absl::OkStatus();
  CHECK(view.contiguous());
#ifdef ATTUNE_HAS_CUDA
  if (IsCuda(exec)) return CudaStaging::Get().Copy(reader, host, view, StreamOf(exec.stream));
#endif
  return reader.Read(host, view.bytes(), view.data);
}

void CopyToHost(const Exec& exec, const TensorView& view, void* host) {
  if (exec.plan || view.size() == 0) return;
  CHECK(view.contiguous());
#ifdef ATTUNE_HAS_CUDA
  if (IsCuda(exec)) {
    CUDA_CHECK(cudaMemcpyAsync(host, view.data, view.bytes(), cudaMemcpyDeviceToHost,
                               StreamOf(exec.stream)));
    return Synchronize(exec);
  }
#endif
  std::memcpy(host, view.data, view.bytes());
}

namespace {

// Memory whose pages are present, huge ones where the system has them; null if there is no room.
char* TakePresent(int64_t bytes) {
  void* const data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(data);
  madvise(begin, bytes, MADV_HUGEPAGE);
  const int64_t page = sysconf(_SC_PAGESIZE);
#pragma omp parallel for schedule(static, kHugePage / 4096)
  for (int64_t at = 0; at < bytes; at += page) begin[at] = 0;
  return begin;
}

}  // namespace

PinnedMemory::~PinnedMemory() {
  if (data_ == nullptr) return;
#ifdef ATTUNE_HAS_CUDA
  if (kind_ == DeviceKind::kCuda) {
    if (!registered_) {
      cudaFreeHost(data_);
      return;
    }
    cudaDeviceSynchronize();  // a copy may be under way
    cudaHostUnregister(data_);
  }
#endif
  munmap(data_, bytes_);
}

absl::Status PinnedMemory::Allocate(DeviceKind kind, int64_t bytes) {
  CHECK(data_ == nullptr);
  if (bytes == 0) return absl::OkStatus();
  kind_ = kind;
  data_ = TakePresent(bytes);
  if (data_ == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no host memory for ", bytes, " bytes"));
  }
  bytes_ = bytes;
#ifdef ATTUNE_HAS_CUDA
  if (kind == DeviceKind::kCuda) return Pin();
#endif
  return absl::OkStatus();
}

#ifdef ATTUNE_HAS_CUDA
absl::Status PinnedMemory::Pin() {
  int device = 0, same_pointer = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(
      cudaDeviceGetAttribute(&same_pointer, cudaDevAttrCanUseHostPointerForRegisteredMem, device));
  registered_ =
      same_pointer != 0 && cudaHostRegister(data_, bytes_, cudaHostRegisterDefault) == cudaSuccess;
  if (registered_) return absl::OkStatus();
  cudaGetLastError();  // the driver's own memory will do
  munmap(std::exchange(data_, nullptr), bytes_);
  void* data = nullptr;
  const cudaError_t error = cudaMallocHost(&data, bytes_);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is told here
    return absl::ResourceExhaustedError(
        absl::StrCat("the job keeps ", std::exchange(bytes_, 0), " bytes in pinned host memory, ",
                     "and the host refused to pin them: ", cudaGetErrorString(error)));
  }
  data_ = static_cast<char*>(data);
  return absl::OkStatus();
}
#endif

#ifdef ATTUNE_HAS_CUDA
namespace {

// Fastest of a few turns, in ms: whatever else is on the link only slows them.
float FastestCopyMs(void* to, const void* from, int64_t bytes) {
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  float fastest = std::numeric_limits<float>::infinity();
  for (int turn = 0; turn < 4; ++turn) {
    CUDA_CHECK(cudaEventRecord(begin));
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault));
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    fastest = std::min(fastest, ms);
  }
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  return fastest;
}

}  // namespace

double MeasureHostCopyBytesPerSecond() {
  constexpr int64_t kBytes = 32 << 20;
  if (DeviceName().empty()) return 0;
  PinnedMemory host;
  void* device = nullptr;
  if (!host.Allocate(DeviceKind::kCuda, kBytes).ok()) return 0;
  if (cudaMalloc(&device, kBytes) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const float ms = std::max(FastestCopyMs(host.data(), device, kBytes),
                            FastestCopyMs(device, host.data(), kBytes));
  CUDA_CHECK(cudaFree(device));
  return kBytes / (ms * 1e-3);
}
#else
double MeasureHostCopyBytesPerSecond() {
  return 0;
}
#endif

void CopyToPinned(const Exec& exec, const TensorView& view, void* pinned) {
  if (exec.plan || view.size() == 0) return;
  CHECK(view.contiguous());
#ifdef ATTUNE_HAS_CUDA
  if (IsCuda(exec)) {
    CUDA_CHECK(cudaMemcpyAsync(pinned, view.data, view.bytes(), cudaMemcpyDeviceToHost,
                               StreamOf(exec.stream)));
    return;
  }
#endif
  std::memcpy(pinned, view.data, view.bytes());
}

void CopyFromPinned(const Exec& exec, const void* pinned, const TensorView& view) {
  if (exec.plan || view.size() == 0) return;
  CHECK(view.contiguous());
#ifdef ATTUNE_HAS_CUDA
  if (IsCuda(exec)) {
    CUDA_CHECK(cudaMemcpyAsync(view.data, pinned, view.bytes(), cudaMemcpyHostToDevice,
                               StreamOf(exec.stream)));
    return;
  }
#endif
  std::memcpy(view.data, pinned, view.bytes());
}

}  // namespace attune
