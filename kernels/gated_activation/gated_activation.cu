#include "kernels/core/cuda.cuh"
#include "kernels/gated_activation/gated_activation.h"

namespace attune {
namespace {

// act(x), and its derivative in *slope.
template <Activation kActivation>
__device__ float Activate(float x, float* slope) {
  if constexpr (kActivation == Activation::kSilu) {
    const float sigmoid = 1.0f / (1.0f + expf(-x));
    *slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
    return x * sigmoid;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr float kSqrt2OverPi = 0.79788456080286535588f, kCubic = 0.044715f;
    const float squared = x * x;
    const float t = tanhf(kSqrt2OverPi * (x + kCubic * squared * x));
    *slope = 0.5f * (1.0f + t) +
             0.5f * x * (1.0f - t * t) * kSqrt2OverPi * (1.0f + 3.0f * kCubic * squared);
    return 0.5f * x * (1.0f + t);
  } else {
    constexpr float kSqrtHalf = 0.70710678118654752440f, kInvSqrt2Pi = 0.39894228040143267794f;
    const float cdf = 0.5f * (1.0f + erff(x * kSqrtHalf));
    *slope = cdf + x * kInvSqrt2Pi * expf(-0.5f * x * x);
    return x * cdf;
  }
}

template <Activation kActivation, typename T, int N>
struct Forward {
  static constexpr int kPack = N;
  Rows<const T> gate, up;
  Rows<T> h;
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<T, N> g = Pack<T, N>::Load(gate(row, c)), u = Pack<T, N>::Load(up(row, c));
    Pack<T, N> out;
    for (int i = 0; i < N; ++i) {
      float slope;
      out.Set(i, Activate<kActivation>(g[i], &slope) * u[i]);
    }
    out.Store(h(row, c));
  }
};

template <Activation kActivation, typename T, int N>
struct Backward {
  static constexpr int kPack = N;
  Rows<const T> dh, gate, up;
  Rows<T> dgate, dup, h;  // h.data may be null
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<T, N> d = Pack<T, N>::Load(dh(row, c)), g = Pack<T, N>::Load(gate(row, c)),
                     u = Pack<T, N>::Load(up(row, c));
    Pack<T, N> dg, du, out;
    for (int i = 0; i < N; ++i) {
      float slope;
      const float act = Activate<kActivation>(g[i], &slope);
      dg.Set(i, d[i] * u[i] * slope);
      du.Set(i, d[i] * act);
      out.Set(i, act * u[i]);
    }
    dg.Store(dgate(row, c));
    du.Store(dup(row, c));
    if (h.data != nullptr) out.Store(h(row, c));
  }
};

// Calls f.operator()<activation, T, N>().
template <typename F>
void Dispatch(Activation activation, DType dtype, std::initializer_list<const TensorView*> views,
              F&& f) {
  DispatchCudaFloat(dtype, [&]<typename T>() {
    const auto sized = [&]<int N>() {
      switch (activation) {
        case Activation::kSilu:
          return f.template operator()<Activation::kSilu, T, N>();
        case Activation::kGeluTanh:
          return f.template operator()<Activation::kGeluTanh, T, N>();
        case Activation::kGeluErf:
          return f.template operator()<Activation::kGeluErf, T, N>();
      }
    };
    if (Packable(kPackSize<T>, views)) return sized.template operator()<kPackSize<T>>();
    sized.template operator()<1>();
  });
}

}  // namespace

void GatedActivationForwardCuda(const Exec& exec, const GatedActivationForwardArgs& a) {
  Dispatch(a.activation, a.gate.dtype, {&a.gate, &a.up, &a.h},
           [&]<Activation kActivation, typename T, int N>() {
             ForEachPack(Forward<kActivation, T, N>{RowsOf<const T>(a.gate), RowsOf<const T>(a.up),
                                                    RowsOf<T>(a.h)},
                         a.gate.dim(0), a.gate.dim(1), exec.stream);
           });
}

void GatedActivationBackwardCuda(const Exec& exec, const GatedActivationBackwardArgs& a) {
  Dispatch(a.activation, a.gate.dtype, {&a.dh, &a.gate, &a.up, &a.dgate, &a.dup, &a.h},
           [&]<Activation kActivation, typename T, int N>() {
             ForEachPack(Backward<kActivation, T, N>{RowsOf<const T>(a.dh), RowsOf<const T>(a.gate),
                                                     RowsOf<const T>(a.up), RowsOf<T>(a.dgate),
                                                     RowsOf<T>(a.dup), RowsOf<T>(a.h)},
                         a.gate.dim(0), a.gate.dim(1), exec.stream);
           });
}

}  // namespace attune
