#include "kernels/attention/attention.h"

#include <algorithm>

#include "kernels/core/dispatch.h"
#ifdef ATTUNE_HAS_CUDA
#include "kernels/attention/attention_cudnn.h"
#endif

namespace attune {

ATTUNE_BACKENDS(AttentionForward);
ATTUNE_BACKENDS(AttentionBackward);
int64_t AttentionForwardWorkspaceBytesCpu(const Exec& exec, const AttentionForwardArgs& a);
int64_t AttentionBackwardWorkspaceBytesCpu(const Exec& exec, const AttentionBackwardArgs& a);

namespace {

void CheckHeads(const TensorView& x, DType dtype, int64_t tokens, int64_t heads, int64_t d) {
  CHECK(x.rank == 3 && x.dtype == dtype);
  CHECK(x.dim(0) == tokens && x.dim(1) == heads && x.dim(2) == d);
  CHECK(d <= 1 || x.stride(2) == 1);
}

// What forward and backward share.
template <typename Args>
void CheckInputs(const Args& a) {
  CHECK(a.q.rank == 3 && a.k.rank == 3 && a.v.rank == 3 && IsFloat(a.q.dtype));
  const DType dtype = a.q.dtype;
  const int64_t tq = a.q.dim(0), hq = a.q.dim(1), dqk = a.q.dim(2);
  const int64_t tk = a.k.dim(0), hk = a.k.dim(1), dv = a.v.dim(2);
  CHECK(hk > 0 && hq % hk == 0 && dqk > 0 && dv > 0);
  CheckHeads(a.q, dtype, tq, hq, dqk);
  CheckHeads(a.k, dtype, tk, hk, dqk);
  CheckHeads(a.v, dtype, tk, hk, dv);
  CheckHeads(a.o, dtype, tq, hq, dv);
  CheckMatrix(a.lse, AccumulatorDType(dtype), tq, hq);
  CHECK(a.lse.contiguous());
  const AttentionSegments& s = a.segments;
  const int64_t capacity = s.k_begin.dim(0);
  CheckVector(s.num_segments, DType::kI32, 1);
  CheckVector(s.q_begin, DType::kI32, capacity + 1);
  CheckVector(s.k_begin, DType::kI32, capacity);
  CheckVector(s.k_length, DType::kI32, capacity);
  CheckVector(s.q_offset, DType::kI32, capacity);
  CHECK(a.options.window >= 0 && a.options.softcap >= 0.0);
}

void CheckArgs(const AttentionBackwardArgs& a) {
  CheckInputs(a);
  CheckHeads(a.d_o, a.q.dtype, a.o.dim(0), a.o.dim(1), a.o.dim(2));
  CheckHeads(a.dq, a.q.dtype, a.q.dim(0), a.q.dim(1), a.q.dim(2));
  CheckHeads(a.dk, a.q.dtype, a.k.dim(0), a.k.dim(1), a.k.dim(2));
  CheckHeads(a.dv, a.q.dtype, a.v.dim(0), a.v.dim(1), a.v.dim(2));
}

}  // namespace

int64_t AttentionForwardWorkspaceBytes(const Exec& exec, const AttentionForwardArgs& args) {
  CheckInputs(args);
  if (exec.device == DeviceKind::kCpu) return AttentionForwardWorkspaceBytesCpu(exec, args);
  constexpr int64_t kOwnBytes = 4;  // see attention_tiles.h
#ifdef ATTUNE_HAS_CUDA
  if (CudnnTakes(args)) return std::max(kOwnBytes, CudnnForwardWorkspaceBytes(args));
#endif
  return kOwnBytes;
}

void AttentionForward(const Exec& exec, const AttentionForwardArgs& args) {
  CheckWorkspace(args.workspace, AttentionForwardWorkspaceBytes(exec, args));
  ATTUNE_RUN(AttentionForward, exec, args);
}

int64_t AttentionBackwardWorkspaceBytes(const Exec& exec, const AttentionBackwardArgs& args) {
  CheckArgs(args);
  if (exec.device == DeviceKind::kCpu) return AttentionBackwardWorkspaceBytesCpu(exec, args);
  const int64_t own_bytes = args.lse.bytes() + 8;  // likewise
#ifdef ATTUNE_HAS_CUDA
  if (CudnnTakes(exec, args)) return std::max(own_bytes, CudnnBackwardWorkspaceBytes(args));
#endif
  return own_bytes;
}

void AttentionBackward(const Exec& exec, const AttentionBackwardArgs& args) {
  CheckWorkspace(args.workspace, AttentionBackwardWorkspaceBytes(exec, args));
  ATTUNE_RUN(AttentionBackward, exec, args);
}

}  // namespace attune
