#include "worker/memory/arena.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

#ifdef ATTUNE_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace attune {
namespace {

int64_t AlignUp(int64_t bytes) {
  return (bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
}

}  // namespace

Arena Arena::Plan() {
  return Arena(/*plan=*/true, DeviceKind::kCpu, nullptr, 0);
}

absl::StatusOr<Arena> Arena::Allocate(DeviceKind device, int64_t bytes) {
  if (bytes == 0) return Arena(false, device, nullptr, 0);
  if (device == DeviceKind::kCuda) return AllocateCuda(bytes);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the job needs ", bytes,
                     " bytes of memory, and the system refused: ", std::strerror(errno)));
  }
  // Fewer page faults; the kernel may decline.
  if (bytes >= kHugePage) madvise(base, bytes, MADV_HUGEPAGE);
  return Arena(false, device, static_cast<char*>(base), bytes);
}

absl::StatusOr<Arena> Arena::AllocateCuda(int64_t bytes) {
#ifdef ATTUNE_HAS_CUDA
  void* base = nullptr;
  const cudaError_t error = cudaMalloc(&base, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is told here
    const absl::StatusOr<DeviceMemory> memory = QueryDeviceMemory(DeviceKind::kCuda);
    return absl::ResourceExhaustedError(absl::StrCat(
        "the job needs ", bytes, " bytes of device memory; ",
        memory.ok() ? absl::StrCat(memory->free_bytes, " of ", memory->total_bytes, " are free")
                    : std::string(cudaGetErrorString(error)),
        ". Lower batch.micro_batch_tokens, or use a device that is free"));
  }
  return Arena(false, DeviceKind::kCuda, static_cast<char*>(base), bytes);
#else
  return absl::UnimplementedError("built without the CUDA backend");
#endif
}

Arena::Arena(Arena&& other) noexcept
    : plan_(other.plan_),
      device_(other.device_),
      base_(std::exchange(other.base_, nullptr)),
      capacity_(other.capacity_),
      state_(other.state_),
      phase_(std::move(other.phase_)),
      peak_(std::move(other.peak_)) {
  std::memcpy(class_bytes_, other.class_bytes_, sizeof(class_bytes_));
}

Arena::~Arena() {
  if (base_ == nullptr) return;
#ifdef ATTUNE_HAS_CUDA
  if (device_ == DeviceKind::kCuda) {
    cudaFree(base_);
    return;
  }
#endif
  munmap(base_, capacity_);
}

TensorView Arena::New(ArenaEnd end, MemoryClass memory_class, DType dtype,
                      std::initializer_list<int64_t> shape) {
  TensorView view(nullptr, dtype, shape);
  const int64_t bytes = AlignUp(view.bytes());
  const int c = static_cast<int>(memory_class);
  class_bytes_[static_cast<int>(end)][c] += bytes;
  int64_t offset;
  if (end == ArenaEnd::kBottom) {
    offset = state_.bottom;
    state_.bottom += bytes;
  } else {
    state_.top += bytes;
    // On the plan device there is no end to count from.
    offset = plan_ ? 0 : capacity_ - state_.top;
  }
  const int64_t total = state_.bottom + state_.top;
  CHECK(plan_ || total <= capacity_);
  if (total > peak_.total) {
    peak_.total = total;
    peak_.phase = phase_;
  }
  const int64_t of_class = class_bytes_[0][c] + class_bytes_[1][c];
  if (of_class > peak_.by_class[c]) peak_.by_class[c] = of_class;
  if (!plan_) view.data = base_ + offset;
  return view;
}

void Arena::Rewind(ArenaEnd end, int64_t position, const int64_t (&by_class)[kMemoryClasses]) {
  int64_t& now = end == ArenaEnd::kBottom ? state_.bottom : state_.top;
  CHECK(position <= now);
  now = position;
  std::memcpy(class_bytes_[static_cast<int>(end)], by_class, sizeof(by_class));
}

ArenaScope::ArenaScope(Arena* arena, ArenaEnd end)
    : arena_(arena),
      end_(end),
      position_(end == ArenaEnd::kBottom ? arena->state_.bottom : arena->state_.top) {
  std::memcpy(by_class_, arena->class_bytes_[static_cast<int>(end)], sizeof(by_class_));
}

ArenaScope::~ArenaScope() {
  arena_->Rewind(end_, position_, by_class_);
}

}  // namespace attune
