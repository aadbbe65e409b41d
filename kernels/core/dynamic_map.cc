#include "kernels/core/dynamic_map.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace attune {
namespace {

// Decade i (0 the smallest, 1e-6, to 6, 1) is cut into 2^i equal steps from 0.1 to 1 (2^(i + 1)
// without a sign); the values are their middles, with both signs, and 0 and 1.
// Every operation in f32, in the order that gives bitsandbytes' bits. It makes the map on the host
// with torch.linspace, which fuses the product and the sum on any CPU with AVX2 (and not on older
// ones, where about 40 of the values differ in the last bit).
std::array<float, 256> MakeDynamicMap(bool is_signed) {
  std::array<float, 256> map;
  int n = 0;
  for (int decade = 0; decade < 7; ++decade) {
    const int steps = 1 << (is_signed ? decade : decade + 1);
    const float width = (1.0f - 0.1f) / static_cast<float>(steps);
    const auto boundary = [&](int i) {
      // From the nearer end.
      return i < (steps + 1) / 2 ? std::fma(width, static_cast<float>(i), 0.1f)
                                 : std::fma(-width, static_cast<float>(steps - i), 1.0f);
    };
    const float unit = static_cast<float>(std::pow(10.0, decade - 6));
    for (int i = 0; i < steps; ++i) {
      const float middle = (boundary(i) + boundary(i + 1)) / 2.0f;
      map[n++] = unit * middle;
      if (is_signed) map[n++] = -unit * middle;
    }
  }
  map[n++] = 0.0f;
  map[n++] = 1.0f;
  std::sort(map.begin(), map.end());
  return map;
}

}  // namespace

const float* DynamicMap(bool is_signed) {
  static const std::array<float, 256> with_sign = MakeDynamicMap(true);
  static const std::array<float, 256> without = MakeDynamicMap(false);
  return (is_signed ? with_sign : without).data();
}

}  // namespace attune
