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

// The code of the value of `map`, which map[i] reads, nearest to x; of two equally near ones the
// even code. For host and device code; without a branch, so that the device overlaps many of them.
template <typename Map>
ATTUNE_HOST_DEVICE uint8_t NearestDynamicCode(const Map& map, bool is_signed, float x) {
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

// The same codes from a table, for who needs many of one map. Floats from 0 to 1 are cut into
// buckets by their exponent and seven bits of fraction, each narrower than any two values are
// apart: one code, or up to some float one and then the next.
struct DynamicCodes {
  static constexpr uint32_t kFirst = (127 - 24) << 7, kLast = 127 << 7;  // 2^-24 and 1
  static constexpr int kBuckets = kLast - kFirst + 1;

  const uint32_t* entries;  // kBuckets, of EntryOf

  // The first code, and 8 bits up the low half of the first float with the next one, or what no
  // half reaches.
  ATTUNE_HOST_DEVICE static uint32_t EntryOf(const float* map, int bucket) {
    const uint32_t high = kFirst + static_cast<uint32_t>(bucket);
    const uint32_t code = NearestDynamicCode(map, std::bit_cast<float>(high << 16));
    uint32_t next = 0x10000;
    if (code < 255) {
      const float middle = (map[code] + map[code + 1]) * 0.5f;  // the even code has it
      const uint32_t bits = std::bit_cast<uint32_t>(middle) + (code % 2 == 0 ? 1 : 0);
      if (bits >> 16 == high) next = bits & 0xffff;
    }
    return next << 8 | code;
  }
  ATTUNE_HOST_DEVICE int Of(float size) const {
    const uint32_t bits = std::bit_cast<uint32_t>(size), high = bits >> 16;
    const uint32_t bucket = high < kFirst ? 0 : high > kLast ? kLast - kFirst : high - kFirst;
    const uint32_t entry = entries[bucket];
    return static_cast<int>((entry & 0xff) + ((bits & 0xffff) >= entry >> 8));
  }
  // Of a map with signs: it is symmetric but for 1, whose negative has the code of the last.
  ATTUNE_HOST_DEVICE int OfSigned(float x) const {
    const int code = Of(std::fabs(x)), mirrored = code > 254 ? 0 : 254 - code;
    return x < 0 ? mirrored : code;
  }
};

}  // namespace attune
