// What quantising to NF4 and the ways back share on CUDA.
#pragma once

#include <cstring>

#include "kernels/core/dynamic_map.h"
#include "kernels/core/early_launch.cuh"
#include "kernels/nf4/nf4.h"

namespace attune::nf4 {

constexpr int kThreads = 256;

// Passed by value, so that a captured graph needs nothing else.
struct alignas(16) Tables {
  float nf4[16];
  float borders[16];  // between codes i and i + 1; the last is not used
  float map[256];
};
inline Tables MakeTables() {
  Tables out;
  std::memcpy(out.nf4, Nf4Values(), sizeof(out.nf4));
  for (int i = 0; i < 15; ++i) out.borders[i] = (out.nf4[i] + out.nf4[i + 1]) / 2.0f;
  out.borders[15] = out.nf4[15];
  std::memcpy(out.map, DynamicMap(/*is_signed=*/true), sizeof(out.map));
  return out;
}

inline bool Aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace attune::nf4
