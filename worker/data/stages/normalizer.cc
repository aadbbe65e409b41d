#include "worker/data/stages/normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

absl::Status IcuError(UErrorCode code) {
  return absl::InternalError(absl::StrCat("Unicode normalisation: ", u_errorName(code)));
}

// Works segment by segment, from one normalisation boundary to the next: a segment that changes
// has, for each of its bytes, the whole segment as its origin.
class UnicodeForm : public Normalizer {
 public:
  explicit UnicodeForm(const icu::Normalizer2* form) : form_(form) {}

  absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const override {
    const absl::string_view text = piece->view();
    UErrorCode code = U_ZERO_ERROR;
    const bool same = form_->isNormalizedUTF8(
        icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), code);
    if (U_FAILURE(code)) return IcuError(code);
    if (same) return absl::OkStatus();

    std::string out;
    std::vector<ByteSpan> origin;
    out.reserve(text.size());
    origin.reserve(text.size());
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = SegmentEnd(text, begin);
      const absl::string_view segment = text.substr(begin, end - begin);
      const size_t out_begin = out.size();
      icu::StringByteSink<std::string> sink(&out);
      form_->normalizeUTF8(0,
                           icu::StringPiece(segment.data(), static_cast<int32_t>(segment.size())),
                           sink, nullptr, code);
      if (U_FAILURE(code)) return IcuError(code);
      const bool unchanged = absl::string_view(out).substr(out_begin) == segment;
      for (size_t i = out_begin; i < out.size(); ++i) {
        const int64_t at = piece->begin + static_cast<int64_t>(begin + (i - out_begin));
        origin.push_back(unchanged ? piece->text->Origin(at, at + 1)
                                   : piece->text->Origin(piece->begin + static_cast<int64_t>(begin),
                                                         piece->begin + static_cast<int64_t>(end)));
      }
      begin = end;
    }
    const int64_t size = static_cast<int64_t>(out.size());
    buffers->emplace_back(std::move(out), std::move(origin));
    *piece = Piece{.text = &buffers->back(), .begin = 0, .end = size};
    return absl::OkStatus();
  }

 private:
  size_t SegmentEnd(absl::string_view text, size_t begin) const {
    size_t i = begin;
    NextCodePoint(text, &i);
    while (i < text.size()) {
      size_t next = i;
      if (form_->hasBoundaryBefore(static_cast<UChar32>(NextCodePoint(text, &next)))) break;
      i = next;
    }
    return i;
  }

  const icu::Normalizer2* form_;
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

absl::StatusOr<std::unique_ptr<const Normalizer>> MakeForm(
    const icu::Normalizer2* (*instance)(UErrorCode&)) {
  UErrorCode code = U_ZERO_ERROR;
  const icu::Normalizer2* form = instance(code);
  if (U_FAILURE(code)) return IcuError(code);
  return std::make_unique<UnicodeForm>(form);
}

}  // namespace

absl::StatusOr<std::unique_ptr<const Normalizer>> MakeNormalizer(const JsonField& field) {
  if (!field.has_value()) return nullptr;
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "NFC") return MakeForm(icu::Normalizer2::getNFCInstance);
  if (*type == "NFD") return MakeForm(icu::Normalizer2::getNFDInstance);
  if (*type == "NFKC") return MakeForm(icu::Normalizer2::getNFKCInstance);
  if (*type == "NFKD") return MakeForm(icu::Normalizer2::getNFKDInstance);
  if (*type != "Sequence") {
    return absl::UnimplementedError(
        absl::StrCat(field.Get("type").Error("").message(), "is \"", *type,
                     "\"; attune reads the normalizers NFC, NFD, NFKC, NFKD and Sequence"));
  }
  const JsonField list = field.Get("normalizers");
  absl::StatusOr<const Json*> array = list.Array();
  if (!array.ok()) return array.status();
  std::vector<std::unique_ptr<const Normalizer>> parts;
  for (size_t i = 0; i < (*array)->size(); ++i) {
    absl::StatusOr<std::unique_ptr<const Normalizer>> part = MakeNormalizer(list.At(i));
    if (!part.ok()) return part.status();
    if (*part != nullptr) parts.push_back(*std::move(part));
  }
  return std::make_unique<NormalizerSequence>(std::move(parts));
}

}  // namespace attune
