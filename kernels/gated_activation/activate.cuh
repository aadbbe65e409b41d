// act(x) and its slope on the device.
#pragma once

#include "kernels/core/cuda.cuh"
#include "kernels/gated_activation/gated_activation.h"

namespace attune {

// 1 / x, within an ulp, of x >= 1: one instruction, where a division is ten and a branch.
__device__ inline float Reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// exp(x) within 2 + |x| ulp: two instructions, where expf is eight.
__device__ inline float Exponential(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(1.44269504088896340736f * x));
  return out;
}

// act(x), and its derivative in *slope.
template <Activation kActivation>
__device__ float Activate(float x, float* slope) {
  if constexpr (kActivation == Activation::kSilu) {
    const float sigmoid = Reciprocal(1.0f + Exponential(-x));
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

// Calls f.operator()<activation>().
template <typename F>
void DispatchActivation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kSilu:
      return f.template operator()<Activation::kSilu>();
    case Activation::kGeluTanh:
      return f.template operator()<Activation::kGeluTanh>();
    case Activation::kGeluErf:
      return f.template operator()<Activation::kGeluErf>();
  }
}

}  // namespace attune
