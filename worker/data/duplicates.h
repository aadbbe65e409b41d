// DuplicateFinder: texts that were seen before, exactly or nearly.
//
// Texts are compared as words (case of ASCII and white space do not count). Exact: a 64-bit hash.
// Near: the Jaccard similarity of the sets of three words in a row, estimated by MinHash (Broder,
// 1997) with one permutation (Li, Owen, Zhang, 2012) in 64 bins, is at least 0.8; candidates share
// one of 16 bands of 4 bins. Each text is compared with the first of its kind.
//
// Memory: about 40 bytes a text, and 700 for each of the first kMaxNear that are long enough.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"

namespace attune {

struct TextFingerprint {
  static constexpr int kBins = 64;
  static constexpr int kMinShingles = 16;  // shorter texts are compared exactly only

  uint64_t exact = 0;
  bool has_bins = false;
  std::array<uint32_t, kBins> bins;

  static TextFingerprint Of(absl::string_view text);
  // Estimated Jaccard similarity; both have bins.
  double Similarity(const TextFingerprint& other) const;
};

class DuplicateFinder {
 public:
  static constexpr double kNearSimilarity = 0.8;
  static constexpr size_t kMaxNear = 250'000;

  struct Match {
    int64_t first = -1;  // the key of the text that this one repeats; -1: none
    bool exact = false;
  };
  Match Find(const TextFingerprint& text) const;
  // Find; a text that repeats none is remembered under `key`.
  Match FindOrAdd(const TextFingerprint& text, int64_t key);
  // Whether texts came that near duplicates were not looked for any more.
  bool overfull() const { return overfull_; }

 private:
  static constexpr int kBands = 16;
  static uint64_t BandKey(const TextFingerprint& text, int band);

  struct Near {
    TextFingerprint text;
    int64_t key;
  };
  absl::flat_hash_map<uint64_t, int64_t> exact_;
  std::vector<Near> near_;
  absl::flat_hash_map<uint64_t, uint32_t> bands_;  // to the first in near_
  bool overfull_ = false;
};

}  // namespace attune
