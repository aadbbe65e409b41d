// The 256 values of bitsandbytes' dynamic 8-bit type, ascending: an exponent of 0 to 6 leading
// zeros and a fraction of what bits are left, with a sign or with one more bit of fraction.
#pragma once

#include <cstdint>

#include "kernels/core/philox.h"

namespace attune {

// Signed: -0.993 to 1. Unsigned: 0 to 1. A host array that stays.
const float* DynamicMap(bool is_signed);

// The code of the value of `map` nearest to x; of two equally near ones the even code. For host and
// device code.
ATTUNE_HOST_DEVICE inline uint8_t NearestDynamicCode(const float* map, float x) {
  int above = 0;  // how many values are below x
  for (int step = 256; step > 0; step /= 2) {
    if (above + step <= 256 && map[above + step - 1] < x) above += step;
  }
  if (above == 0) return 0;
  if (above == 256) return 255;
  const int below = above - 1;
  const float middle = (map[below] + map[above]) * 0.5f;
  if (x < middle) return static_cast<uint8_t>(below);
  if (x > middle) return static_cast<uint8_t>(above);
  return static_cast<uint8_t>(below % 2 == 0 ? below : above);
}

}  // namespace attune
