// Text on its way through the tokenizer, with the place in the input that each byte came from.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "worker/data/tokenizer.h"

namespace attune {

class AlignedText {
 public:
  // Bytes of the input itself, which begin at its byte `base`. Owns nothing.
  AlignedText(absl::string_view input, int64_t base) : view_(input), base_(base) {}
  // Text that was made from the input: origin[i] is where byte i came from.
  AlignedText(std::string text, std::vector<ByteSpan> origin)
      : owned_(std::move(text)), view_(owned_), origin_(std::move(origin)) {}
  // Views point into the object itself.
  AlignedText(const AlignedText&) = delete;
  AlignedText& operator=(const AlignedText&) = delete;

  absl::string_view text() const { return view_; }

  // Where the bytes [begin, end) of this text came from. An empty range has the origin of the
  // byte at `begin`.
  ByteSpan Origin(int64_t begin, int64_t end) const {
    if (origin_.empty()) return {base_ + begin, base_ + end};
    if (begin >= end) return {origin_[begin].begin, origin_[begin].begin};
    return {origin_[begin].begin, origin_[end - 1].end};
  }

 private:
  std::string owned_;
  absl::string_view view_;
  int64_t base_ = 0;
  std::vector<ByteSpan> origin_;  // empty: byte i is byte base_ + i of the input
};

// A part of a text that tokens do not cross. Never empty.
struct Piece {
  const AlignedText* text = nullptr;
  int64_t begin = 0;
  int64_t end = 0;
  int32_t token = -1;  // an added token's id; else this is still text

  absl::string_view view() const { return text->text().substr(begin, end - begin); }
};

// The state of one Encode. Buffers stay where they are, so pieces may point to them.
struct PieceList {
  std::deque<AlignedText> buffers;
  std::vector<Piece> pieces;
};

}  // namespace attune
