#include "worker/data/stages/pre_tokenizer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/data/stages/byte_level.h"
#include "worker/data/stages/metaspace.h"
#include "worker/data/stages/regex.h"
#include "worker/data/stages/replacement.h"
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
template <typename Property>
class CharacterSplit : public PreTokenizerStep {
 public:
  CharacterSplit(Property property, SplitBehavior behavior)
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
  Property property_;
  SplitBehavior behavior_;
};

// Runs of characters of one class; the class -1 is left out.
template <typename ClassOf>
class ClassRuns : public PreTokenizerStep {
 public:
  explicit ClassRuns(ClassOf class_of) : class_of_(class_of) {}

  absl::Status Apply(PieceList* list) const override {
    return SplitPieces(list, SplitBehavior::kRemoved, /*invert=*/true,
                       [&](absl::string_view text, std::vector<ByteSpan>* matches) {
                         matches->clear();
                         int previous = -1;
                         for (size_t i = 0; i < text.size();) {
                           const int64_t begin = static_cast<int64_t>(i);
                           const int now = class_of_(NextCodePoint(text, &i));
                           const int64_t end = static_cast<int64_t>(i);
                           if (now >= 0 && now == previous) {
                             matches->back().end = end;
                           } else if (now >= 0) {
                             matches->push_back({begin, end});
                           }
                           previous = now;
                         }
                         return absl::OkStatus();
                       });
  }

 private:
  ClassOf class_of_;
};

// Cuts where the script changes. Characters of no script of their own (spaces, signs) stay with
// what is before them; at the beginning of a piece they are left out, as Hugging Face does.
class ScriptSplit : public PreTokenizerStep {
 public:
  absl::Status Apply(PieceList* list) const override {
    return SplitPieces(list, SplitBehavior::kRemoved, /*invert=*/true,
                       [](absl::string_view text, std::vector<ByteSpan>* matches) {
                         matches->clear();
                         int script = -1;
                         for (size_t i = 0; i < text.size();) {
                           const int64_t begin = static_cast<int64_t>(i);
                           const int now = ScriptOf(NextCodePoint(text, &i));
                           if (now >= 0 && now != script) {
                             matches->push_back({begin, begin});
                             script = now;
                           }
                           if (!matches->empty()) matches->back().end = static_cast<int64_t>(i);
                         }
                         return absl::OkStatus();
                       });
  }
};

class FixedLengthSplit : public PreTokenizerStep {
 public:
  explicit FixedLengthSplit(int64_t length) : length_(length) {}

  absl::Status Apply(PieceList* list) const override {
    return SplitPieces(list, SplitBehavior::kIsolated, /*invert=*/false,
                       [&](absl::string_view text, std::vector<ByteSpan>* matches) {
                         matches->clear();
                         int64_t characters = 0;
                         for (size_t i = 0; i < text.size();) {
                           const int64_t begin = static_cast<int64_t>(i);
                           NextCodePoint(text, &i);
                           if (characters++ % length_ == 0) matches->push_back({begin, begin});
                           matches->back().end = static_cast<int64_t>(i);
                         }
                         return absl::OkStatus();
                       });
  }

 private:
  int64_t length_;
};

class PrefixSpace : public PreTokenizerStep {
 public:
  absl::Status Apply(PieceList* list) const override {
    for (Piece& piece : list->pieces) {
      if (piece.token >= 0 || piece.view().front() == ' ') continue;
      PieceRewriter rewriter(piece);
      rewriter.Put(" ", 0, 0);
      rewriter.Keep(0, piece.view().size());
      rewriter.Finish(&list->buffers, &piece);
    }
    return absl::OkStatus();
  }
};

class MetaspaceStep : public PreTokenizerStep {
 public:
  explicit MetaspaceStep(Metaspace metaspace) : metaspace_(std::move(metaspace)) {}

  absl::Status Apply(PieceList* list) const override {
    for (Piece& piece : list->pieces) {
      if (piece.token < 0) Rewrite(list, &piece);
    }
    if (!metaspace_.split) return absl::OkStatus();
    return SplitPieces(list, SplitBehavior::kMergedWithNext, /*invert=*/false,
                       [&](absl::string_view text, std::vector<ByteSpan>* matches) {
                         const absl::string_view space = metaspace_.replacement;
                         matches->clear();
                         for (size_t at = text.find(space); at != absl::string_view::npos;
                              at = text.find(space, at + space.size())) {
                           matches->push_back({static_cast<int64_t>(at),
                                               static_cast<int64_t>(at + space.size())});
                         }
                         return absl::OkStatus();
                       });
  }

 private:
  void Rewrite(PieceList* list, Piece* piece) const {
    const absl::string_view text = piece->view();
    const absl::string_view space = metaspace_.replacement;
    const bool has_space = text.front() == ' ' || text.substr(0, space.size()) == space;
    const bool begins_input = piece->text->Origin(piece->begin, piece->begin).begin == 0;
    const bool prepend = !has_space && (metaspace_.scheme == Metaspace::Scheme::kAlways ||
                                        (metaspace_.scheme == Metaspace::Scheme::kFirst &&
                                         begins_input));
    size_t at = text.find(' ');
    if (!prepend && at == absl::string_view::npos) return;
    PieceRewriter rewriter(*piece);
    if (prepend) rewriter.Put(space, 0, 0);
    size_t done = 0;
    for (; at != absl::string_view::npos; at = text.find(' ', done)) {
      rewriter.Keep(done, at);
      rewriter.Put(space, at, at + 1);
      done = at + 1;
    }
    rewriter.Keep(done, text.size());
    rewriter.Finish(&list->buffers, piece);
  }

  Metaspace metaspace_;
};

// Writes each byte as its visible character; each has the whole character as its origin.
class BytesToVisible : public PreTokenizerStep {
 public:
  absl::Status Apply(PieceList* list) const override {
    std::string visible;
    for (Piece& piece : list->pieces) {
      if (piece.token >= 0) continue;
      const absl::string_view from = piece.view();
      PieceRewriter rewriter(piece);
      for (size_t i = 0; i < from.size();) {
        const size_t begin = i;
        NextCodePoint(from, &i);
        visible.clear();
        for (size_t byte = begin; byte < i; ++byte) {
          AppendUtf8(ByteToVisible(static_cast<uint8_t>(from[byte])), &visible);
        }
        rewriter.Put(visible, begin, i);
      }
      rewriter.Finish(&list->buffers, &piece);
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
  absl::StatusOr<SplitBehavior> behavior = ParseBehavior(field.Get("behavior"), "");
  if (!behavior.ok()) return behavior.status();
  absl::StatusOr<bool> invert = field.Get("invert").BoolOr(false);
  if (!invert.ok()) return invert.status();
  absl::StatusOr<Regex> regex = CompilePattern(field.Get("pattern"));
  if (!regex.ok()) return regex.status();
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

template <typename Property>
void AddCharacterSplit(Property property, SplitBehavior behavior, Steps* steps) {
  steps->push_back(std::make_unique<CharacterSplit<Property>>(property, behavior));
}

template <typename ClassOf>
void AddClassRuns(ClassOf class_of, Steps* steps) {
  steps->push_back(std::make_unique<ClassRuns<ClassOf>>(class_of));
}

absl::Status AddDigits(const JsonField& field, Steps* steps) {
  absl::StatusOr<bool> individual = field.Get("individual_digits").BoolOr(false);
  if (!individual.ok()) return individual.status();
  AddCharacterSplit(IsNumeric,
                    *individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, steps);
  return absl::OkStatus();
}

absl::Status AddPunctuation(const JsonField& field, Steps* steps) {
  absl::StatusOr<SplitBehavior> behavior = ParseBehavior(field.Get("behavior"), "Isolated");
  if (!behavior.ok()) return behavior.status();
  AddCharacterSplit(IsPunctuation, *behavior, steps);
  return absl::OkStatus();
}

absl::Status AddDelimiter(const JsonField& field, Steps* steps) {
  const JsonField delimiter = field.Get("delimiter");
  absl::StatusOr<std::string> text = delimiter.String();
  if (!text.ok()) return text.status();
  size_t end = 0;
  const char32_t character = text->empty() ? 0 : NextCodePoint(*text, &end);
  if (end == 0 || end != text->size()) return delimiter.Error("is not one character");
  AddCharacterSplit([character](char32_t c) { return c == character; }, SplitBehavior::kRemoved,
                    steps);
  return absl::OkStatus();
}

absl::Status AddFixedLength(const JsonField& field, Steps* steps) {
  absl::StatusOr<int64_t> length = field.Get("length").IntOr(5);
  if (!length.ok()) return length.status();
  if (*length < 1) return field.Get("length").Error("must be at least 1");
  steps->push_back(std::make_unique<FixedLengthSplit>(*length));
  return absl::OkStatus();
}

absl::Status AddMetaspace(const JsonField& field, Steps* steps) {
  absl::StatusOr<Metaspace> metaspace = Metaspace::FromJson(field);
  if (!metaspace.ok()) return metaspace.status();
  steps->push_back(std::make_unique<MetaspaceStep>(*std::move(metaspace)));
  return absl::OkStatus();
}

// The types without options; false for another.
bool AddPlain(absl::string_view type, Steps* steps) {
  if (type == "WhitespaceSplit") {
    AddCharacterSplit(IsWhiteSpace, SplitBehavior::kRemoved, steps);
  } else if (type == "Whitespace") {  // \w+|[^\w\s]+
    AddClassRuns([](char32_t c) { return IsWhiteSpace(c) ? -1 : IsWordCharacter(c) ? 1 : 0; },
                 steps);
  } else if (type == "BertPreTokenizer") {
    AddCharacterSplit(IsWhiteSpace, SplitBehavior::kRemoved, steps);
    AddCharacterSplit(IsPunctuation, SplitBehavior::kIsolated, steps);
  } else if (type == "UnicodeScripts") {
    steps->push_back(std::make_unique<ScriptSplit>());
  } else {
    return false;
  }
  return true;
}

absl::Status AddSteps(const JsonField& field, Steps* steps) {
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "Split") return AddSplit(field, steps);
  if (*type == "ByteLevel") return AddByteLevel(field, steps);
  if (*type == "Metaspace") return AddMetaspace(field, steps);
  if (*type == "Digits") return AddDigits(field, steps);
  if (*type == "Punctuation") return AddPunctuation(field, steps);
  if (*type == "CharDelimiterSplit") return AddDelimiter(field, steps);
  if (*type == "FixedLength") return AddFixedLength(field, steps);
  if (*type == "Sequence") {
    const JsonField list = field.Get("pretokenizers");
    absl::StatusOr<const Json*> array = list.Array();
    if (!array.ok()) return array.status();
    for (size_t i = 0; i < (*array)->size(); ++i) {
      if (absl::Status s = AddSteps(list.At(i), steps); !s.ok()) return s;
    }
    return absl::OkStatus();
  }
  if (AddPlain(*type, steps)) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      field.Get("type").Error("").message(), "is \"", *type,
      "\"; attune reads the pre-tokenizers Split, ByteLevel, Metaspace, Digits, Punctuation, "
      "Sequence, BertPreTokenizer, CharDelimiterSplit, FixedLength, UnicodeScripts, Whitespace and "
      "WhitespaceSplit"));
}

}  // namespace

absl::Status PreTokenizer::Apply(PieceList* list) const {
  for (const auto& step : steps) {
    if (absl::Status s = step->Apply(list); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::StatusOr<PreTokenizer> MakePreTokenizer(const JsonField& field, bool model_takes_bytes) {
  PreTokenizer pre_tokenizer;
  if (!field.has_value()) return pre_tokenizer;
  if (absl::Status s = AddSteps(field, &pre_tokenizer.steps); !s.ok()) return s;
  if (model_takes_bytes && !pre_tokenizer.steps.empty() &&
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
