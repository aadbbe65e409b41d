// A trie over bytes as a double array (Aoe, 1989): the child of node n by byte c is
// base[n] + c, if check there is n. A step costs one look-up.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace attune {

class Trie {
 public:
  // Keys are not empty; of a key that is there twice, the later value counts. Values are >= 0.
  // O(bytes of the keys) but for the search for free places, which is near to that.
  explicit Trie(std::vector<std::pair<absl::string_view, int32_t>> keys);

  // Calls f(length, value) for each key that `text` begins with, the shortest first.
  template <typename F>
  void ForEachPrefix(absl::string_view text, const F& f) const {
    int32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const int32_t child = nodes_[node].base + static_cast<uint8_t>(text[i]);
      if (nodes_[child].check != node) return;
      node = child;
      if (nodes_[node].value >= 0) f(i + 1, nodes_[node].value);
    }
  }

 private:
  struct Node {
    int32_t base = 0;
    int32_t check = -1;
    int32_t value = -1;
  };
  using Keys = std::vector<std::pair<absl::string_view, int32_t>>;
  struct Range {
    size_t begin, end;  // of sorted keys, which share their first `depth` bytes
    size_t depth;
    int32_t node;
  };
  void Place(const Keys& keys, const Range& range, std::vector<Range>* open);
  int32_t FindBase(const std::vector<uint8_t>& labels);

  std::vector<Node> nodes_;
  int32_t first_free_ = 1;
};

}  // namespace attune
