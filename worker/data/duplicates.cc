#include "worker/data/duplicates.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "worker/data/random.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr uint32_t kEmpty = UINT32_MAX;
constexpr int kShingleWords = 3;

// Calls f(hash) per word: a run of bytes that are no white space. In scripts that are written
// without spaces each character is a word.
template <typename F>
void ForEachWord(absl::string_view text, const F& f) {
  uint64_t hash = 0;
  bool in_word = false;
  for (size_t i = 0; i < text.size();) {
    const unsigned char byte = static_cast<unsigned char>(text[i]);
    const char32_t c = byte < 0x80 ? static_cast<char32_t>(text[i++]) : NextCodePoint(text, &i);
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    const bool alone = c >= 0x2E80;
    if ((space || alone) && in_word) {
      f(hash);
      in_word = false;
    }
    if (space) continue;
    const uint64_t lower = c < 0x80 ? static_cast<uint64_t>(absl::ascii_tolower(byte)) : c;
    hash = Mix64((in_word ? hash : 0) ^ lower);
    in_word = !alone;
    if (alone) f(hash);
  }
  if (in_word) f(hash);
}

// An empty bin takes the value of the next one that is not: then equal sets have equal bins.
void FillEmptyBins(std::array<uint32_t, TextFingerprint::kBins>* bins) {
  const std::array<uint32_t, TextFingerprint::kBins> sparse = *bins;
  for (size_t i = 0; i < sparse.size(); ++i) {
    size_t distance = 0;
    while (sparse[(i + distance) % sparse.size()] == kEmpty) ++distance;
    (*bins)[i] = sparse[(i + distance) % sparse.size()] + static_cast<uint32_t>(distance);
  }
}

}  // namespace

TextFingerprint TextFingerprint::Of(absl::string_view text) {
  TextFingerprint out;
  out.bins.fill(kEmpty);
  uint64_t words[kShingleWords] = {};
  int64_t count = 0;
  ForEachWord(text, [&](uint64_t word) {
    out.exact = HashOf(out.exact, word, 0);
    std::rotate(words, words + 1, words + kShingleWords);
    words[kShingleWords - 1] = word;
    if (++count < kShingleWords) return;
    const uint64_t shingle = HashOf(words[0], words[1], words[2]);
    uint32_t& bin = out.bins[shingle % kBins];
    bin = std::min(bin, static_cast<uint32_t>(shingle >> 32));
  });
  out.has_bins = count >= kMinShingles + kShingleWords - 1;
  if (out.has_bins) FillEmptyBins(&out.bins);
  return out;
}

double TextFingerprint::Similarity(const TextFingerprint& other) const {
  int equal = 0;
  for (int i = 0; i < kBins; ++i) equal += bins[i] == other.bins[i] ? 1 : 0;
  return static_cast<double>(equal) / kBins;
}

uint64_t DuplicateFinder::BandKey(const TextFingerprint& text, int band) {
  constexpr int kRows = TextFingerprint::kBins / kBands;
  uint64_t key = static_cast<uint64_t>(band);
  for (int row = 0; row < kRows; ++row) key = Mix64(key ^ text.bins[band * kRows + row]);
  return key;
}

DuplicateFinder::Match DuplicateFinder::Find(const TextFingerprint& text) const {
  if (const auto it = exact_.find(text.exact); it != exact_.end()) return {it->second, true};
  for (int band = 0; text.has_bins && band < kBands; ++band) {
    const auto it = bands_.find(BandKey(text, band));
    if (it == bands_.end()) continue;
    const Near& candidate = near_[it->second];
    if (candidate.text.Similarity(text) >= kNearSimilarity) return {candidate.key, false};
  }
  return {};
}

DuplicateFinder::Match DuplicateFinder::FindOrAdd(const TextFingerprint& text, int64_t key) {
  const Match match = Find(text);
  if (match.first >= 0) return match;
  exact_.emplace(text.exact, key);
  if (!text.has_bins) return match;
  if (near_.size() >= kMaxNear) {
    overfull_ = true;
    return match;
  }
  for (int band = 0; band < kBands; ++band) {
    bands_.try_emplace(BandKey(text, band), static_cast<uint32_t>(near_.size()));
  }
  near_.push_back({text, key});
  return match;
}

}  // namespace attune
