// Arena: the one allocation of a trainer on its device.
//
// Two stacks grow towards each other inside it:
//   bottom  what lives long: weights, adapters, optimiser state, then activations saved for
//           backward, released in the reverse order of their allocation
//   top     scratch of the op or layer that runs
// so nothing fragments, and the peak is max(bottom + top) over time. On the plan device
// (ArenaMode::kPlan) the same calls only count; the real arena is then allocated with exactly
// the planned peak, and an allocation beyond it is a programmer error. Every block starts at a
// multiple of kAlignment.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
#include "worker/memory/device.h"

namespace attune {

enum class MemoryClass : uint8_t { kWeights, kAdapter, kOptimizer, kActivations, kWorkspace };
constexpr int kMemoryClasses = 5;

enum class ArenaEnd : uint8_t { kBottom, kTop };

// Peaks in bytes. By class each class's own peak; `total` is that of their sum.
struct ArenaPeak {
  int64_t by_class[kMemoryClasses] = {};
  int64_t total = 0;
  std::string phase;  // in which `total` was reached first
};

class Arena {
 public:
  static constexpr int64_t kAlignment = 256;

  // An arena without memory: allocations return views with null data and are counted.
  static Arena Plan();
  // One allocation on the device. RESOURCE_EXHAUSTED with the sizes if it is not to be had.
  static absl::StatusOr<Arena> Allocate(DeviceKind device, int64_t bytes);

  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;
  ~Arena();

  // A contiguous, uninitialised view. It is valid until the stack is rewound below it.
  TensorView New(ArenaEnd end, MemoryClass memory_class, DType dtype,
                 std::initializer_list<int64_t> shape);
  TensorView NewBytes(ArenaEnd end, MemoryClass memory_class, int64_t bytes) {
    return New(end, memory_class, DType::kU8, {bytes});
  }
  TensorView NewScratch(DType dtype, std::initializer_list<int64_t> shape) {
    return New(ArenaEnd::kTop, MemoryClass::kWorkspace, dtype, shape);
  }

  // Names what follows in ArenaPeak: "load", "train", "evaluate", "generate".
  void BeginPhase(std::string phase) { phase_ = std::move(phase); }
  const ArenaPeak& peak() const { return peak_; }
  bool plan() const { return plan_; }
  int64_t capacity() const { return capacity_; }
  TensorView memory() const { return TensorView(base_, DType::kU8, {capacity_}); }

 private:
  friend class ArenaScope;
  struct State {
    int64_t bottom = 0;
    int64_t top = 0;
  };

  static absl::StatusOr<Arena> AllocateCuda(int64_t bytes);
  Arena(bool plan, DeviceKind device, char* base, int64_t capacity)
      : plan_(plan), device_(device), base_(base), capacity_(capacity) {}
  void Rewind(ArenaEnd end, int64_t position, const int64_t (&by_class)[kMemoryClasses]);

  bool plan_;
  DeviceKind device_;
  char* base_;
  int64_t capacity_;
  State state_;
  // Bytes per class in each stack, so that rewinding one leaves the other's counts alone.
  int64_t class_bytes_[2][kMemoryClasses] = {};
  std::string phase_ = "load";
  ArenaPeak peak_;
};

// Rewinds one stack of the arena to where it was, at the end of the scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena* arena, ArenaEnd end = ArenaEnd::kTop);
  ~ArenaScope();
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena* arena_;
  ArenaEnd end_;
  int64_t position_;
  int64_t by_class_[kMemoryClasses];
};

}  // namespace attune
