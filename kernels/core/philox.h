// Philox4x32-10: the counter-based random numbers of Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3" (SC11). Four words of 32 random bits are a pure function of
// a 128-bit counter and a 64-bit key; nothing is stored. For host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ATTUNE_HOST_DEVICE __host__ __device__
#else
#define ATTUNE_HOST_DEVICE
#endif

namespace attune {

struct PhiloxBlock {
  uint32_t word[4];
};

// The keys of the rounds.
struct PhiloxKeys {
  static constexpr int kRounds = 10;
  uint32_t key0[kRounds], key1[kRounds];
};
ATTUNE_HOST_DEVICE inline PhiloxKeys PhiloxKeysOf(uint32_t key0, uint32_t key1) {
  PhiloxKeys out{};
  for (int round = 0; round < PhiloxKeys::kRounds; ++round) {
    out.key0[round] = key0;
    out.key1[round] = key1;
    key0 += 0x9E3779B9u;  // golden ratio
    key1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return out;
}

ATTUNE_HOST_DEVICE inline PhiloxBlock Philox4x32(PhiloxBlock counter, const PhiloxKeys& keys) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < PhiloxKeys::kRounds; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ keys.key0[round],
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ keys.key1[round],
                static_cast<uint32_t>(product0)}};
  }
  return counter;
}
ATTUNE_HOST_DEVICE inline PhiloxBlock Philox4x32(const PhiloxBlock& counter, uint32_t key0,
                                                 uint32_t key1) {
  return Philox4x32(counter, PhiloxKeysOf(key0, key1));
}

}  // namespace attune
