// Scaffolding of the ops' tests: tensors with odd strides and poisoned outputs, comparison with a
// reference in double, central finite differences, and equality over OpenMP thread counts.
#pragma once

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune::op_testing {

// In which dtype the ops want statistics of values of `dtype`.
inline DType StatisticsOf(DType dtype) {
  return dtype == DType::kF64 ? DType::kF64 : DType::kF32;
}

inline double Get(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::kF64:
      return static_cast<const double*>(data)[i];
    case DType::kF32:
      return static_cast<const float*>(data)[i];
    case DType::kBF16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    case DType::kI64:
      return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    case DType::kI32:
      return static_cast<const int32_t*>(data)[i];
    case DType::kU8:
      return static_cast<const uint8_t*>(data)[i];
    case DType::kF8E4M3:
      return static_cast<float>(static_cast<const Float8E4M3*>(data)[i]);
    default:
      CHECK(false && "dtype without a test representation");
      return 0;
  }
}

inline void Put(DType dtype, void* data, int64_t i, double value) {
  switch (dtype) {
    case DType::kF64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::kF32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::kBF16:
      static_cast<BFloat16*>(data)[i] = BFloat16(static_cast<float>(value));
      break;
    case DType::kI64:
      static_cast<int64_t*>(data)[i] = static_cast<int64_t>(value);
      break;
    case DType::kI32:
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
      break;
    case DType::kU8:
      static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(value);
      break;
    case DType::kF8E4M3:
      static_cast<Float8E4M3*>(data)[i] = Float8E4M3(static_cast<float>(value));
      break;
    default:
      CHECK(false && "dtype without a test representation");
  }
}

// An owned tensor. Its rows (all dimensions but the first) may be `row_padding` elements apart;
// the padding holds a guard that ExpectGuardsIntact looks for. Starts as NaN (0xff for integers).
class Tensor {
 public:
  Tensor(DType dtype, std::initializer_list<int64_t> shape, int64_t row_padding = 0)
      : view_(nullptr, dtype, shape) {
    if (view_.rank >= 2) view_.strides[0] += row_padding;
    row_elements_ = view_.rank >= 2 ? view_.strides[0] - row_padding : 1;
    row_padding_ = view_.rank >= 2 ? row_padding : 0;
    extent_ = view_.rank >= 2 ? view_.dim(0) * view_.strides[0] : view_.size();
    bytes_.assign(static_cast<size_t>((extent_ + 8) * DTypeBytes(dtype)), 0xff);
    view_.data = bytes_.data();
  }
  Tensor(const Tensor& other) { *this = other; }
  Tensor& operator=(const Tensor& other) {
    bytes_ = other.bytes_;
    view_ = other.view_;
    extent_ = other.extent_;
    row_elements_ = other.row_elements_;
    row_padding_ = other.row_padding_;
    view_.data = bytes_.data();
    return *this;
  }

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }  // NOLINT: so that Args read well
  DType dtype() const { return view_.dtype; }
  int64_t size() const { return view_.size(); }
  int64_t dim(int i) const { return view_.dim(i); }

  // Element by its logical (row-major, unpadded) index.
  double operator[](int64_t i) const { return Get(dtype(), view_.data, Offset(i)); }
  void Set(int64_t i, double value) { Put(dtype(), view_.data, Offset(i), value); }
  std::vector<double> ToVector() const {
    std::vector<double> out(size());
    for (int64_t i = 0; i < size(); ++i) out[i] = (*this)[i];
    return out;
  }

  Tensor& Random(std::mt19937_64* rng, double deviation = 1.0) {
    std::normal_distribution<double> normal(0.0, deviation);
    for (int64_t i = 0; i < size(); ++i) Set(i, normal(*rng));
    return *this;
  }
  Tensor& Assign(const std::vector<double>& values) {
    CHECK(static_cast<int64_t>(values.size()) == size());
    for (int64_t i = 0; i < size(); ++i) Set(i, values[i]);
    return *this;
  }
  Tensor& Constant(double value) { return Assign(std::vector<double>(size(), value)); }
  Tensor& Poison() {
    std::fill(bytes_.begin(), bytes_.end(), 0xff);
    return *this;
  }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  // Nothing was written outside the view.
  void ExpectGuardsIntact() const {
    const int64_t width = DTypeBytes(dtype());
    const auto intact = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * width; i < end * width; ++i) {
        if (bytes_[i] != 0xff) return false;
      }
      return true;
    };
    EXPECT_TRUE(intact(extent_, extent_ + 8)) << "wrote past the end";
    for (int64_t r = 0; row_padding_ > 0 && r < view_.dim(0); ++r) {
      EXPECT_TRUE(intact(r * view_.strides[0] + row_elements_, (r + 1) * view_.strides[0]))
          << "wrote between rows, after row " << r;
    }
  }

 private:
  int64_t Offset(int64_t i) const {
    CHECK(0 <= i && i < size());
    if (row_padding_ == 0) return i;
    return i / row_elements_ * view_.strides[0] + i % row_elements_;
  }

  std::vector<uint8_t> bytes_;
  TensorView view_;
  int64_t extent_ = 0;  // elements, padding included
  int64_t row_elements_ = 1;
  int64_t row_padding_ = 0;
};

inline Tensor Ints(const std::vector<int32_t>& values) {
  Tensor out(DType::kI32, {static_cast<int64_t>(values.size())});
  for (size_t i = 0; i < values.size(); ++i) out.Set(static_cast<int64_t>(i), values[i]);
  return out;
}

inline Tensor Bytes(int64_t n) {
  return Tensor(DType::kU8, {n});
}

// max |got - want| / max(|want|, floor), 0 for empty; NaN and misplaced infinities count as
// infinite.
inline double RelativeError(const std::vector<double>& got, const std::vector<double>& want,
                            double floor = 0.0) {
  CHECK(got.size() == want.size());
  double scale = floor, worst = 0.0;
  for (double w : want) {
    if (std::isfinite(w)) scale = std::max(scale, std::abs(w));
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == want[i]) continue;
    const double error = std::abs(got[i] - want[i]);
    if (!std::isfinite(error)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, error);
  }
  return scale > 0.0 ? worst / scale : worst;
}

// The tolerance of one rounding to the dtype and sums of a few hundred terms.
inline double Tolerance(DType dtype) {
  return dtype == DType::kF64 ? 1e-12 : dtype == DType::kF32 ? 5e-6 : 8e-3;
}

inline void ExpectClose(const Tensor& got, const std::vector<double>& want, double tolerance,
                        const std::string& what, double floor = 0.0) {
  EXPECT_LE(RelativeError(got.ToVector(), want, floor), tolerance) << what;
  got.ExpectGuardsIntact();
}

// d f / d x by central differences, for a scalar f in double. f sees x with one element moved.
inline std::vector<double> FiniteDifferences(Tensor* x, const std::function<double()>& f,
                                             double step = 1e-5) {
  CHECK(x->dtype() == DType::kF64);
  std::vector<double> gradient(x->size());
  for (int64_t i = 0; i < x->size(); ++i) {
    const double value = (*x)[i];
    x->Set(i, value + step);
    const double up = f();
    x->Set(i, value - step);
    const double down = f();
    x->Set(i, value);
    gradient[i] = (up - down) / (2.0 * step);
  }
  return gradient;
}

// sum_i x_i w_i: makes a scalar of an output, with gradient w.
inline double Dot(const Tensor& x, const Tensor& w) {
  double sum = 0.0;
  for (int64_t i = 0; i < x.size(); ++i) sum += x[i] * w[i];
  return sum;
}

// Runs `f` with 1, 2 and 3 OpenMP threads; it returns the bytes to be the same each time.
inline void ExpectSameOnAnyThreadCount(const std::function<std::vector<uint8_t>()>& f) {
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  const std::vector<uint8_t> one = f();
  for (int n : {2, 3}) {
    omp_set_num_threads(n);
    EXPECT_TRUE(f() == one) << "differs on " << n << " threads";
  }
  omp_set_num_threads(threads);
}

inline Exec CpuExec() {
  return Exec{};
}
inline Exec PlanExec() {
  Exec exec;
  exec.plan = true;
  return exec;
}

// The view as the plan device has it.
inline TensorView Planned(TensorView view) {
  view.data = nullptr;
  return view;
}

inline const DType kFloatDTypes[] = {DType::kF64, DType::kF32, DType::kBF16};

}  // namespace attune::op_testing
