#include "worker/memory/device.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
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

// Pageable host bytes go through pinned pieces, filled by several threads while earlier ones are
// on their way.
class StagingRing {
 public:
  static constexpr int64_t kPieceBytes = int64_t{16} << 20;
  static constexpr int kPieces = 4;

  static StagingRing& Get() {
    static auto* ring = new StagingRing();
    return *ring;
  }

  void Copy(const char* host, int64_t bytes, char* device, cudaStream_t stream) {
    while (bytes > 0) {
      if (used_ + kAlignment > kPieceBytes) NextPiece();
      Piece& piece = pieces_[now_];
      const int64_t n = std::min(bytes, kPieceBytes - used_);
      Fill(piece.data + used_, host, n);
      CUDA_CHECK(cudaMemcpyAsync(device, piece.data + used_, n, cudaMemcpyHostToDevice, stream));
      CUDA_CHECK(cudaEventRecord(piece.copied, stream));
      used_ += (n + kAlignment - 1) / kAlignment * kAlignment;
      host += n;
      device += n;
      bytes -= n;
    }
  }

 private:
  static constexpr int64_t kAlignment = 256;
  struct Piece {
    char* data = nullptr;
    cudaEvent_t copied = nullptr;
  };

  StagingRing() {
    for (Piece& piece : pieces_) {
      void* data = nullptr;
      CUDA_CHECK(cudaMallocHost(&data, kPieceBytes));
      piece.data = static_cast<char*>(data);
      CUDA_CHECK(cudaEventCreateWithFlags(&piece.copied, cudaEventDisableTiming));
    }
  }

  void NextPiece() {
    now_ = (now_ + 1) % kPieces;
    used_ = 0;
    CUDA_CHECK(cudaEventSynchronize(pieces_[now_].copied));
  }

  static void Fill(char* to, const char* from, int64_t bytes) {
    // Small enough that a thread that is held up (pages of the file are mapped as they are read)
    // leaves its share to the others.
    constexpr int64_t kAtOnce = int64_t{256} << 10;
    const int64_t parts = (bytes + kAtOnce - 1) / kAtOnce;
#pragma omp parallel for schedule(dynamic) if (parts > 1)
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = i * kAtOnce;
      std::memcpy(to + begin, from + begin, std::min(kAtOnce, bytes - begin));
    }
  }

  Piece pieces_[kPieces];
  int now_ = 0;
  int64_t used_ = 0;
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
    return StagingRing::Get().Copy(static_cast<const char*>(host), view.bytes(),
                                   static_cast<char*>(view.data), StreamOf(exec.stream));
  }
#endif
  std::memcpy(view.data, host, view.bytes());
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

PinnedMemory::~PinnedMemory() {
  if (data_ == nullptr) return;
#ifdef ATTUNE_HAS_CUDA
  if (kind_ == DeviceKind::kCuda) {
    cudaFreeHost(data_);
    return;
  }
#endif
  std::free(data_);
}

absl::Status PinnedMemory::Allocate(DeviceKind kind, int64_t bytes) {
  CHECK(data_ == nullptr);
  if (bytes == 0) return absl::OkStatus();
  kind_ = kind;
  void* data = nullptr;
#ifdef ATTUNE_HAS_CUDA
  if (kind == DeviceKind::kCuda) {
    const cudaError_t error = cudaMallocHost(&data, bytes);
    if (error != cudaSuccess) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "the job wants ", bytes, " bytes of host memory beside the device's, and the ",
          "host refused to pin them: ", cudaGetErrorString(error)));
    }
  }
#endif
  if (kind == DeviceKind::kCpu) data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no host memory for ", bytes, " bytes"));
  }
  data_ = static_cast<char*>(data);
  bytes_ = bytes;
  return absl::OkStatus();
}

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
