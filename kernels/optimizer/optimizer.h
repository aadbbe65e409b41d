// Optimisers and gradient clipping over lists of tensors. Lists are host arrays of views; the
// numbers are device data. Sums are in a fixed order. Cost: one pass over parameters, gradients and
// state; the norm one pass over the gradients.
#pragma once

#include <span>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

// The arithmetic of torch.optim.AdamW (decoupled weight decay, not fused, no amsgrad), in the
// dtype of the tensors:
//   g = grad * grad_scale
//   param *= 1 - lr * weight_decay
//   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
//   param -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
// Scalars are formed in f64 and rounded once.
struct AdamWTensor {
  TensorView param;  // any shape, contiguous, f32 (or f64)  in and out
  TensorView grad;   // same shape and dtype
  TensorView m;      // same; first moment, starts at 0      in and out
  TensorView v;      // same; second moment, starts at 0     in and out
  // Of its parameter group: torch's weight_decay, 0 for none.
  double weight_decay = 0.0;
  double lr_scale = 1.0;  // of its parameter group: its learning rate is lr * lr_scale
};
struct AdamWArgs {
  std::span<const AdamWTensor> tensors;
  TensorView grad_scale;  // (1)  optional, f32 or f64: ClipScale's `scale`
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  int64_t step = 1;  // of this update; the first is 1
};
void AdamW(const Exec& exec, const AdamWArgs& args);

// AdamW with block-wise dynamic 8-bit states (Dettmers et al., 2022), as bitsandbytes' AdamW8bit:
// m and v are codes of the dynamic map (m signed, v unsigned; kernels/core/dynamic_map.h) times the
// absolute maximum of their block of 256 elements. A step expands a block, does AdamW on it, and
// quantises it again to the nearest codes. A block's maximum of 0 stands for zeros.
// Unlike bitsandbytes' default, small tensors have 8-bit states too.
constexpr int64_t kAdamW8bitBlock = 256;
inline int64_t AdamW8bitBlocks(int64_t elements) {
  return (elements + kAdamW8bitBlock - 1) / kAdamW8bitBlock;
}
struct AdamW8bitTensor {
  TensorView param;     // any shape, contiguous, f32          in and out
  TensorView grad;      // same shape, f32
  TensorView m, v;      // (elements) u8 codes                  in and out
  TensorView m_absmax;  // (AdamW8bitBlocks) f32; starts at 0   in and out
  TensorView v_absmax;  // same
  double weight_decay = 0.0;
  double lr_scale = 1.0;
};
struct AdamW8bitArgs {
  std::span<const AdamW8bitTensor> tensors;
  TensorView grad_scale;  // as in AdamW
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  int64_t step = 1;
};
void AdamW8bit(const Exec& exec, const AdamW8bitArgs& args);

// Lion (Chen et al., 2023), with decoupled weight decay:
//   g = grad * grad_scale
//   param *= 1 - lr * weight_decay
//   param -= lr * sign(beta1 * m + (1 - beta1) * g);  m = beta2 * m + (1 - beta2) * g
struct LionTensor {
  TensorView param;  // any shape, contiguous, f32 (or f64)  in and out
  TensorView grad;   // same shape and dtype
  TensorView m;      // same; starts at 0                    in and out
  double weight_decay = 0.0;
  double lr_scale = 1.0;
};
struct LionArgs {
  std::span<const LionTensor> tensors;
  TensorView grad_scale;  // as in AdamW
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.99;
};
void Lion(const Exec& exec, const LionArgs& args);

// Adafactor (Shazeer and Stern, 2018), as transformers' with relative_step off. For a matrix (R,
// C):
//   g = grad * grad_scale;  b = 1 - step^-decay_rate
//   v_row = b * v_row + (1 - b) * mean over columns of (g^2 + eps);  v_column alike, over rows
//   u = g / sqrt(v_row / mean(v_row)) / sqrt(v_column)
// for a vector v_row holds v of each element and u = g / sqrt(v). Then
//   lr' = lr * max(1e-3, RMS(param)) with scale_parameter, else lr
//   u *= lr' / max(1, RMS(u) / clip_threshold);  m = beta1 * m + (1 - beta1) * u, taken for u
//   param = param * (1 - weight_decay * lr') - u
// Sums are in f64.
struct AdafactorTensor {
  TensorView param;     // (R, C) or (N), contiguous, f32 (or f64)  in and out
  TensorView grad;      // same shape and dtype
  TensorView v_row;     // (R) or (N); starts at 0                   in and out
  TensorView v_column;  // (C), of a matrix; starts at 0             in and out
  TensorView m;         // (elements) with beta1 > 0; starts at 0    in and out
  double weight_decay = 0.0;
  double lr_scale = 1.0;
};
struct AdafactorArgs {
  std::span<const AdafactorTensor> tensors;
  TensorView grad_scale;  // as in AdamW
  double lr = 0.0;
  double beta1 = 0.0;  // 0: no first moment
  double eps = 1e-30;
  double clip_threshold = 1.0;
  double decay_rate = 0.8;
  bool scale_parameter = false;
  int64_t step = 1;
  TensorView workspace;  // (>= AdafactorWorkspaceBytes) u8
};
int64_t AdafactorWorkspaceBytes(const Exec& exec, const AdafactorArgs& args);
void Adafactor(const Exec& exec, const AdafactorArgs& args);

// norm_sq = sum over all tensors of the sum of squares. NaN and inf come through.
struct GradNormArgs {
  std::span<const TensorView> grads;  // any shapes, contiguous, f32 or f64
  TensorView norm_sq;                 // (1)  out, f64
  TensorView workspace;               // (>= GradNormWorkspaceBytes) u8
};
int64_t GradNormWorkspaceBytes(const Exec& exec, const GradNormArgs& args);
void GradNorm(const Exec& exec, const GradNormArgs& args);

// As torch.nn.utils.clip_grad_norm_: norm = sqrt(norm_sq), scale = min(1, max_norm / (norm +
// 1e-6)); scale = 1 if max_norm == 0. NaN in norm_sq makes both NaN; inf makes scale 0.
struct ClipScaleArgs {
  TensorView norm_sq;  // (1)  f64
  TensorView scale;    // (1)  out, f32 or f64
  TensorView norm;     // (1)  out, f32 or f64
  double max_norm = 0.0;
};
void ClipScale(const Exec& exec, const ClipScaleArgs& args);

}  // namespace attune
