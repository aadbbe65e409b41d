// Mixing: how often an epoch sees each example. An example of weight w is in an epoch floor(w) or
// ceil(w) times, w on average; which epochs have it once more is a function of (seed, epoch,
// example) alone.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace attune {

// Indices into `weights` (one per example), ascending, as often as the epoch has them. With equal
// weights of 1 that is each once. Never empty if a weight is above 0: then the example with the
// greatest chance is taken.
std::vector<int64_t> DrawEpoch(absl::Span<const double> weights, uint64_t seed, uint64_t epoch);

}  // namespace attune
