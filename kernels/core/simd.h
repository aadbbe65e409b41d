// What the CPU ops vectorise with.
//
// The binary runs on any x86-64; hot functions are compiled once more for AVX2 and AVX-512 and
// chosen when the program is loaded (ATTUNE_CLONES). Results do not hang on the choice: no
// contraction (-ffp-contract=off), and sums run over a fixed number of lanes that are added up in
// a fixed order, however many registers they fill. (GemmBlock does contract, as products in
// libraries do.)
//
// A cloned function is a leaf over rows: no lambdas and no OpenMP regions inside, since those are
// compiled apart, for the baseline.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/core/dtype.h"

// The resolvers run before a sanitizer's run time is up.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ATTUNE_HAS_CLONES
#define ATTUNE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ATTUNE_CLONES
#endif

#define ATTUNE_INLINE inline __attribute__((always_inline))

namespace attune {

constexpr int kLanes = 16;

// A sum in kLanes lanes: element c of a row goes to lane c % kLanes.
template <typename A>
struct LaneSum {
  alignas(64) A lane[kLanes] = {};

  ATTUNE_INLINE A Total() const {
    A part[kLanes / 2];
    for (int i = 0; i < kLanes / 2; ++i) part[i] = lane[i] + lane[i + kLanes / 2];
    for (int width = kLanes / 4; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    }
    return part[0];
  }
};

// exp for loops that the compiler vectorises, within 2 units in the last place. NaN stays NaN,
// overflow is inf, below the smallest subnormal is 0.
ATTUNE_INLINE float Exp(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the significand.
  constexpr float kShift = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kShift;
  const uint32_t bits = std::bit_cast<uint32_t>(shifted);
  const float n = shifted - kShift;
  // ln 2 in two parts, the first short enough for n * part to be exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  // 2^n as a product of two, so that the results of n from -150 to 128 round as they should.
  const int32_t exponent = static_cast<int32_t>(bits - 0x4b400000u);
  const int32_t half = exponent >> 1;
  const float scale1 = std::bit_cast<float>(static_cast<uint32_t>(half + 127) << 23);
  const float scale2 = std::bit_cast<float>(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * scale1 * scale2;
}
ATTUNE_INLINE double Exp(double x) {
  return std::exp(x);
}

// tanh for the same loops, to 2 units of 1 (not of the result, where that is small).
ATTUNE_INLINE float Tanh(float x) {
  return 1.0f - 2.0f / (1.0f + Exp(2.0f * x));
}
ATTUNE_INLINE double Tanh(double x) {
  return std::tanh(x);
}

}  // namespace attune
