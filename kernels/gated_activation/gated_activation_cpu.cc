#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/gated_activation/gated_activation.h"

namespace attune {

ATTUNE_BACKENDS(Fp8Quantize);
TensorView GradientRows(const GatedActivationBackwardArgs& args);

namespace {

constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kCubic = 0.044715;

// act(x), and its derivative in *slope.
template <Activation kActivation, typename A>
ATTUNE_INLINE A Activate(A x, A* slope) {
  if constexpr (kActivation == Activation::kSilu) {
    const A sigmoid = A(1) / (A(1) + Exp(-x));
    *slope = sigmoid * (A(1) + x * (A(1) - sigmoid));
    return x * sigmoid;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const A squared = x * x;
    const A t = Tanh(A(kSqrt2OverPi) * (x + A(kCubic) * squared * x));
    *slope = A(0.5) * (A(1) + t) +
             A(0.5) * x * (A(1) - t * t) * A(kSqrt2OverPi) * (A(1) + A(3 * kCubic) * squared);
    return A(0.5) * x * (A(1) + t);
  } else {
    const A cdf = A(0.5) * (A(1) + std::erf(x * A(kSqrtHalf)));
    *slope = cdf + x * A(kInvSqrt2Pi) * Exp(A(-0.5) * x * x);
    return x * cdf;
  }
}

template <Activation kActivation, typename T>
ATTUNE_CLONES void ForwardRow(const T* gate, const T* up, T* h, int64_t F) {
  using A = AccumulatorOf<T>;
#pragma omp simd
  for (int64_t f = 0; f < F; ++f) {
    A slope;
    StoreRounded<T>(Activate<kActivation>(ToAccumulator(gate[f]), &slope) * ToAccumulator(up[f]),
                    &h[f]);
  }
}

template <Activation kActivation, typename T>
ATTUNE_CLONES void BackwardRow(const T* dh, const T* gate, const T* up, T* dgate, T* dup,
                               int64_t F) {
  using A = AccumulatorOf<T>;
#pragma omp simd
  for (int64_t f = 0; f < F; ++f) {
    A slope;
    const A d = ToAccumulator(dh[f]), u = ToAccumulator(up[f]);
    const A act = Activate<kActivation>(ToAccumulator(gate[f]), &slope);
    StoreRounded<T>(d * u * slope, &dgate[f]);
    StoreRounded<T>(d * act, &dup[f]);
  }
}

template <Activation kActivation, typename T>
ATTUNE_CLONES void BackwardRowAndRebuild(const T* dh, const T* gate, const T* up, T* dgate, T* dup,
                                         T* h, int64_t F) {
  using A = AccumulatorOf<T>;
#pragma omp simd
  for (int64_t f = 0; f < F; ++f) {
    A slope;
    const A d = ToAccumulator(dh[f]), u = ToAccumulator(up[f]);
    const A act = Activate<kActivation>(ToAccumulator(gate[f]), &slope);
    StoreRounded<T>(d * u * slope, &dgate[f]);
    StoreRounded<T>(d * act, &dup[f]);
    StoreRounded<T>(act * u, &h[f]);
  }
}

template <typename T>
T* Row(const TensorView& x, int64_t m) {
  return x.As<T>() + m * x.stride(0);
}

template <Activation kActivation, typename T>
void Forward(const GatedActivationForwardArgs& a) {
  const int64_t M = a.gate.dim(0), F = a.gate.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(M * F))
  for (int64_t m = 0; m < M; ++m) {
    ForwardRow<kActivation>(Row<T>(a.gate, m), Row<T>(a.up, m), Row<T>(a.h, m), F);
  }
}

template <Activation kActivation, typename T>
void Backward(const GatedActivationBackwardArgs& a) {
  const int64_t M = a.gate.dim(0), F = a.gate.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(M * F))
  for (int64_t m = 0; m < M; ++m) {
    const T *dh = Row<T>(a.dh, m), *gate = Row<T>(a.gate, m), *up = Row<T>(a.up, m);
    T *dgate = Row<T>(a.dgate, m), *dup = Row<T>(a.dup, m);
    if (a.h.defined()) {
      BackwardRowAndRebuild<kActivation>(dh, gate, up, dgate, dup, Row<T>(a.h, m), F);
    } else {
      BackwardRow<kActivation>(dh, gate, up, dgate, dup, F);
    }
  }
}

// Calls f.operator()<activation, T>().
template <typename F>
void DispatchActivation(Activation activation, DType dtype, F&& f) {
  DispatchFloat(dtype, [&]<typename T>() {
    switch (activation) {
      case Activation::kSilu:
        return f.template operator()<Activation::kSilu, T>();
      case Activation::kGeluTanh:
        return f.template operator()<Activation::kGeluTanh, T>();
      case Activation::kGeluErf:
        return f.template operator()<Activation::kGeluErf, T>();
    }
  });
}

}  // namespace

void GatedActivationForwardCpu(const Exec& exec, const GatedActivationForwardArgs& a) {
  DispatchActivation(a.activation, a.gate.dtype,
                     [&]<Activation kActivation, typename T>() { Forward<kActivation, T>(a); });
  if (a.fp8.defined()) Fp8QuantizeCpu(exec, Fp8QuantizeOf(a.h, a.fp8));
}

void GatedActivationBackwardCpu(const Exec& exec, const GatedActivationBackwardArgs& a) {
  DispatchActivation(a.activation, a.gate.dtype,
                     [&]<Activation kActivation, typename T>() { Backward<kActivation, T>(a); });
  if (a.fp8.defined()) Fp8QuantizeCpu(exec, Fp8QuantizeOf(GradientRows(a), a.fp8));
}

}  // namespace attune
