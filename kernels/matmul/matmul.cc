#include "kernels/matmul/matmul.h"

#include <string>

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(MatMul);
int64_t MatMulWorkspaceBytesCpu(const Exec& exec, const MatMulArgs& a);

// One fixed pool: on CUDA an algorithm that wants more is not taken.
int64_t MatMulWorkspaceBytesCuda(const Exec& exec, const MatMulArgs& a) {
  return int64_t{32} << 20;
}

namespace {

void CheckArgs(const MatMulArgs& a) {
  const bool f8 = a.a.dtype == DType::kF8E4M3;
  CHECK(IsFloat(a.a.dtype) || f8);
  const int64_t m = a.d.dim(0), n = a.d.dim(1), k = a.a.dim(a.trans_a ? 0 : 1);
  CheckMatrix(a.a, a.a.dtype, a.trans_a ? k : m, a.trans_a ? m : k);
  CheckMatrix(a.b, a.a.dtype, a.trans_b ? n : k, a.trans_b ? k : n);
  CheckMatrix(a.d, a.d.dtype, m, n);
  if (f8) {
    CHECK(!a.trans_a && a.trans_b && (a.d.dtype == DType::kBF16 || a.d.dtype == DType::kF32));
    CheckVector(a.a_scale, DType::kF32, m);
    CheckVector(a.b_scale, DType::kF32, n);
  } else {
    CHECK(a.d.dtype == a.a.dtype || (a.a.dtype == DType::kBF16 && a.d.dtype == DType::kF32));
  }
  CHECK(a.beta == 0.0 || a.beta == 1.0);
}

}  // namespace

int64_t MatMulWorkspaceBytes(const Exec& exec, const MatMulArgs& args) {
  CheckArgs(args);
  if (exec.device == DeviceKind::kCpu) return MatMulWorkspaceBytesCpu(exec, args);
  return MatMulWorkspaceBytesCuda(exec, args);
}

void MatMul(const Exec& exec, const MatMulArgs& args) {
  CheckWorkspace(args.workspace, MatMulWorkspaceBytes(exec, args));
  if (exec.trace != nullptr) {
    exec.trace->Annotate(std::to_string(args.d.dim(0)) + " x " + std::to_string(args.d.dim(1)) +
                         " x " + std::to_string(args.a.dim(args.trans_a ? 0 : 1)) +
                         (args.trans_a ? " T" : " N") + (args.trans_b ? "T" : "N") +
                         (args.a.dtype == DType::kF8E4M3 ? " f8" : ""));
  }
  ATTUNE_RUN(MatMul, exec, args);
}

}  // namespace attune
