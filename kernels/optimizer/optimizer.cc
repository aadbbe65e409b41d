#include "kernels/optimizer/optimizer.h"

#include "kernels/core/dispatch.h"
#include "kernels/optimizer/pieces.h"

namespace attune {

ATTUNE_BACKENDS(AdamW);
ATTUNE_BACKENDS(AdamW8bit);
ATTUNE_BACKENDS(Lion);
ATTUNE_BACKENDS(Adafactor);
ATTUNE_BACKENDS(GradNorm);
ATTUNE_BACKENDS(ClipScale);
int64_t GradNormWorkspaceBytesCpu(const Exec& exec, const GradNormArgs& a);

namespace {

bool IsSingleOrDouble(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF64;
}

void CheckScalar(const TensorView& x) {
  CHECK(x.rank == 1 && x.dim(0) == 1 && IsSingleOrDouble(x.dtype));
}

}  // namespace

void AdamW(const Exec& exec, const AdamWArgs& args) {
  for (const AdamWTensor& t : args.tensors) {
    CHECK(IsSingleOrDouble(t.param.dtype));
    for (const TensorView* x : {&t.param, &t.grad, &t.m, &t.v}) {
      CHECK(x->dtype == t.param.dtype && x->SameShape(t.param) && x->contiguous());
    }
  }
  if (args.grad_scale.defined()) CheckScalar(args.grad_scale);
  CHECK(args.step >= 1);
  ATTUNE_RUN(AdamW, exec, args);
}

void AdamW8bit(const Exec& exec, const AdamW8bitArgs& args) {
  for (const AdamW8bitTensor& t : args.tensors) {
    const int64_t size = t.param.size(), blocks = AdamW8bitBlocks(size);
    CHECK(t.param.dtype == DType::kF32 && t.param.contiguous());
    CHECK(t.grad.dtype == DType::kF32 && t.grad.SameShape(t.param) && t.grad.contiguous());
    for (const TensorView* x : {&t.m, &t.v}) CheckVector(*x, DType::kU8, size);
    for (const TensorView* x : {&t.m_absmax, &t.v_absmax}) CheckVector(*x, DType::kF32, blocks);
  }
  if (args.grad_scale.defined()) CheckScalar(args.grad_scale);
  CHECK(args.step >= 1);
  ATTUNE_RUN(AdamW8bit, exec, args);
}

void Lion(const Exec& exec, const LionArgs& args) {
  for (const LionTensor& t : args.tensors) {
    CHECK(IsSingleOrDouble(t.param.dtype));
    for (const TensorView* x : {&t.param, &t.grad, &t.m}) {
      CHECK(x->dtype == t.param.dtype && x->SameShape(t.param) && x->contiguous());
    }
  }
  if (args.grad_scale.defined()) CheckScalar(args.grad_scale);
  ATTUNE_RUN(Lion, exec, args);
}

int64_t AdafactorWorkspaceBytes(const Exec& exec, const AdafactorArgs& args) {
  if (exec.device == DeviceKind::kCpu) return 0;
  int64_t sums = 0;
  for (const AdafactorTensor& t : args.tensors) sums += AdafactorTiles::Of(t.param).sums();
  return sums * static_cast<int64_t>(sizeof(double));
}

void Adafactor(const Exec& exec, const AdafactorArgs& args) {
  for (const AdafactorTensor& t : args.tensors) {
    const DType dtype = t.param.dtype;
    CHECK(IsSingleOrDouble(dtype) && (t.param.rank == 1 || t.param.rank == 2));
    CHECK(t.grad.dtype == dtype && t.grad.SameShape(t.param));
    CHECK(t.param.contiguous() && t.grad.contiguous());
    CheckVector(t.v_row, dtype, t.param.dim(0));
    if (t.param.rank == 2) CheckVector(t.v_column, dtype, t.param.dim(1));
    if (args.beta1 > 0) CheckVector(t.m, dtype, t.param.size());
  }
  if (args.grad_scale.defined()) CheckScalar(args.grad_scale);
  CHECK(args.step >= 1 && args.clip_threshold > 0);
  CheckWorkspace(args.workspace, AdafactorWorkspaceBytes(exec, args));
  ATTUNE_RUN(Adafactor, exec, args);
}

int64_t GradNormWorkspaceBytes(const Exec& exec, const GradNormArgs& args) {
  for (const TensorView& grad : args.grads) {
    CHECK(IsSingleOrDouble(grad.dtype) && grad.contiguous());
  }
  if (exec.device == DeviceKind::kCpu) return GradNormWorkspaceBytesCpu(exec, args);
  // A partial sum per piece of kCudaPiece elements.
  int64_t pieces = 0;
  for (const TensorView& grad : args.grads) pieces += (grad.size() + kCudaPiece - 1) / kCudaPiece;
  return pieces * static_cast<int64_t>(sizeof(double));
}

void GradNorm(const Exec& exec, const GradNormArgs& args) {
  CheckWorkspace(args.workspace, GradNormWorkspaceBytes(exec, args));
  CheckVector(args.norm_sq, DType::kF64, 1);
  ATTUNE_RUN(GradNorm, exec, args);
}

void ClipScale(const Exec& exec, const ClipScaleArgs& args) {
  CheckVector(args.norm_sq, DType::kF64, 1);
  CheckScalar(args.scale);
  CheckScalar(args.norm);
  CHECK(args.max_norm >= 0.0);
  ATTUNE_RUN(ClipScale, exec, args);
}

}  // namespace attune
