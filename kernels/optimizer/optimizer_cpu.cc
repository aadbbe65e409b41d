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

// One matrix or vector of Adafactor. A vector is a column: each row is an element.
template <typename A>
class AdafactorUpdate {
 public:
  AdafactorUpdate(const AdafactorArgs& args, const AdafactorTensor& t)
      : a_(args),
        t_(t),
        rows_(t.param.dim(0)),
        columns_(t.param.rank == 2 ? t.param.dim(1) : 1),
        factored_(t.param.rank == 2),
        grad_scale_(static_cast<A>(args.grad_scale.defined() ? ReadScalar(args.grad_scale) : 1.0)) {
    const double beta2 = 1.0 - std::pow(static_cast<double>(args.step), -args.decay_rate);
    beta2_ = static_cast<A>(beta2);
    one_minus_beta2_ = static_cast<A>(1.0 - beta2);
  }

  void Run() {
    double lr = a_.lr * t_.lr_scale;
    if (a_.scale_parameter) {
      lr *= std::max(1e-3, static_cast<double>(Rms([&](int64_t row, double* sum) {
                       const A* x = t_.param.As<A>() + row * columns_;
                       for (int64_t c = 0; c < columns_; ++c) *sum += Square(x[c]);
                     })));
    }
    MeanOfRows();
    if (factored_) MeanOfColumns();
    mean_row_ = factored_ ? MeanRow() : A(1);
    const A rms = Rms([&](int64_t row, double* sum) {
      const A factor = RowFactor(row);
      for (int64_t c = 0; c < columns_; ++c) *sum += Square(Direction(row, c, factor));
    });
    const A clip = std::max(A(1), rms / static_cast<A>(a_.clip_threshold));
    const A step = static_cast<A>(lr), beta1 = static_cast<A>(a_.beta1);
    const A decay = static_cast<A>(-t_.weight_decay * lr);
    const A one_minus_beta1 = static_cast<A>(1.0 - a_.beta1);
    A* const m = a_.beta1 > 0 ? t_.m.As<A>() : nullptr;
#pragma omp parallel for schedule(static) if (WorthThreads(rows_ * columns_))
    for (int64_t row = 0; row < rows_; ++row) {
      const A factor = RowFactor(row);
      for (int64_t c = 0; c < columns_; ++c) {
        const int64_t i = row * columns_ + c;
        A u = Direction(row, c, factor) / clip * step;
        if (m != nullptr) u = m[i] = m[i] * beta1 + one_minus_beta1 * u;
        A* const param = t_.param.As<A>() + i;
        *param = (*param + decay * *param) - u;
      }
    }
  }

 private:
  static double Square(A x) {
    return static_cast<double>(x) * static_cast<double>(x);
  }

  A SquaredGradient(int64_t i) const {
    const A g = t_.grad.As<A>()[i] * grad_scale_;
    return g * g + static_cast<A>(a_.eps);
  }

  A Average(A before, double sum, int64_t n) const {
    return before * beta2_ + one_minus_beta2_ * static_cast<A>(sum / static_cast<double>(n));
  }

  void MeanOfRows() {
    A* const v_row = t_.v_row.As<A>();
#pragma omp parallel for schedule(static) if (WorthThreads(rows_ * columns_))
    for (int64_t row = 0; row < rows_; ++row) {
      double sum = 0;
      for (int64_t c = 0; c < columns_; ++c) sum += SquaredGradient(row * columns_ + c);
      v_row[row] = Average(v_row[row], sum, columns_);
    }
  }

  // Threads share the columns.
  void MeanOfColumns() {
    constexpr int64_t kColumns = 64;
    A* const v_column = t_.v_column.As<A>();
#pragma omp parallel for schedule(static) if (WorthThreads(rows_ * columns_))
    for (int64_t begin = 0; begin < columns_; begin += kColumns) {
      const int64_t n = std::min(kColumns, columns_ - begin);
      double sum[kColumns] = {};
      for (int64_t row = 0; row < rows_; ++row) {
        for (int64_t c = 0; c < n; ++c) sum[c] += SquaredGradient(row * columns_ + begin + c);
      }
      for (int64_t c = 0; c < n; ++c) {
        v_column[begin + c] = Average(v_column[begin + c], sum[c], rows_);
      }
    }
  }

  A MeanRow() const {
    double sum = 0;
    for (int64_t row = 0; row < rows_; ++row) sum += t_.v_row.As<A>()[row];
    return static_cast<A>(sum / static_cast<double>(rows_));
  }

  A RowFactor(int64_t row) const {
    return A(1) / std::sqrt(t_.v_row.As<A>()[row] / mean_row_);
  }

  A Direction(int64_t row, int64_t c, A row_factor) const {
    const A g = t_.grad.As<A>()[row * columns_ + c] * grad_scale_;
    if (!factored_) return row_factor * g;
    return row_factor * (A(1) / std::sqrt(t_.v_column.As<A>()[c])) * g;
  }

  // The root mean square of what `add(row, &sum of squares)` goes through, over fixed runs of rows.
  template <typename F>
  A Rms(const F& add) const {
    constexpr int64_t kRuns = 64;
    double sum[kRuns] = {};
#pragma omp parallel for schedule(static) if (WorthThreads(rows_ * columns_))
    for (int64_t run = 0; run < kRuns; ++run) {
      for (int64_t row = rows_ * run / kRuns; row < rows_ * (run + 1) / kRuns; ++row) {
        add(row, &sum[run]);
      }
    }
    double all = 0;
    for (const double part : sum) all += part;
    return static_cast<A>(std::sqrt(all / static_cast<double>(rows_ * columns_)));
  }

  const AdafactorArgs& a_;
  const AdafactorTensor& t_;
  int64_t rows_, columns_;
  bool factored_;
  A grad_scale_, beta2_, one_minus_beta2_;
  A mean_row_ = 1;
};

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

void AdafactorCpu(const Exec& exec, const AdafactorArgs& a) {
  for (const AdafactorTensor& t : a.tensors) {
    if (t.param.dtype == DType::kF64) {
      AdafactorUpdate<double>(a, t).Run();
    } else {
      AdafactorUpdate<float>(a, t).Run();
    }
  }
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
