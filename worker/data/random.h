// Random choices about data: functions of their keys alone, the same with every library.
#pragma once

#include <cstdint>

namespace attune {

// The finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
constexpr uint64_t Mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

constexpr uint64_t HashOf(uint64_t a, uint64_t b, uint64_t c) {
  return Mix64(Mix64(Mix64(a) ^ b) ^ c);
}

// A number below n > 0; the bias of the multiplication is below n / 2^64.
constexpr uint64_t Below(uint64_t random, uint64_t n) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(random) * n) >> 64);
}

}  // namespace attune
