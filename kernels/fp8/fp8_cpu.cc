#include <algorithm>
#include <cmath>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/fp8/fp8.h"

namespace attune {
namespace {

// f32 or bf16.
template <typename F>
void DispatchSource(DType dtype, F&& f) {
  if (dtype == DType::kF32) return f.template operator()<float>();
  f.template operator()<BFloat16>();
}

// Places in an extension of e columns: what is there of the adapter's column j.
struct Triple {
  int64_t first, second, third;
};
Triple PlacesOf(int64_t j, int64_t e) {
  return {j, e + j, 2 * e + j};
}

// v as the sum of two codes.
struct TwoCodes {
  Float8E4M3 high, low;
  explicit TwoCodes(float v) : high(v), low(v - static_cast<float>(high)) {}
};

void PutRowSide(float v, int64_t j, int64_t e, Float8E4M3* out) {
  const TwoCodes codes(v);
  const Triple at = PlacesOf(j, e);
  out[at.first] = codes.high;
  out[at.second] = codes.low;
  out[at.third] = codes.high;
}

void PutWeightSide(float v, int64_t j, int64_t e, Float8E4M3* out) {
  const TwoCodes codes(v);
  const Triple at = PlacesOf(j, e);
  out[at.first] = codes.high;
  out[at.second] = codes.high;
  out[at.third] = codes.low;
}

template <typename T>
float LargestOf(const T* x, int64_t n) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(static_cast<float>(x[i])));
  }
  return largest;
}

float ScaleOf(float largest) {
  return largest / Float8E4M3::kMax;
}
float InverseOf(float scale) {
  return scale >= kFp8LeastRowScale ? 1.0f / scale : 0.0f;
}

template <typename T>
void EncodeRow(const T* x, int64_t K, float scale, Float8E4M3* q) {
  const float inverse = InverseOf(scale);
  for (int64_t c = 0; c < K; ++c) q[c] = Float8E4M3(static_cast<float>(x[c]) * inverse);
}

// share: 1 / room.
template <typename T>
void EncodeAdapter(const T* s, int64_t e, float share, float scale, Float8E4M3* q) {
  const float inverse = InverseOf(scale);
  std::fill_n(q, Fp8Extension(e), Float8E4M3());
  for (int64_t j = 0; j < e; ++j) PutRowSide(static_cast<float>(s[j]) * share * inverse, j, e, q);
}

template <typename T>
void QuantizeRow(const T* x, int64_t K, int64_t e, float share, Float8E4M3* q, float* scale) {
  *scale = ScaleOf(std::max(LargestOf(x, K), LargestOf(x + K, e) * share));
  EncodeRow(x, K, *scale, q);
  EncodeAdapter(x + K, e, share, *scale, q + K);
}

template <typename T>
void QuantizeRowAdapter(const T* x, int64_t K, int64_t e, float share, Float8E4M3* q,
                        float* scale) {
  const float wanted = ScaleOf(LargestOf(x + K, e) * share);
  if (wanted > *scale) {
    *scale = wanted;
    EncodeRow(x, K, *scale, q);
  }
  EncodeAdapter(x + K, e, share, *scale, q + K);
}

// Calls f(x, K, e, share, q, scale) for each row.
template <typename T, typename Args, typename F>
void ForEachRow(const Args& a, const F& f) {
  const int64_t M = a.x.dim(0), columns = a.x.dim(1);
  const float share = a.e > 0 ? 1.0f / *a.room.template As<float>() : 0.0f;
#pragma omp parallel for schedule(static) if (WorthThreads(M * columns))
  for (int64_t m = 0; m < M; ++m) {
    f(a.x.template As<T>() + m * a.x.stride(0), columns - a.e, a.e, share,
      a.q.template As<Float8E4M3>() + m * a.q.stride(0), a.scale.template As<float>() + m);
  }
}

template <typename T>
float LargestOf(const TensorView& w) {
  float largest = 0.0f;
  const int64_t N = w.dim(0), K = w.dim(1);
#pragma omp parallel for schedule(static) reduction(max : largest) if (WorthThreads(N * K))
  for (int64_t n = 0; n < N; ++n) {
    largest = std::max(largest, LargestOf(w.As<T>() + n * w.stride(0), K));
  }
  return largest;
}

template <typename T>
void QuantizeWeight(const Fp8QuantizeWeightArgs& a) {
  const int64_t N = a.w.dim(0), K = a.w.dim(1);
  const float inverse = 1.0f / *a.scale.As<float>();
  const bool turned = a.transposed;
  const TensorView& out = a.q;
  const int64_t row_step = turned ? 1 : out.stride(0), column_step = turned ? out.stride(0) : 1;
#pragma omp parallel for schedule(static) if (WorthThreads(N * K))
  for (int64_t n = 0; n < N; ++n) {
    const T* row = a.w.As<T>() + n * a.w.stride(0);
    Float8E4M3* q = out.As<Float8E4M3>() + n * row_step;
    for (int64_t k = 0; k < K; ++k) {
      q[k * column_step] = Float8E4M3(static_cast<float>(row[k]) * inverse);
    }
  }
}

template <typename T>
void Extend(const Fp8ExtendArgs& a) {
  const int64_t r = a.parts[0].a.dim(0), K = a.parts[0].a.dim(1);
  const int64_t e = static_cast<int64_t>(a.parts.size()) * r;
  const float inverse = *a.room.As<float>() * (1.0f / *a.scale.As<float>());
  const float factor = static_cast<float>(a.factor);
  const bool turned = a.transposed;
  const TensorView& out = a.q;
  const auto row = [&](int64_t i) { return out.As<Float8E4M3>() + i * out.stride(0); };
  for (int64_t i = 0; i < out.dim(0); ++i) std::fill_n(row(i), out.dim(1), Float8E4M3());
  for (size_t i = 0; i < a.parts.size(); ++i) {
    const LoraExtendPart& part = a.parts[i];
    for (int64_t j = 0; j < r; ++j) {
      const int64_t column = static_cast<int64_t>(i) * r + j;
      for (int64_t n = 0; !turned && n < part.b.dim(0); ++n) {
        const float v = factor * static_cast<float>(part.b.As<T>()[n * r + j]);
        PutWeightSide(v * inverse, column, e, row(part.row_begin + n));
      }
      for (int64_t k = 0; turned && k < K; ++k) {
        const float v = static_cast<float>(part.a.As<T>()[j * K + k]);
        PutWeightSide(v * inverse, column, e, row(k));
      }
    }
  }
}

template <typename T>
void FindRoom(const Fp8AdapterRoomArgs& a) {
  float of_a = 0.0f, of_b = 0.0f;
  for (const LoraExtendPart& part : a.parts) {
    of_a = std::max(of_a, LargestOf<T>(part.a));
    of_b = std::max(of_b, LargestOf<T>(part.b));
  }
  const float scale = *a.scale.As<float>(), factor = std::fabs(static_cast<float>(a.factor));
  a.room.As<float>()[0] = Fp8RoomOf(factor * of_b, scale);
  a.room.As<float>()[1] = Fp8RoomOf(of_a, scale);
}

}  // namespace

void Fp8QuantizeCpu(const Exec& exec, const Fp8QuantizeArgs& a) {
  DispatchSource(a.x.dtype, [&]<typename T>() { ForEachRow<T>(a, QuantizeRow<T>); });
}

void Fp8QuantizeAdapterCpu(const Exec& exec, const Fp8QuantizeAdapterArgs& a) {
  DispatchSource(a.x.dtype, [&]<typename T>() { ForEachRow<T>(a, QuantizeRowAdapter<T>); });
}

void Fp8WeightScaleCpu(const Exec& exec, const Fp8WeightScaleArgs& a) {
  DispatchSource(a.w.dtype, [&]<typename T>() {
    const float scale = std::max(LargestOf<T>(a.w) / kFp8WeightRange, kFp8LeastScale);
    float* out = a.scale.As<float>();
    std::fill_n(out, a.scale.dim(0), std::max(out[0], scale));
  });
}

void Fp8QuantizeWeightCpu(const Exec& exec, const Fp8QuantizeWeightArgs& a) {
  DispatchSource(a.w.dtype, [&]<typename T>() { QuantizeWeight<T>(a); });
}

void Fp8AdapterRoomCpu(const Exec& exec, std::span<const Fp8AdapterRoomArgs> all) {
  for (const Fp8AdapterRoomArgs& a : all) {
    DispatchSource(a.parts[0].a.dtype, [&]<typename T>() { FindRoom<T>(a); });
  }
}

void Fp8ExtendCpu(const Exec& exec, const Fp8ExtendArgs& a) {
  DispatchSource(a.parts[0].a.dtype, [&]<typename T>() { Extend<T>(a); });
}

}  // namespace attune
