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
  // Bytes of the input; it has at most 1 GiB.
  struct Source {
    int32_t begin;
    int32_t end;
  };

  // Bytes of the input itself, which begin at its byte `base`. Owns nothing.
  AlignedText(absl::string_view input, int64_t base) : view_(input), base_(base) {}
  // Text that was made from the input: origin[i] is where byte i came from.
  AlignedText(std::string text, std::vector<Source> origin)
      : owned_(std::move(text)), view_(owned_), made_(true), origin_(std::move(origin)) {}
  // Views point into the object itself.
  AlignedText(const AlignedText&) = delete;
  AlignedText& operator=(const AlignedText&) = delete;

  absl::string_view text() const { return view_; }

  // Where the bytes [begin, end) of this text came from. An empty range lies before the origin of
  // the byte at `begin`, or at the end.
  ByteSpan Origin(int64_t begin, int64_t end) const {
    if (!made_) return {base_ + begin, base_ + end};
    if (begin < end) return {origin_[begin].begin, origin_[end - 1].end};
    if (origin_.empty()) return {0, 0};
    const bool at_end = begin >= static_cast<int64_t>(origin_.size());
    const int64_t at = at_end ? origin_.back().end : origin_[begin].begin;
    return {at, at};
  }

 private:
  std::string owned_;
  absl::string_view view_;
  int64_t base_ = 0;
  bool made_ = false;
  std::vector<Source> origin_;
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

// Writes a new text for a piece, left to right. Places are bytes of the piece.
class PieceRewriter {
 public:
  explicit PieceRewriter(const Piece& piece) : piece_(piece), from_(piece.view()) {
    text_.reserve(from_.size() + 16);
    origin_.reserve(from_.size() + 16);
  }

  // These bytes stay; each keeps its own origin.
  void Keep(size_t begin, size_t end) {
    text_.append(from_.data() + begin, end - begin);
    for (size_t i = begin; i < end; ++i) PushOrigin(i, i + 1, 1);
  }
  // `text` stands for these bytes; with begin == end it comes from nothing, before that place.
  void Put(absl::string_view text, size_t begin, size_t end) {
    text_.append(text.data(), text.size());
    PushOrigin(begin, end, text.size());
  }
  const std::string& text() const { return text_; }

  // Puts the new text into `buffers` and makes it the piece, which may be empty then.
  void Finish(std::deque<AlignedText>* buffers, Piece* piece) {
    const int64_t size = static_cast<int64_t>(text_.size());
    buffers->emplace_back(std::move(text_), std::move(origin_));
    *piece = Piece{.text = &buffers->back(), .begin = 0, .end = size};
  }

 private:
  void PushOrigin(size_t begin, size_t end, size_t count) {
    const ByteSpan span = piece_.text->Origin(piece_.begin + static_cast<int64_t>(begin),
                                              piece_.begin + static_cast<int64_t>(end));
    origin_.insert(origin_.end(), count,
                   {static_cast<int32_t>(span.begin), static_cast<int32_t>(span.end)});
  }

  const Piece piece_;
  const absl::string_view from_;
  std::string text_;
  std::vector<AlignedText::Source> origin_;
};

}  // namespace attune
