#include "worker/data/stages/precompiled.h"

#include <unicode/brkiter.h>
#include <unicode/utext.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr size_t kWholeGraphemeBytes = 6;  // shorter ones are looked up whole

// One unit of the double array.
struct Unit {
  uint32_t bits;
  bool has_leaf() const { return (bits >> 8 & 1) != 0; }
  uint32_t value() const { return bits & 0x7FFFFFFF; }
  uint32_t label() const { return bits & 0x800000FF; }
  uint32_t offset() const { return (bits >> 10) << ((bits & 0x200) >> 6); }
};

class CharacterMap {
 public:
  static absl::StatusOr<CharacterMap> FromJson(const JsonField& field) {
    absl::StatusOr<std::string> encoded = field.String();
    if (!encoded.ok()) return encoded.status();
    std::string bytes;
    if (!absl::Base64Unescape(*encoded, &bytes)) return field.Error("is not base64");
    uint32_t size = 0;
    if (bytes.size() >= sizeof(size)) std::memcpy(&size, bytes.data(), sizeof(size));
    if (bytes.size() < sizeof(size) || size > bytes.size() - sizeof(size) || size % 4 != 0 ||
        size == 0) {
      return field.Error("is no character map: it must be a size, a trie and texts");
    }
    CharacterMap map;
    map.units_.resize(size / 4);
    std::memcpy(map.units_.data(), bytes.data() + sizeof(size), size);
    map.texts_ = bytes.substr(sizeof(size) + size);
    if (FindInvalidUtf8(map.texts_).has_value()) return field.Error("has texts that are not UTF-8");
    return map;
  }

  // The text of the shortest key that `chunk` begins with.
  std::optional<absl::string_view> Find(absl::string_view chunk) const {
    uint32_t node = 0;
    if (!Step(&node, 0)) return std::nullopt;
    for (char c : chunk) {
      const uint32_t byte = static_cast<uint8_t>(c);
      node ^= byte;
      if (byte == 0 || node >= units_.size() || units_[node].label() != byte) return std::nullopt;
      const bool leaf = units_[node].has_leaf();
      if (!Step(&node, node)) return std::nullopt;
      if (leaf) return Text(units_[node].value());
    }
    return std::nullopt;
  }

 private:
  // Moves to where the children of `from` lie; false if the map is damaged there.
  bool Step(uint32_t* node, uint32_t from) const {
    *node ^= units_[from].offset();
    return *node < units_.size();
  }
  std::optional<absl::string_view> Text(uint32_t begin) const {
    if (begin > texts_.size()) return std::nullopt;
    if (begin < texts_.size() && IsUtf8Continuation(texts_[begin])) return std::nullopt;
    const absl::string_view text = absl::string_view(texts_).substr(begin);
    return text.substr(0, text.find('\0'));
  }

  std::vector<Unit> units_;
  std::string texts_;
};

// Between two ASCII characters there is always a boundary, but for CR LF.
bool IsBoundary(absl::string_view text, size_t at) {
  const auto ascii = [](char c) { return static_cast<unsigned char>(c) < 0x80; };
  return ascii(text[at - 1]) && ascii(text[at]) && !(text[at - 1] == '\r' && text[at] == '\n');
}

class Precompiled : public Normalizer {
 public:
  Precompiled(CharacterMap map, std::unique_ptr<icu::BreakIterator> graphemes)
      : map_(std::move(map)), graphemes_(std::move(graphemes)) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    const absl::string_view text = piece->view();
    PieceRewriter rewriter(*piece);
    std::unique_ptr<icu::BreakIterator> iterator;  // ICU's are not for several threads
    for (size_t begin = 0; begin < text.size();) {
      size_t end = begin + 1;
      while (end < text.size() && !IsBoundary(text, end)) ++end;
      if (end == begin + 1) {
        RewriteGrapheme(text, begin, end, &rewriter);
      } else {
        if (iterator == nullptr) iterator.reset(graphemes_->clone());
        if (absl::Status s = RewriteStretch(text, begin, end, iterator.get(), &rewriter); !s.ok()) {
          return s;
        }
      }
      begin = end;
    }
    if (rewriter.text() != text) rewriter.Finish(buffers, piece);
    return absl::OkStatus();
  }

 private:
  absl::Status RewriteStretch(absl::string_view text, size_t begin, size_t end,
                              icu::BreakIterator* iterator, PieceRewriter* rewriter) const {
    UErrorCode code = U_ZERO_ERROR;
    UText* view =
        utext_openUTF8(nullptr, text.data() + begin, static_cast<int64_t>(end - begin), &code);
    if (U_SUCCESS(code)) iterator->setText(view, code);
    if (U_SUCCESS(code)) {
      int32_t from = iterator->first();
      for (int32_t to = iterator->next(); to != icu::BreakIterator::DONE; to = iterator->next()) {
        RewriteGrapheme(text, begin + static_cast<size_t>(from), begin + static_cast<size_t>(to),
                        rewriter);
        from = to;
      }
    }
    utext_close(view);
    if (U_FAILURE(code)) {
      return absl::InternalError(absl::StrCat("grapheme boundaries: ", u_errorName(code)));
    }
    return absl::OkStatus();
  }

  void RewriteGrapheme(absl::string_view text, size_t begin, size_t end,
                       PieceRewriter* rewriter) const {
    if (end - begin < kWholeGraphemeBytes) {
      if (const auto found = map_.Find(text.substr(begin, end - begin))) {
        rewriter->Put(*found, begin, end);
        return;
      }
    }
    for (size_t i = begin; i < end;) {
      const size_t from = i;
      NextCodePoint(text, &i);
      if (const auto found = map_.Find(text.substr(from, i - from))) {
        rewriter->Put(*found, from, i);
      } else {
        rewriter->Keep(from, i);
      }
    }
  }

  CharacterMap map_;
  std::unique_ptr<icu::BreakIterator> graphemes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<const Normalizer>> MakePrecompiled(const JsonField& field) {
  if (!field.Get("precompiled_charsmap").has_value()) return nullptr;
  absl::StatusOr<CharacterMap> map = CharacterMap::FromJson(field.Get("precompiled_charsmap"));
  if (!map.ok()) return map.status();
  UErrorCode code = U_ZERO_ERROR;
  std::unique_ptr<icu::BreakIterator> graphemes(
      icu::BreakIterator::createCharacterInstance(icu::Locale::getRoot(), code));
  if (U_FAILURE(code)) {
    return absl::InternalError(absl::StrCat("grapheme boundaries: ", u_errorName(code)));
  }
  return std::make_unique<Precompiled>(*std::move(map), std::move(graphemes));
}

}  // namespace attune
