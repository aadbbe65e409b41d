// The 256 values of bitsandbytes' dynamic 8-bit type, ascending: an exponent of 0 to 6 leading
// zeros and a fraction of what bits are left, with a sign or with one more bit of fraction.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/core/philox.h"

namespace attune {

// Signed: -0.993 to 1. Unsigned: 0 to 1. A host array that stays.
const float* DynamicMap(bool is_signed);

// Where x is among the values, or one beside it, from how they are made: decade i (1e-6 first) has
// 2^i values with this sign, or 2^(i + 1) without signs, in the middles of as many equal steps.
ATTUNE_HOST_DEVICE inline int GuessDynamicCode(bool is_signed, float x) {
  const float size = is_signed && x < 0 ? -x : x;
  int steps = is_signed ? 1 : 2;
  float unit = 1e6f;
  const auto above = [&](float decade, float its_unit) {
    const bool yes = size >= decade;
    steps = yes ? 2 * steps : steps;
    unit = yes ? its_unit : unit;
  };
  above(1e-6f, 1e5f);
  above(1e-5f, 1e4f);
  above(1e-4f, 1e3f);
  above(1e-3f, 1e2f);
  above(1e-2f, 1e1f);
  above(1e-1f, 1.0f);
  const float at = (size * unit - 0.1f) * (static_cast<float>(steps) / 0.9f);
  const int step = at >= static_cast<float>(steps) ? steps : at > 0 ? static_cast<int>(at) : 0;
  if (!is_signed) return steps - 1 + step;
  const int code = 127 + steps + step;
  return x >= 0 ? code : code > 254 ? 0 : 254 - code;
}

// The code of the value of `map` nearest to x; of two equally near ones the even code. For host and
// device code.
ATTUNE_HOST_DEVICE inline uint8_t NearestDynamicCode(const float* map, bool is_signed, float x) {
  // x is in its step: above the value or below it. At an edge either step will do.
  const int guess = GuessDynamicCode(is_signed, x);
  const int at = guess < 1 ? 1 : guess > 254 ? 254 : guess;
  const float before = map[at - 1], value = map[at], behind = map[at + 1];
  const bool over = value < x;
  const int below = over ? at : at - 1;
  const float middle = ((over ? value : before) + (over ? behind : value)) * 0.5f;
  return static_cast<uint8_t>(below + (x > middle || (x == middle && below % 2 != 0)));
}
ATTUNE_HOST_DEVICE inline uint8_t NearestDynamicCode(const float* map, float x) {
  return NearestDynamicCode(map, map[0] < 0, x);
}

// The same code in a few operations, for x from -1 to 1 (0 to 1 without signs). A bin has the sizes
// |x| with one exponent and one start of the fraction: between them is one border of codes at most.
template <bool kSigned>
struct DynamicCodeBins {
  static constexpr int kShift = kSigned ? 17 : 16;    // bits of an f32 that do not matter
  static constexpr uint32_t kSmallest = 0x34000000u;  // of 2^-23: its code is that of all below
  static constexpr uint32_t kFirst = kSmallest >> kShift;
  static constexpr int kCount = (0x3f800000u >> kShift) - kFirst + 1;

  // What to add to the bits of a size of the bin, so that its code is in the highest byte: where
  // they reach the border, the sum of the lower bits carries.
  ATTUNE_HOST_DEVICE static uint32_t Bin(const float* map, int bin) {
    const uint32_t begin = (kFirst + static_cast<uint32_t>(bin)) << kShift;
    const uint32_t code = NearestDynamicCode(map, kSigned, std::bit_cast<float>(begin));
    uint32_t to_border = 1u << kShift;
    if (code < 255) {
      const float middle = (map[code] + map[code + 1]) * 0.5f;
      const uint32_t border = std::bit_cast<uint32_t>(middle) + (code % 2 == 0 ? 1 : 0);
      to_border = border - begin < to_border ? border - begin : to_border;
    }
    return ((code + 1) << 24) - to_border - begin;
  }
  // The code is the highest byte.
  ATTUNE_HOST_DEVICE static uint32_t Find(const uint32_t* bins, float x) {
    // -1 has no value of its own.
    if constexpr (kSigned) x = std::fmax(x, -0.99f);
    const float size = std::fmax(std::fabs(x), std::bit_cast<float>(kSmallest));
    const uint32_t bits = std::bit_cast<uint32_t>(size);
    const uint32_t sum = bins[(bits >> kShift) - kFirst] + bits;
    return kSigned && x < 0 ? (254u << 24 | 0xffffffu) - sum : sum;  // 254 - code
  }
};

}  // namespace attune
