// The 256 values of bitsandbytes' dynamic 8-bit type, ascending: an exponent of 0 to 6 leading
// zeros and a fraction of what bits are left, with a sign or with one more bit of fraction.
#pragma once

#include <cstdint>

#include "kernels/core/philox.h"

namespace attune {

// Signed: -0.993 to 1. Unsigned: 0 to 1. A host array that stays.
const float* DynamicMap(bool is_signed);

// Where x is among the values, or one beside it, from how they are made: decade i (1e-6 first) has
// 2^i values with this sign, or 2^(i + 1) without signs, in the middles of as many equal steps.
ATTUNE_HOST_DEVICE inline int GuessDynamicCode(bool is_signed, float x) {
  const float size = x < 0 ? -x : x;
  int decade = 0;
  float unit = 1e6f;
  for (float next = 1e-6f; decade < 6 && size >= next; next *= 10.0f) {
    ++decade;
    unit *= 0.1f;
  }
  const int steps = 1 << (is_signed ? decade : decade + 1);
  const float at = (size * unit - 0.1f) * (static_cast<float>(steps) / 0.9f);
  const int step = at >= static_cast<float>(steps) ? steps : at > 0 ? static_cast<int>(at) : 0;
  if (!is_signed) return steps - 1 + step;
  const int code = 127 + steps + step;
  return x >= 0 ? code : code > 254 ? 0 : 254 - code;
}

// The code of the value of `map` nearest to x; of two equally near ones the even code. For host and
// device code.
ATTUNE_HOST_DEVICE inline uint8_t NearestDynamicCode(const float* map, float x) {
  int above = GuessDynamicCode(map[0] < 0, x);  // to be: how many values are below x
  while (above < 256 && map[above] < x) ++above;
  while (above > 0 && !(map[above - 1] < x)) --above;
  if (above == 0) return 0;
  if (above == 256) return 255;
  const int below = above - 1;
  const float middle = (map[below] + map[above]) * 0.5f;
  if (x < middle) return static_cast<uint8_t>(below);
  if (x > middle) return static_cast<uint8_t>(above);
  return static_cast<uint8_t>(below % 2 == 0 ? below : above);
}

}  // namespace attune
