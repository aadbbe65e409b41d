#include "worker/data/stages/normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uniset.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/data/stages/character_normalizer.h"
#include "worker/data/stages/precompiled.h"
#include "worker/data/stages/replacement.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

absl::Status IcuError(UErrorCode code) {
  return absl::InternalError(absl::StrCat("Unicode normalisation: ", u_errorName(code)));
}

// The normalisation tables of Hugging Face are those of Unicode 9: later characters stay as they
// are (U+32FF, the era name Reiwa, has a decomposition since 12.1).
const icu::UnicodeSet& NormalizedCharacters() {
  static const icu::UnicodeSet* set = [] {
    UErrorCode code = U_ZERO_ERROR;
    auto* made = new icu::UnicodeSet(icu::UnicodeString::fromUTF8("[:age=9.0:]"), code);
    made->freeze();
    return made;
  }();
  return *set;
}

// Works segment by segment, from one normalisation boundary to the next: a segment that changes
// has, for each of its bytes, the whole segment as its origin.
class UnicodeForm : public Normalizer {
 public:
  explicit UnicodeForm(const icu::Normalizer2* form)
      : full_(form), form_(*form, NormalizedCharacters()) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    const absl::string_view text = piece->view();
    UErrorCode code = U_ZERO_ERROR;
    const bool same = full_->isNormalizedUTF8(
        icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), code);
    if (U_FAILURE(code)) return IcuError(code);
    if (same) return absl::OkStatus();

    PieceRewriter rewriter(*piece);
    std::string normal;
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = SegmentEnd(text, begin);
      const absl::string_view segment = text.substr(begin, end - begin);
      normal.clear();
      icu::StringByteSink<std::string> sink(&normal);
      form_.normalizeUTF8(0,
                           icu::StringPiece(segment.data(), static_cast<int32_t>(segment.size())),
                           sink, nullptr, code);
      if (U_FAILURE(code)) return IcuError(code);
      if (normal == segment) {
        rewriter.Keep(begin, end);
      } else {
        rewriter.Put(normal, begin, end);
      }
      begin = end;
    }
    rewriter.Finish(buffers, piece);
    return absl::OkStatus();
  }

 private:
  size_t SegmentEnd(absl::string_view text, size_t begin) const {
    size_t i = begin;
    NextCodePoint(text, &i);
    while (i < text.size()) {
      size_t next = i;
      if (form_.hasBoundaryBefore(static_cast<UChar32>(NextCodePoint(text, &next)))) break;
      i = next;
    }
    return i;
  }

  const icu::Normalizer2* full_;  // tells faster whether there is anything to do
  const icu::FilteredNormalizer2 form_;
};

class ReplaceNormalizer : public Normalizer {
 public:
  explicit ReplaceNormalizer(Replacement replacement) : replacement_(std::move(replacement)) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    std::vector<ByteSpan> matches;
    if (absl::Status s = replacement_.FindAll(piece->view(), &matches); !s.ok()) return s;
    if (matches.empty()) return absl::OkStatus();
    PieceRewriter rewriter(*piece);
    int64_t done = 0;
    for (const ByteSpan& match : matches) {
      rewriter.Keep(static_cast<size_t>(done), static_cast<size_t>(match.begin));
      rewriter.Put(replacement_.content(), static_cast<size_t>(match.begin),
                   static_cast<size_t>(match.end));
      done = match.end;
    }
    rewriter.Keep(static_cast<size_t>(done), piece->view().size());
    rewriter.Finish(buffers, piece);
    return absl::OkStatus();
  }

 private:
  Replacement replacement_;
};

class PrependNormalizer : public Normalizer {
 public:
  explicit PrependNormalizer(std::string text) : text_(std::move(text)) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    PieceRewriter rewriter(*piece);
    rewriter.Put(text_, 0, 0);
    rewriter.Keep(0, piece->view().size());
    rewriter.Finish(buffers, piece);
    return absl::OkStatus();
  }

 private:
  std::string text_;
};

class StripNormalizer : public Normalizer {
 public:
  StripNormalizer(bool left, bool right) : left_(left), right_(right) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    const absl::string_view text = piece->view();
    size_t begin = 0;
    size_t end = text.size();
    for (size_t i = begin; left_ && i < end && IsWhiteSpace(NextCodePoint(text, &i));) begin = i;
    for (size_t i = end; right_ && i > begin && IsWhiteSpace(PreviousCodePoint(text, &i));) end = i;
    piece->end = piece->begin + static_cast<int64_t>(end);
    piece->begin += static_cast<int64_t>(begin);
    return absl::OkStatus();
  }

 private:
  bool left_, right_;
};

class NormalizerSequence : public Normalizer {
 public:
  explicit NormalizerSequence(std::vector<std::unique_ptr<const Normalizer>> parts)
      : parts_(std::move(parts)) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    for (const auto& part : parts_) {
      if (piece->begin == piece->end) break;
      if (absl::Status s = part->Normalize(buffers, piece); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

 private:
  std::vector<std::unique_ptr<const Normalizer>> parts_;
};

using NormalizerPtr = std::unique_ptr<const Normalizer>;

absl::StatusOr<NormalizerPtr> MakeStrip(const JsonField& field) {
  absl::StatusOr<bool> left = field.Get("strip_left").BoolOr(true);
  if (!left.ok()) return left.status();
  absl::StatusOr<bool> right = field.Get("strip_right").BoolOr(true);
  if (!right.ok()) return right.status();
  return std::make_unique<StripNormalizer>(*left, *right);
}

absl::StatusOr<NormalizerPtr> MakeSequence(const JsonField& field) {
  const JsonField list = field.Get("normalizers");
  absl::StatusOr<const Json*> array = list.Array();
  if (!array.ok()) return array.status();
  std::vector<NormalizerPtr> parts;
  for (size_t i = 0; i < (*array)->size(); ++i) {
    absl::StatusOr<NormalizerPtr> part = MakeNormalizer(list.At(i));
    if (!part.ok()) return part.status();
    if (*part != nullptr) parts.push_back(*std::move(part));
  }
  return std::make_unique<NormalizerSequence>(std::move(parts));
}

}  // namespace

absl::StatusOr<NormalizerPtr> MakeUnicodeForm(absl::string_view form) {
  UErrorCode code = U_ZERO_ERROR;
  const icu::Normalizer2* instance = form == "NFC"    ? icu::Normalizer2::getNFCInstance(code)
                                     : form == "NFD"  ? icu::Normalizer2::getNFDInstance(code)
                                     : form == "NFKC" ? icu::Normalizer2::getNFKCInstance(code)
                                                      : icu::Normalizer2::getNFKDInstance(code);
  if (U_FAILURE(code)) return IcuError(code);
  return std::make_unique<UnicodeForm>(instance);
}

absl::StatusOr<NormalizerPtr> MakeNormalizer(const JsonField& field) {
  if (!field.has_value()) return nullptr;
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "NFC" || *type == "NFD" || *type == "NFKC" || *type == "NFKD") {
    return MakeUnicodeForm(*type);
  }
  if (*type == "Sequence") return MakeSequence(field);
  if (*type == "Strip") return MakeStrip(field);
  if (*type == "Precompiled") return MakePrecompiled(field);
  if (*type == "Replace") {
    absl::StatusOr<Replacement> replacement = Replacement::FromJson(field);
    if (!replacement.ok()) return replacement.status();
    return std::make_unique<ReplaceNormalizer>(*std::move(replacement));
  }
  if (*type == "Prepend") {
    absl::StatusOr<std::string> text = field.Get("prepend").String();
    if (!text.ok()) return text.status();
    return std::make_unique<PrependNormalizer>(*std::move(text));
  }
  if (IsCharacterNormalizer(*type)) return MakeCharacterNormalizer(*type, field);
  return absl::UnimplementedError(absl::StrCat(
      field.Get("type").Error("").message(), "is \"", *type,
      "\"; attune reads the normalizers Sequence, NFC, NFD, NFKC, NFKD, Replace, Prepend, Strip, "
      "Lowercase, StripAccents, Nmt, BertNormalizer, ByteLevel and Precompiled"));
}

}  // namespace attune
