#include <algorithm>
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/dynamic_map.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/optimizer/optimizer.h"

namespace attune {
namespace {

constexpr int64_t kPiece = 16384;  // elements that one thread takes at a time

int64_t Pieces(const TensorView& x) {
  return (x.size() + kPiece - 1) / kPiece;
}

double ReadScalar(const TensorView& x) {
  return x.dtype == DType::kF64 ? *x.As<double>() : static_cast<double>(*x.As<float>());
}
void WriteScalar(const TensorView& x, double value) {
  if (x.dtype == DType::kF64) {
    *x.As<double>() = value;
  } else {
    *x.As<float>() = static_cast<float>(value);
  }
}

template <typename A>
struct Coefficients {
  A grad_scale, decay, one_minus_beta1, beta1, beta2, one_minus_beta2, sqrt_correction2, eps;
  A minus_step_size;
  bool lerp_from_end;  // torch's lerp starts at the nearer end
};

template <typename A, typename Args, typename TensorArgs>
Coefficients<A> CoefficientsOf(const Args& a, const TensorArgs& t) {
  const double lr = a.lr * t.lr_scale;
  const double correction1 = 1.0 - std::pow(a.beta1, static_cast<double>(a.step));
  const double correction2 = 1.0 - std::pow(a.beta2, static_cast<double>(a.step));
  Coefficients<A> c;
  c.grad_scale = static_cast<A>(a.grad_scale.defined() ? ReadScalar(a.grad_scale) : 1.0);
  c.decay = static_cast<A>(1.0 - lr * t.weight_decay);
  c.one_minus_beta1 = static_cast<A>(1.0 - a.beta1);
  c.beta1 = A(1) - c.one_minus_beta1;
  c.beta2 = static_cast<A>(a.beta2);
  c.one_minus_beta2 = static_cast<A>(1.0 - a.beta2);
  c.sqrt_correction2 = static_cast<A>(std::sqrt(correction2));
  c.eps = static_cast<A>(a.eps);
  c.minus_step_size = static_cast<A>(-(lr / correction1));
  c.lerp_from_end = c.one_minus_beta1 >= A(0.5);
  return c;
}

template <typename A>
ATTUNE_CLONES void UpdateRun(const Coefficients<A>& c, A* param, const A* grad, A* m, A* v,
                             int64_t n) {
  const A grad_scale = c.grad_scale, decay = c.decay, one_minus_beta1 = c.one_minus_beta1,
          beta1 = c.beta1, beta2 = c.beta2, one_minus_beta2 = c.one_minus_beta2,
          sqrt_correction2 = c.sqrt_correction2, eps = c.eps, minus_step_size = c.minus_step_size;
  const bool lerp_from_end = c.lerp_from_end;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A g = grad[i] * grad_scale;
    const A difference = g - m[i];
    const A m_new = lerp_from_end ? g - difference * beta1 : m[i] + one_minus_beta1 * difference;
    const A v_new = v[i] * beta2 + one_minus_beta2 * g * g;
    const A denominator = std::sqrt(v_new) / sqrt_correction2 + eps;
    m[i] = m_new;
    v[i] = v_new;
    param[i] = param[i] * decay + minus_step_size * m_new / denominator;
  }
}

template <typename A>
void Update(const AdamWArgs& a, const AdamWTensor& t) {
  const Coefficients<A> c = CoefficientsOf<A>(a, t);
  const int64_t size = t.param.size(), pieces = Pieces(t.param);
#pragma omp parallel for schedule(static) if (WorthThreads(size))
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * kPiece;
    UpdateRun(c, t.param.As<A>() + begin, t.grad.As<A>() + begin, t.m.As<A>() + begin,
              t.v.As<A>() + begin, std::min(kPiece, size - begin));
  }
}

void ExpandBlock(const float* map, const uint8_t* codes, float absmax, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = map[codes[i]] * absmax;
}

// Returns the block's absolute maximum.
float QuantizeBlock(const float* map, const float* x, uint8_t* codes, int64_t n) {
  float absmax = 0.0f;
  for (int64_t i = 0; i < n; ++i) absmax = std::max(absmax, std::abs(x[i]));
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = NearestDynamicCode(map, absmax > 0.0f ? x[i] / absmax : 0.0f);
  }
  return absmax;
}

void Update8bit(const AdamW8bitArgs& a, const AdamW8bitTensor& t) {
  const Coefficients<float> c = CoefficientsOf<float>(a, t);
  const float* const m_map = DynamicMap(/*is_signed=*/true);
  const float* const v_map = DynamicMap(/*is_signed=*/false);
  const int64_t size = t.param.size(), blocks = AdamW8bitBlocks(size);
#pragma omp parallel for schedule(static) if (WorthThreads(size))
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kAdamW8bitBlock, n = std::min(kAdamW8bitBlock, size - begin);
    uint8_t *const m_codes = t.m.As<uint8_t>() + begin, *const v_codes = t.v.As<uint8_t>() + begin;
    float *const m_absmax = t.m_absmax.As<float>() + block, *const v_absmax =
                                                                t.v_absmax.As<float>() + block;
    float m[kAdamW8bitBlock], v[kAdamW8bitBlock];
    ExpandBlock(m_map, m_codes, *m_absmax, m, n);
    ExpandBlock(v_map, v_codes, *v_absmax, v, n);
    UpdateRun(c, t.param.As<float>() + begin, t.grad.As<float>() + begin, m, v, n);
    *m_absmax = QuantizeBlock(m_map, m, m_codes, n);
    *v_absmax = QuantizeBlock(v_map, v, v_codes, n);
  }
}

template <typename A>
void UpdateLion(const LionArgs& a, const LionTensor& t) {
  const double learning_rate = a.lr * t.lr_scale;
  const A scale = static_cast<A>(a.grad_scale.defined() ? ReadScalar(a.grad_scale) : 1.0);
  const A decay = static_cast<A>(1.0 - learning_rate * t.weight_decay);
  const A lr = static_cast<A>(learning_rate);
  const A beta1 = static_cast<A>(a.beta1), one_minus_beta1 = static_cast<A>(1.0 - a.beta1);
  const A beta2 = static_cast<A>(a.beta2), one_minus_beta2 = static_cast<A>(1.0 - a.beta2);
  A *const param = t.param.As<A>(), *const m = t.m.As<A>();
  const A* const grad = t.grad.As<A>();
  const int64_t size = t.param.size();
#pragma omp parallel for simd schedule(static) if (WorthThreads(size))
  for (int64_t i = 0; i < size; ++i) {
    const A g = grad[i] * scale;
    const A direction = m[i] * beta1 + one_minus_beta1 * g;
    // 0 stays where it is, and NaN gets through.
    const A sign = direction > A(0) ? A(1) : direction < A(0) ? A(-1) : direction;
    param[i] = param[i] * decay - lr * sign;
    m[i] = m[i] * beta2 + one_minus_beta2 * g;
  }
}

// In f64: the square of an f32 does not overflow.
template <typename A>
ATTUNE_CLONES double SumOfSquares(const A* x, int64_t n) {
  LaneSum<double> sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const double value = static_cast<double>(x[i + l]);
      sum.lane[l] += value * value;
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const double value = static_cast<double>(x[i + l]);
    sum.lane[l] += value * value;
  }
  return sum.Total();
}

template <typename A>
void PartialSums(const TensorView& grad, double* partial) {
  const int64_t size = grad.size(), pieces = Pieces(grad);
#pragma omp parallel for schedule(static) if (WorthThreads(size))
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * kPiece;
    partial[piece] = SumOfSquares(grad.As<A>() + begin, std::min(kPiece, size - begin));
  }
}

}  // namespace

void AdamWCpu(const Exec& exec, const AdamWArgs& a) {
  for (const AdamWTensor& t : a.tensors) {
    if (t.param.dtype == DType::kF64) {
      Update<double>(a, t);
    } else {
      Update<float>(a, t);
    }
  }
}

void AdamW8bitCpu(const Exec& exec, const AdamW8bitArgs& a) {
  for (const AdamW8bitTensor& t : a.tensors) Update8bit(a, t);
}

void LionCpu(const Exec& exec, const LionArgs& a) {
  for (const LionTensor& t : a.tensors) {
    if (t.param.dtype == DType::kF64) {
      UpdateLion<double>(a, t);
    } else {
      UpdateLion<float>(a, t);
    }
  }
}

int64_t GradNormWorkspaceBytesCpu(const Exec& exec, const GradNormArgs& a) {
  int64_t pieces = 0;
  for (const TensorView& grad : a.grads) pieces = std::max(pieces, Pieces(grad));
  return pieces * static_cast<int64_t>(sizeof(double));
}

void GradNormCpu(const Exec& exec, const GradNormArgs& a) {
  double sum = 0.0;
  double* partial = static_cast<double*>(a.workspace.data);
  for (const TensorView& grad : a.grads) {
    if (grad.dtype == DType::kF64) {
      PartialSums<double>(grad, partial);
    } else {
      PartialSums<float>(grad, partial);
    }
    for (int64_t piece = 0; piece < Pieces(grad); ++piece) sum += partial[piece];
  }
  *a.norm_sq.As<double>() = sum;
}

void ClipScaleCpu(const Exec& exec, const ClipScaleArgs& a) {
  const double norm = std::sqrt(*a.norm_sq.As<double>());
  double scale = 1.0;
  if (a.max_norm > 0.0) {
    const double ratio = a.max_norm / (norm + 1e-6);
    scale = ratio > 1.0 ? 1.0 : ratio;  // NaN stays
  } else if (std::isnan(norm)) {
    scale = norm;
  }
  WriteScalar(a.norm, norm);
  WriteScalar(a.scale, scale);
}

}  // namespace attune
