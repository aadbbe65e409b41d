// Packing: whole examples side by side in a fixed number T of tokens.
//
//   ids:        a0 a1 a2 | b0 b1 | 0 0        T = 7, two segments
//   targets:    a1 a2 -1 | b1 -1 | -1 -1      -1 where the next token is not trained
//   positions:  0  1  2  | 0  1  | 0 0
//   q_begin:    0          3       5
//
// Rows after the last segment are padding: they belong to no segment. Which examples share a pack
// is a function of (lengths, T, max_segments, seed, epoch) alone, and so is the order of packs:
// ranks and resumed runs see the same. Cost of FormPacks: O(n log n).
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/data/dataset.h"

namespace attune {

struct Pack {
  std::vector<int32_t> ids;        // (T)
  std::vector<int32_t> targets;    // (T) the next token if it is trained, else -1
  std::vector<int32_t> positions;  // (T) within the segment
  std::vector<int32_t> q_begin;    // (S + 1) first row of each segment, then the end of the last
  int32_t num_segments = 0;        // S
  int64_t trained_tokens = 0;      // targets that are not -1
};

struct PackOptions {
  int64_t pack_tokens = 2048;   // T
  int64_t max_segments = 1024;  // S_max
  uint64_t seed = 0;
  uint64_t epoch = 0;
  bool shuffle = true;  // false: examples in order (evaluation), still best-fit
};

// Examples of each pack, as indices into `lengths`; each example is in exactly one pack.
// Best-fit over a shuffled order with a window of open packs; the packs are shuffled again, so that
// the full ones do not come first. INVALID_ARGUMENT if a length is < 1 or > T.
absl::StatusOr<std::vector<std::vector<int64_t>>> FormPacks(absl::Span<const int64_t> lengths,
                                                            const PackOptions& options);

// Fills one pack of T tokens with these examples, in this order.
Pack BuildPack(const Dataset& dataset, absl::Span<const int64_t> examples, int64_t pack_tokens);

// A pack of T tokens in which nothing is trained: what a rank runs to be there for the others.
Pack IdlePack(int64_t pack_tokens);

}  // namespace attune
