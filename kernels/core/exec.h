// Exec: on which device, and on which stream, an op runs.
//
// Every op is one function `void Op(const Exec&, const OpArgs&)`. On kPlan it checks shapes and
// returns; the code around it only counts allocations (worker/memory/arena.h).
#pragma once

#include <cstdint>

namespace attune {

enum class DeviceKind : uint8_t { kCpu, kCuda };

class OpTrace;

struct Exec {
  DeviceKind device = DeviceKind::kCpu;
  bool plan = false;       // nothing runs; `device` is the device that the plan is for
  void* stream = nullptr;  // cudaStream_t on kCuda, unused on kCpu
  // Same bits in every run on the same hardware and library versions, whatever it costs.
  bool deterministic = true;
  OpTrace* trace = nullptr;  // not null: told of every op (kernels/core/op_trace.h)
};

}  // namespace attune
