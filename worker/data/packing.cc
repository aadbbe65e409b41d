#include "worker/data/packing.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "worker/data/random.h"

namespace attune {
namespace {

// Examples that are looked at together: placed from long to short, they fill packs well, while
// which ones meet still differs from epoch to epoch.
constexpr size_t kWindowExamples = 2048;

// What a random stream of (seed, epoch) is for.
enum Stream : uint64_t { kShuffleExamples = 2, kShufflePacks = 3 };

template <typename T>
void Shuffle(uint64_t seed, uint64_t epoch, Stream stream, std::vector<T>* items) {
  const uint64_t key = HashOf(seed, epoch, stream);
  for (size_t i = items->size(); i > 1; --i) {
    std::swap((*items)[i - 1], (*items)[Below(HashOf(key, i, 0), i)]);
  }
}

// Packs that are not full yet, best fit first.
class Packer {
 public:
  Packer(int64_t pack_tokens, int64_t max_segments)
      : pack_tokens_(pack_tokens), max_segments_(max_segments) {}

  // Into the open pack that it fills best; the oldest one of equals.
  void Place(int64_t example, int64_t length) {
    const auto it = open_.lower_bound({length, 0});
    size_t pack = packs_.size();
    int64_t room = pack_tokens_;
    if (it == open_.end()) {
      packs_.emplace_back();
    } else {
      room = it->first;
      pack = it->second;
      open_.erase(it);
    }
    packs_[pack].push_back(example);
    room -= length;
    if (room > 0 && static_cast<int64_t>(packs_[pack].size()) < max_segments_) {
      open_.insert({room, pack});
    }
  }

  std::vector<std::vector<int64_t>> Take() { return std::move(packs_); }

 private:
  int64_t pack_tokens_;
  int64_t max_segments_;
  std::vector<std::vector<int64_t>> packs_;
  std::set<std::pair<int64_t, size_t>> open_;  // (room, pack)
};

}  // namespace

absl::StatusOr<std::vector<std::vector<int64_t>>> FormPacks(absl::Span<const int64_t> lengths,
                                                            const PackOptions& options) {
  CHECK(options.pack_tokens > 0 && options.max_segments > 0);
  std::vector<int64_t> order(lengths.size());
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 1 || lengths[i] > options.pack_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          "example ", i, " has ", lengths[i], " tokens; a pack holds 1 to ", options.pack_tokens));
    }
    order[i] = static_cast<int64_t>(i);
  }
  if (options.shuffle) Shuffle(options.seed, options.epoch, kShuffleExamples, &order);
  Packer packer(options.pack_tokens, options.max_segments);
  for (size_t begin = 0; begin < order.size(); begin += kWindowExamples) {
    const size_t end = std::min(begin + kWindowExamples, order.size());
    std::stable_sort(order.begin() + static_cast<int64_t>(begin),
                     order.begin() + static_cast<int64_t>(end),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (size_t i = begin; i < end; ++i) packer.Place(order[i], lengths[order[i]]);
  }
  std::vector<std::vector<int64_t>> packs = packer.Take();
  if (options.shuffle) Shuffle(options.seed, options.epoch, kShufflePacks, &packs);
  return packs;
}

Pack BuildPack(const Dataset& dataset, absl::Span<const int64_t> examples, int64_t pack_tokens) {
  const size_t T = static_cast<size_t>(pack_tokens);
  Pack pack;
  pack.ids.resize(T, 0);
  pack.targets.resize(T, -1);
  pack.positions.resize(T, 0);
  pack.num_segments = static_cast<int32_t>(examples.size());
  size_t row = 0;
  for (int64_t i : examples) {
    const ExampleView example = dataset[i];
    CHECK(row + example.ids.size() <= T);
    pack.q_begin.push_back(static_cast<int32_t>(row));
    for (size_t t = 0; t < example.ids.size(); ++t) {
      pack.ids[row + t] = example.ids[t];
      pack.positions[row + t] = static_cast<int32_t>(t);
      if (t + 1 < example.ids.size() && example.trained[t + 1] != 0) {
        pack.targets[row + t] = example.ids[t + 1];
        ++pack.trained_tokens;
      }
    }
    row += example.ids.size();
  }
  pack.q_begin.push_back(static_cast<int32_t>(row));
  return pack;
}

Pack IdlePack(int64_t pack_tokens) {
  const size_t T = static_cast<size_t>(pack_tokens);
  return {.ids = std::vector<int32_t>(T, 0),
          .targets = std::vector<int32_t>(T, -1),
          .positions = std::vector<int32_t>(T, 0),
          .q_begin = {0, 1},
          .num_segments = 1};
}

}  // namespace attune
