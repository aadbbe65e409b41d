// How op.cc reaches the backends of an op.
//
// Each op `void Op(const Exec&, const OpArgs&)` checks its Args, then runs OpCpu (op_cpu.cc) or
// OpCuda (op.cu). On the plan device it stops after the checks.
#pragma once

#include "kernels/core/check.h"
#include "kernels/core/exec.h"
#include "kernels/core/op_trace.h"
#include "kernels/core/tensor.h"

// Declares the backends of one op.
#define ATTUNE_BACKENDS(Op)                          \
  void Op##Cpu(const Exec& exec, const Op##Args& a); \
  void Op##Cuda(const Exec& exec, const Op##Args& a)

#ifdef ATTUNE_HAS_CUDA
#define ATTUNE_CALL_CUDA_(Op, exec, args) Op##Cuda(exec, args)
#else
#define ATTUNE_CALL_CUDA_(Op, exec, args) CHECK(false && #Op ": built without the CUDA backend")
#endif

// The last statement of an op, after its checks.
#define ATTUNE_RUN(Op, exec, args)           \
  do {                                       \
    if ((exec).plan) return;                 \
    const OpTraceScope trace(exec, #Op);     \
    if ((exec).device == DeviceKind::kCpu) { \
      Op##Cpu(exec, args);                   \
    } else {                                 \
      ATTUNE_CALL_CUDA_(Op, exec, args);     \
    }                                        \
  } while (false)

namespace attune {

inline bool IsFloat(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kBF16;
}

// The dtype in which an op on `dtype` sums and keeps statistics.
inline DType AccumulatorDType(DType dtype) {
  return dtype == DType::kF64 ? DType::kF64 : DType::kF32;
}

// The checks that nearly every op makes of each view. An extent of 1 or 0 has no stride to check.
inline void CheckMatrix(const TensorView& x, DType dtype, int64_t rows, int64_t columns) {
  CHECK(x.rank == 2 && x.dtype == dtype);
  CHECK(x.dim(0) == rows && x.dim(1) == columns);
  CHECK(x.dim(1) <= 1 || x.stride(1) == 1);
  CHECK(x.dim(0) <= 1 || x.stride(0) >= x.dim(1));
}
inline void CheckVector(const TensorView& x, DType dtype, int64_t size) {
  CHECK(x.rank == 1 && x.dtype == dtype && x.dim(0) == size);
  CHECK(x.dim(0) <= 1 || x.stride(0) == 1);
}
inline void CheckWorkspace(const TensorView& workspace, int64_t bytes) {
  CHECK(bytes == 0 ||
        (workspace.defined() && workspace.contiguous() && workspace.bytes() >= bytes));
}

// True if the two views are the same memory with the same layout.
inline bool SameView(const TensorView& a, const TensorView& b) {
  return a.data != nullptr && a.data == b.data && a.stride(0) == b.stride(0);
}

}  // namespace attune
