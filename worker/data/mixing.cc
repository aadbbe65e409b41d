#include "worker/data/mixing.h"

#include <cmath>

#include "worker/data/random.h"

namespace attune {
namespace {

constexpr uint64_t kMixingStream = 4;  // dataset.cc uses 1, packing.cc 2 and 3

}  // namespace

std::vector<int64_t> DrawEpoch(absl::Span<const double> weights, uint64_t seed, uint64_t epoch) {
  std::vector<int64_t> drawn;
  drawn.reserve(weights.size());
  int64_t likeliest = -1;
  double margin = -1;  // by how much the likeliest was in, or failed to be
  for (size_t i = 0; i < weights.size(); ++i) {
    const double whole = std::floor(weights[i]);
    const uint64_t hash = HashOf(Mix64(seed ^ kMixingStream), epoch, i);
    const double uniform = static_cast<double>(hash >> 11) * 0x1.0p-53;
    const int64_t times =
        static_cast<int64_t>(whole) + (uniform < weights[i] - whole ? 1 : 0);
    drawn.insert(drawn.end(), static_cast<size_t>(times), static_cast<int64_t>(i));
    if (weights[i] > 0 && weights[i] - uniform > margin) {
      margin = weights[i] - uniform;
      likeliest = static_cast<int64_t>(i);
    }
  }
  if (drawn.empty() && likeliest >= 0) drawn.push_back(likeliest);
  return drawn;
}

}  // namespace attune
