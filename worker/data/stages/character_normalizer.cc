#include "worker/data/stages/character_normalizer.h"

#include <algorithm>
#include <utility>

#include "worker/data/stages/byte_level.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

// Rewrites a piece by f(character, begin, end, rewriter), which keeps, puts or leaves out.
template <typename F>
void RewriteCharacters(std::deque<AlignedText>* buffers, Piece* piece, const F& f) {
  const absl::string_view text = piece->view();
  PieceRewriter rewriter(*piece);
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = NextCodePoint(text, &i);
    f(c, begin, i, &rewriter);
  }
  rewriter.Finish(buffers, piece);
}

void PutLower(char32_t c, size_t begin, size_t end, PieceRewriter* rewriter) {
  if (c < 0x80) {
    const char lower = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    rewriter->Put(absl::string_view(&lower, 1), begin, end);
    return;
  }
  std::string lower;
  AppendLowerUtf8(c, &lower);
  rewriter->Put(lower, begin, end);
}

class Lowercase : public Normalizer {
 public:
  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    RewriteCharacters(buffers, piece, PutLower);
    return absl::OkStatus();
  }
};

class StripAccents : public Normalizer {
 public:
  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    RewriteCharacters(buffers, piece, [](char32_t c, size_t begin, size_t end, PieceRewriter* out) {
      if (!IsMark(c)) out->Keep(begin, end);
    });
    return absl::OkStatus();
  }
};

// What Google's machine translation removes from text, and what it takes for a space.
class Nmt : public Normalizer {
 public:
  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    RewriteCharacters(buffers, piece, [](char32_t c, size_t begin, size_t end, PieceRewriter* out) {
      if (IsRemoved(c)) return;
      if (IsSpace(c)) {
        out->Put(" ", begin, end);
      } else {
        out->Keep(begin, end);
      }
    });
    return absl::OkStatus();
  }

 private:
  static bool IsRemoved(char32_t c) {
    return (c >= 0x1 && c <= 0x8) || c == 0xB || (c >= 0xE && c <= 0x1F) || c == 0x7F ||
           c == 0x8F || c == 0x9F;
  }
  static bool IsSpace(char32_t c) {
    return c == 0x9 || c == 0xA || c == 0xC || c == 0xD || c == 0x1680 ||
           (c >= 0x200B && c <= 0x200F) || c == 0x2028 || c == 0x2029 || c == 0x2581 ||
           c == 0xFEFF || c == 0xFFFD;
  }
};

class ByteLevelNormalizer : public Normalizer {
 public:
  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    const absl::string_view text = piece->view();
    std::string visible;
    RewriteCharacters(buffers, piece, [&](char32_t, size_t begin, size_t end, PieceRewriter* out) {
      visible.clear();
      for (size_t i = begin; i < end; ++i) {
        AppendUtf8(ByteToVisible(static_cast<uint8_t>(text[i])), &visible);
      }
      out->Put(visible, begin, end);
    });
    return absl::OkStatus();
  }
};

// The ranges of BERT's is_chinese_char, as Hugging Face has them.
bool IsCjkIdeograph(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) ||
         (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B81F) ||
         (c >= 0x2B920 && c <= 0x2CEAF) || (c >= 0xF900 && c <= 0xFAFF) ||
         (c >= 0x2F800 && c <= 0x2FA1F);
}

struct BertOptions {
  bool clean_text = true;
  bool handle_chinese_chars = true;
  bool strip_accents = true;
  bool lowercase = true;
};

class BertNormalizer : public Normalizer {
 public:
  BertNormalizer(const BertOptions& options, std::unique_ptr<const Normalizer> nfd)
      : options_(options), nfd_(std::move(nfd)) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    const absl::string_view text = piece->view();
    const bool ascii = std::all_of(text.begin(), text.end(), [](char c) { return c >= 0; });
    if (ascii) {  // neither ideographs nor accents
      RewriteCharacters(buffers, piece,
                        [&](char32_t c, size_t begin, size_t end, PieceRewriter* out) {
                          if (const auto clean = Clean(c)) PutCased(*clean, begin, end, out);
                        });
      return absl::OkStatus();
    }
    if (options_.clean_text || options_.handle_chinese_chars) {
      RewriteCharacters(buffers, piece,
                        [&](char32_t c, size_t begin, size_t end, PieceRewriter* out) {
                          if (const auto clean = Clean(c)) PutPadded(*clean, begin, end, out);
                        });
    }
    if (options_.strip_accents) {
      if (absl::Status s = nfd_->Normalize(buffers, piece); !s.ok()) return s;
    }
    if (options_.strip_accents || options_.lowercase) {
      RewriteCharacters(buffers, piece,
                        [&](char32_t c, size_t begin, size_t end, PieceRewriter* out) {
                          if (options_.strip_accents && IsNonspacingMark(c)) return;
                          PutCased(c, begin, end, out);
                        });
    }
    return absl::OkStatus();
  }

 private:
  std::optional<char32_t> Clean(char32_t c) const {
    if (!options_.clean_text) return c;
    if (c == '\t' || c == '\n' || c == '\r') return U' ';
    if (c == 0 || c == 0xFFFD || IsControl(c)) return std::nullopt;
    return IsWhiteSpace(c) ? U' ' : c;
  }
  void PutPadded(char32_t c, size_t begin, size_t end, PieceRewriter* out) const {
    std::string text;
    AppendUtf8(c, &text);
    if (options_.handle_chinese_chars && IsCjkIdeograph(c)) text = " " + text + " ";
    out->Put(text, begin, end);
  }
  void PutCased(char32_t c, size_t begin, size_t end, PieceRewriter* out) const {
    if (options_.lowercase) return PutLower(c, begin, end, out);
    std::string text;
    AppendUtf8(c, &text);
    out->Put(text, begin, end);
  }

  BertOptions options_;
  std::unique_ptr<const Normalizer> nfd_;
};

absl::StatusOr<std::unique_ptr<const Normalizer>> MakeBert(const JsonField& field) {
  BertOptions options;
  struct Option {
    absl::string_view key;
    bool* value;
  };
  for (const Option& option : {Option{"clean_text", &options.clean_text},
                               Option{"handle_chinese_chars", &options.handle_chinese_chars},
                               Option{"lowercase", &options.lowercase}}) {
    absl::StatusOr<bool> value = field.Get(option.key).BoolOr(true);
    if (!value.ok()) return value.status();
    *option.value = *value;
  }
  absl::StatusOr<bool> strip = field.Get("strip_accents").BoolOr(options.lowercase);
  if (!strip.ok()) return strip.status();
  options.strip_accents = *strip;
  absl::StatusOr<std::unique_ptr<const Normalizer>> nfd = MakeUnicodeForm("NFD");
  if (!nfd.ok()) return nfd.status();
  return std::make_unique<BertNormalizer>(options, *std::move(nfd));
}

}  // namespace

bool IsCharacterNormalizer(absl::string_view type) {
  return type == "Lowercase" || type == "StripAccents" || type == "Nmt" ||
         type == "BertNormalizer" || type == "ByteLevel";
}

absl::StatusOr<std::unique_ptr<const Normalizer>> MakeCharacterNormalizer(absl::string_view type,
                                                                          const JsonField& field) {
  if (type == "Lowercase") return std::make_unique<Lowercase>();
  if (type == "StripAccents") return std::make_unique<StripAccents>();
  if (type == "Nmt") return std::make_unique<Nmt>();
  if (type == "ByteLevel") return std::make_unique<ByteLevelNormalizer>();
  return MakeBert(field);
}

}  // namespace attune
