#include "worker/data/stages/trie.h"

#include <algorithm>

namespace attune {
namespace {

// After so many places without success, those before are left for good.
constexpr int kMaxTries = 512;

}  // namespace

Trie::Trie(Keys keys) {
  std::stable_sort(keys.begin(), keys.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  nodes_.resize(512);
  nodes_[0].check = -2;  // no child leads to the root
  std::vector<Range> open;
  if (!keys.empty()) open.push_back({0, keys.size(), 0, 0});
  while (!open.empty()) {
    const Range range = open.back();
    open.pop_back();
    Place(keys, range, &open);
  }
}

void Trie::Place(const Keys& keys, const Range& range, std::vector<Range>* open) {
  size_t i = range.begin;
  for (; i < range.end && keys[i].first.size() == range.depth; ++i) {
    nodes_[range.node].value = keys[i].second;
  }
  std::vector<uint8_t> labels;
  std::vector<size_t> begins;
  for (; i < range.end; ++i) {
    const uint8_t label = static_cast<uint8_t>(keys[i].first[range.depth]);
    if (!labels.empty() && labels.back() == label) continue;
    labels.push_back(label);
    begins.push_back(i);
  }
  if (labels.empty()) return;  // base 0 leads to places whose check is another node's
  begins.push_back(range.end);
  const int32_t base = FindBase(labels);
  nodes_[range.node].base = base;
  for (size_t k = 0; k < labels.size(); ++k) {
    const int32_t child = base + labels[k];
    nodes_[child].check = range.node;
    open->push_back({begins[k], begins[k + 1], range.depth + 1, child});
  }
}

int32_t Trie::FindBase(const std::vector<uint8_t>& labels) {
  while (nodes_[first_free_].check != -1) ++first_free_;
  int tries = 0;
  for (int32_t place = first_free_;; ++place) {
    // All labels of a base lie within 256 places of it.
    if (static_cast<size_t>(place) + 512 > nodes_.size()) nodes_.resize(nodes_.size() * 2);
    if (++tries == kMaxTries) first_free_ = place;
    if (nodes_[place].check != -1 || place < labels[0]) continue;
    const int32_t base = place - labels[0];
    const bool fits = std::all_of(labels.begin(), labels.end(),
                                  [&](uint8_t c) { return nodes_[base + c].check == -1; });
    if (fits) return base;
  }
}

}  // namespace attune
