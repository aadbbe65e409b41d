#include "worker/data/stages/pre_tokenizer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/data/stages/byte_level.h"
#include "worker/data/stages/regex.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

// The split of GPT-2, which ByteLevel applies with use_regex.
constexpr absl::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class SplitBehavior : uint8_t {
  kRemoved,
  kIsolated,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous
};

struct Part {
  ByteSpan span;
  bool match = false;
};

// Joins parts that the behaviour keeps together; `parts` are in order, or reversed for
// kMergedWithNext.
std::vector<Part> MergeParts(const std::vector<Part>& parts, SplitBehavior behavior) {
  std::vector<Part> merged;
  bool previous_match = false;
  for (const Part& part : parts) {
    const bool join = behavior == SplitBehavior::kContiguous ? part.match == previous_match
                                                             : part.match && !previous_match;
    if (join && !merged.empty()) {
      merged.back().span.begin = std::min(merged.back().span.begin, part.span.begin);
      merged.back().span.end = std::max(merged.back().span.end, part.span.end);
    } else {
      merged.push_back(part);
    }
    previous_match = part.match;
  }
  return merged;
}

// Splits the text pieces by `matches_of(text, &matches)`.
template <typename MatchesOf>
absl::Status SplitPieces(PieceList* list, SplitBehavior behavior, bool invert,
                         const MatchesOf& matches_of) {
  std::vector<Piece> pieces;
  pieces.reserve(list->pieces.size());
  std::vector<ByteSpan> matches;
  std::vector<Part> parts;
  for (const Piece& piece : list->pieces) {
    if (piece.token >= 0) {
      pieces.push_back(piece);
      continue;
    }
    if (absl::Status s = matches_of(piece.view(), &matches); !s.ok()) return s;
    parts.clear();
    int64_t end = 0;
    for (const ByteSpan& match : matches) {
      if (match.begin > end) parts.push_back({{end, match.begin}, invert});
      parts.push_back({match, !invert});
      end = match.end;
    }
    const int64_t size = piece.end - piece.begin;
    if (end < size) parts.push_back({{end, size}, invert});
    if (behavior == SplitBehavior::kMergedWithNext) std::reverse(parts.begin(), parts.end());
    if (behavior != SplitBehavior::kRemoved && behavior != SplitBehavior::kIsolated) {
      parts = MergeParts(parts, behavior);
    }
    if (behavior == SplitBehavior::kMergedWithNext) std::reverse(parts.begin(), parts.end());
    for (const Part& part : parts) {
      if (behavior == SplitBehavior::kRemoved && part.match) continue;
      if (part.span.begin == part.span.end) continue;
      pieces.push_back({piece.text, piece.begin + part.span.begin, piece.begin + part.span.end});
    }
  }
  list->pieces = std::move(pieces);
  return absl::OkStatus();
}

class RegexSplit : public PreTokenizerStep {
 public:
  RegexSplit(Regex regex, SplitBehavior behavior, bool invert)
      : regex_(std::move(regex)), behavior_(behavior), invert_(invert) {}

  absl::Status Apply(PieceList* list) const override {
    return SplitPieces(list, behavior_, invert_,
                       [&](absl::string_view text, std::vector<ByteSpan>* matches) {
                         return regex_.FindAll(text, matches);
                       });
  }

 private:
  Regex regex_;
  SplitBehavior behavior_;
  bool invert_;
};

// Each character with the property is a match of its own.
class CharacterSplit : public PreTokenizerStep {
 public:
  CharacterSplit(bool (*property)(char32_t), SplitBehavior behavior)
      : property_(property), behavior_(behavior) {}

  absl::Status Apply(PieceList* list) const override {
    return SplitPieces(list, behavior_, /*invert=*/false,
                       [&](absl::string_view text, std::vector<ByteSpan>* matches) {
                         matches->clear();
                         for (size_t i = 0; i < text.size();) {
                           const int64_t begin = static_cast<int64_t>(i);
                           if (property_(NextCodePoint(text, &i))) {
                             matches->push_back({begin, static_cast<int64_t>(i)});
                           }
                         }
                         return absl::OkStatus();
                       });
  }

 private:
  bool (*property_)(char32_t);
  SplitBehavior behavior_;
};

class PrefixSpace : public PreTokenizerStep {
 public:
  absl::Status Apply(PieceList* list) const override {
    for (Piece& piece : list->pieces) {
      if (piece.token >= 0 || piece.view().front() == ' ') continue;
      std::string text = absl::StrCat(" ", piece.view());
      std::vector<ByteSpan> origin;
      origin.reserve(text.size());
      origin.push_back(piece.text->Origin(piece.begin, piece.begin));
      for (int64_t i = piece.begin; i < piece.end; ++i) {
        origin.push_back(piece.text->Origin(i, i + 1));
      }
      const int64_t size = static_cast<int64_t>(text.size());
      list->buffers.emplace_back(std::move(text), std::move(origin));
      piece = {&list->buffers.back(), 0, size};
    }
    return absl::OkStatus();
  }
};

// Writes each byte as its visible character; each has the whole character as its origin.
class BytesToVisible : public PreTokenizerStep {
 public:
  absl::Status Apply(PieceList* list) const override {
    for (Piece& piece : list->pieces) {
      if (piece.token >= 0) continue;
      const absl::string_view from = piece.view();
      std::string text;
      std::vector<ByteSpan> origin;
      for (size_t i = 0; i < from.size();) {
        const size_t begin = i;
        NextCodePoint(from, &i);
        const ByteSpan character = piece.text->Origin(piece.begin + static_cast<int64_t>(begin),
                                                      piece.begin + static_cast<int64_t>(i));
        for (size_t byte = begin; byte < i; ++byte) {
          AppendUtf8(ByteToVisible(static_cast<uint8_t>(from[byte])), &text);
          origin.resize(text.size(), character);
        }
      }
      const int64_t size = static_cast<int64_t>(text.size());
      list->buffers.emplace_back(std::move(text), std::move(origin));
      piece = {&list->buffers.back(), 0, size};
    }
    return absl::OkStatus();
  }
};

using Steps = std::vector<std::unique_ptr<const PreTokenizerStep>>;

absl::StatusOr<SplitBehavior> ParseBehavior(const JsonField& field, absl::string_view fallback) {
  absl::StatusOr<std::string> name = field.StringOr(fallback);
  if (!name.ok()) return name.status();
  if (*name == "Removed") return SplitBehavior::kRemoved;
  if (*name == "Isolated") return SplitBehavior::kIsolated;
  if (*name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (*name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (*name == "Contiguous") return SplitBehavior::kContiguous;
  return field.Error(absl::StrCat("is \"", *name, "\", which is no behaviour of a split"));
}

absl::Status AddSplit(const JsonField& field, Steps* steps) {
  const JsonField pattern = field.Get("pattern");
  const bool literal = pattern.Get("String").has_value();
  const JsonField text_field = pattern.Get(literal ? "String" : "Regex");
  absl::StatusOr<std::string> text = text_field.String();
  if (!text.ok()) return text.status();
  absl::StatusOr<SplitBehavior> behavior = ParseBehavior(field.Get("behavior"), "");
  if (!behavior.ok()) return behavior.status();
  absl::StatusOr<bool> invert = field.Get("invert").BoolOr(false);
  if (!invert.ok()) return invert.status();
  if (literal && text->empty()) return text_field.Error("is empty");
  absl::StatusOr<Regex> regex = literal ? Regex::Literal(*text) : Regex::Compile(*text);
  if (!regex.ok()) {
    return absl::Status(regex.status().code(),
                        text_field.Error(regex.status().message()).message());
  }
  steps->push_back(std::make_unique<RegexSplit>(*std::move(regex), *behavior, *invert));
  return absl::OkStatus();
}

absl::Status AddByteLevel(const JsonField& field, Steps* steps) {
  absl::StatusOr<bool> prefix_space = field.Get("add_prefix_space").BoolOr(true);
  if (!prefix_space.ok()) return prefix_space.status();
  absl::StatusOr<bool> use_regex = field.Get("use_regex").BoolOr(true);
  if (!use_regex.ok()) return use_regex.status();
  // Only the offsets that Hugging Face shows depend on it; ours always cover the whole token.
  absl::StatusOr<bool> trim = field.Get("trim_offsets").BoolOr(true);
  if (!trim.ok()) return trim.status();
  if (*prefix_space) steps->push_back(std::make_unique<PrefixSpace>());
  if (*use_regex) {
    absl::StatusOr<Regex> regex = Regex::Compile(kGpt2Pattern);
    if (!regex.ok()) return regex.status();
    steps->push_back(
        std::make_unique<RegexSplit>(*std::move(regex), SplitBehavior::kIsolated, false));
  }
  steps->push_back(std::make_unique<BytesToVisible>());
  return absl::OkStatus();
}

absl::Status AddSteps(const JsonField& field, Steps* steps) {
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "Split") return AddSplit(field, steps);
  if (*type == "ByteLevel") return AddByteLevel(field, steps);
  if (*type == "Digits") {
    absl::StatusOr<bool> individual = field.Get("individual_digits").BoolOr(false);
    if (!individual.ok()) return individual.status();
    steps->push_back(std::make_unique<CharacterSplit>(
        IsNumeric, *individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous));
    return absl::OkStatus();
  }
  if (*type == "Punctuation") {
    absl::StatusOr<SplitBehavior> behavior = ParseBehavior(field.Get("behavior"), "Isolated");
    if (!behavior.ok()) return behavior.status();
    steps->push_back(std::make_unique<CharacterSplit>(IsPunctuation, *behavior));
    return absl::OkStatus();
  }
  if (*type == "Sequence") {
    const JsonField list = field.Get("pretokenizers");
    absl::StatusOr<const Json*> array = list.Array();
    if (!array.ok()) return array.status();
    for (size_t i = 0; i < (*array)->size(); ++i) {
      if (absl::Status s = AddSteps(list.At(i), steps); !s.ok()) return s;
    }
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat(
      field.Get("type").Error("").message(), "is \"", *type,
      "\"; attune reads the pre-tokenizers Split, ByteLevel, Digits, Punctuation and Sequence"));
}

}  // namespace

absl::Status PreTokenizer::Apply(PieceList* list) const {
  for (const auto& step : steps) {
    if (absl::Status s = step->Apply(list); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::StatusOr<PreTokenizer> MakePreTokenizer(const JsonField& field) {
  PreTokenizer pre_tokenizer;
  if (!field.has_value()) return pre_tokenizer;
  if (absl::Status s = AddSteps(field, &pre_tokenizer.steps); !s.ok()) return s;
  if (!pre_tokenizer.steps.empty() &&
      dynamic_cast<const BytesToVisible*>(pre_tokenizer.steps.back().get()) != nullptr) {
    pre_tokenizer.steps.pop_back();
    pre_tokenizer.bytes_to_visible_at_end = true;
  }
  if (pre_tokenizer.steps.size() > 64) {
    return field.Error("has more than 64 steps");
  }
  return pre_tokenizer;
}

}  // namespace attune
