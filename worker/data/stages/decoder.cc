#include "worker/data/stages/decoder.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "worker/data/stages/byte_level.h"
#include "worker/data/stages/metaspace.h"
#include "worker/data/stages/replacement.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

using Tokens = std::vector<std::string>;
using Steps = std::vector<std::unique_ptr<const DecoderStep>>;

// The bytes of a character may be spread over tokens, so they are put together first. A token with
// a character outside the alphabet stands for itself.
class ByteLevelStep : public DecoderStep {
 public:
  absl::Status Apply(Tokens* tokens) const override {
    std::string bytes;
    for (const std::string& token : *tokens) {
      const std::optional<std::string> decoded = VisibleToBytes(token);
      bytes.append(decoded.has_value() ? *decoded : token);
    }
    *tokens = {ReplaceInvalidUtf8(bytes)};
    return absl::OkStatus();
  }
};

class FuseStep : public DecoderStep {
 public:
  absl::Status Apply(Tokens* tokens) const override {
    *tokens = {absl::StrJoin(*tokens, "")};
    return absl::OkStatus();
  }
};

// Runs of "<0xNN>" become the text of their bytes, or one U+FFFD for each if they are no UTF-8.
class ByteFallbackStep : public DecoderStep {
 public:
  absl::Status Apply(Tokens* tokens) const override {
    Tokens out;
    std::string bytes;
    const auto flush = [&] {
      if (bytes.empty()) return;
      if (FindInvalidUtf8(bytes).has_value()) {
        out.insert(out.end(), bytes.size(), "\xEF\xBF\xBD");
      } else {
        out.push_back(bytes);
      }
      bytes.clear();
    };
    for (std::string& token : *tokens) {
      if (const std::optional<char> byte = ByteOf(token)) {
        bytes.push_back(*byte);
        continue;
      }
      flush();
      out.push_back(std::move(token));
    }
    flush();
    *tokens = std::move(out);
    return absl::OkStatus();
  }

 private:
  static std::optional<char> ByteOf(absl::string_view token) {
    uint32_t value = 0;
    if (token.size() != 6 || !absl::StartsWith(token, "<0x") || token.back() != '>') {
      return std::nullopt;
    }
    const absl::string_view digits = token.substr(3, 2);
    if (!std::all_of(digits.begin(), digits.end(), absl::ascii_isxdigit) ||
        !absl::SimpleHexAtoi(digits, &value)) {
      return std::nullopt;
    }
    return static_cast<char>(value);
  }
};

class ReplaceStep : public DecoderStep {
 public:
  explicit ReplaceStep(Replacement replacement) : replacement_(std::move(replacement)) {}

  absl::Status Apply(Tokens* tokens) const override {
    std::vector<ByteSpan> matches;
    for (std::string& token : *tokens) {
      if (absl::Status s = replacement_.FindAll(token, &matches); !s.ok()) return s;
      if (matches.empty()) continue;
      std::string out;
      int64_t done = 0;
      for (const ByteSpan& match : matches) {
        out.append(token, static_cast<size_t>(done), static_cast<size_t>(match.begin - done));
        out.append(replacement_.content());
        done = match.end;
      }
      out.append(token, static_cast<size_t>(done));
      token = std::move(out);
    }
    return absl::OkStatus();
  }

 private:
  Replacement replacement_;
};

// Takes up to `start` characters that equal `content` from the front of each token, `stop` from
// its end.
class StripStep : public DecoderStep {
 public:
  StripStep(std::string content, int64_t start, int64_t stop)
      : content_(std::move(content)), start_(start), stop_(stop) {}

  absl::Status Apply(Tokens* tokens) const override {
    for (std::string& token : *tokens) {
      absl::string_view text = token;
      for (int64_t i = 0; i < start_ && absl::StartsWith(text, content_); ++i) {
        text.remove_prefix(content_.size());
      }
      for (int64_t i = 0; i < stop_ && absl::EndsWith(text, content_); ++i) {
        text.remove_suffix(content_.size());
      }
      token = std::string(text);
    }
    return absl::OkStatus();
  }

 private:
  std::string content_;
  int64_t start_, stop_;
};

class MetaspaceStep : public DecoderStep {
 public:
  explicit MetaspaceStep(Metaspace metaspace) : metaspace_(std::move(metaspace)) {}

  absl::Status Apply(Tokens* tokens) const override {
    for (size_t i = 0; i < tokens->size(); ++i) {
      const bool drop = i == 0 && metaspace_.scheme != Metaspace::Scheme::kNever;
      (*tokens)[i] =
          absl::StrReplaceAll((*tokens)[i], {{metaspace_.replacement, drop ? "" : " "}});
    }
    return absl::OkStatus();
  }

 private:
  Metaspace metaspace_;
};

// Removes the spaces that a split at punctuation and contractions leaves behind, one pattern after
// the other.
std::string CleanUp(absl::string_view text) {
  static constexpr std::pair<absl::string_view, absl::string_view> kRules[] = {
      {" .", "."},     {" ?", "?"},     {" !", "!"},           {" ,", ","},
      {" ' ", "'"},    {" n't", "n't"}, {" 'm", "'m"},         {" do not", " don't"},
      {" 's", "'s"},   {" 've", "'ve"}, {" 're", "'re"},
  };
  std::string out(text);
  for (const auto& rule : kRules) out = absl::StrReplaceAll(out, {rule});
  return out;
}

class WordPieceStep : public DecoderStep {
 public:
  WordPieceStep(std::string prefix, bool cleanup) : prefix_(std::move(prefix)), cleanup_(cleanup) {}

  absl::Status Apply(Tokens* tokens) const override {
    for (size_t i = 0; i < tokens->size(); ++i) {
      std::string& token = (*tokens)[i];
      if (i > 0) {
        token = absl::StartsWith(token, prefix_) ? token.substr(prefix_.size())
                                                 : absl::StrCat(" ", token);
      }
      if (cleanup_) token = CleanUp(token);
    }
    return absl::OkStatus();
  }

 private:
  std::string prefix_;
  bool cleanup_;
};

class BpeStep : public DecoderStep {
 public:
  explicit BpeStep(std::string suffix) : suffix_(std::move(suffix)) {}

  absl::Status Apply(Tokens* tokens) const override {
    for (size_t i = 0; i < tokens->size(); ++i) {
      const bool last = i + 1 == tokens->size();
      (*tokens)[i] = absl::StrReplaceAll((*tokens)[i], {{suffix_, last ? "" : " "}});
    }
    return absl::OkStatus();
  }

 private:
  std::string suffix_;
};

class CtcStep : public DecoderStep {
 public:
  CtcStep(std::string pad, std::string delimiter, bool cleanup)
      : pad_(std::move(pad)), delimiter_(std::move(delimiter)), cleanup_(cleanup) {}

  absl::Status Apply(Tokens* tokens) const override {
    tokens->erase(std::unique(tokens->begin(), tokens->end()), tokens->end());
    Tokens out;
    for (const std::string& token : *tokens) {
      std::string text = absl::StrReplaceAll(token, {{pad_, ""}});
      if (cleanup_) text = absl::StrReplaceAll(CleanUp(text), {{delimiter_, " "}});
      if (!text.empty()) out.push_back(std::move(text));
    }
    *tokens = std::move(out);
    return absl::OkStatus();
  }

 private:
  std::string pad_, delimiter_;
  bool cleanup_;
};

// A text that must not be empty: it is looked for.
absl::Status ReadText(const JsonField& field, absl::string_view fallback, std::string* text) {
  absl::StatusOr<std::string> value = field.StringOr(fallback);
  if (!value.ok()) return value.status();
  if (value->empty()) return field.Error("is empty");
  *text = *std::move(value);
  return absl::OkStatus();
}

absl::Status AddStrip(const JsonField& field, Steps* steps) {
  absl::StatusOr<std::string> content = field.Get("content").String();
  if (!content.ok()) return content.status();
  size_t end = 0;
  if (!content->empty()) NextCodePoint(*content, &end);
  if (content->empty() || end != content->size()) {
    return field.Get("content").Error("is not one character");
  }
  absl::StatusOr<int64_t> start = field.Get("start").IntOr(0);
  if (!start.ok()) return start.status();
  absl::StatusOr<int64_t> stop = field.Get("stop").IntOr(0);
  if (!stop.ok()) return stop.status();
  steps->push_back(std::make_unique<StripStep>(*std::move(content), *start, *stop));
  return absl::OkStatus();
}

absl::Status AddWordPiece(const JsonField& field, Steps* steps) {
  absl::StatusOr<std::string> prefix = field.Get("prefix").StringOr("##");
  if (!prefix.ok()) return prefix.status();
  absl::StatusOr<bool> cleanup = field.Get("cleanup").BoolOr(true);
  if (!cleanup.ok()) return cleanup.status();
  steps->push_back(std::make_unique<WordPieceStep>(*std::move(prefix), *cleanup));
  return absl::OkStatus();
}

absl::Status AddCtc(const JsonField& field, Steps* steps) {
  std::string pad, delimiter;
  if (absl::Status s = ReadText(field.Get("pad_token"), "<pad>", &pad); !s.ok()) return s;
  if (absl::Status s = ReadText(field.Get("word_delimiter_token"), "|", &delimiter); !s.ok()) {
    return s;
  }
  absl::StatusOr<bool> cleanup = field.Get("cleanup").BoolOr(true);
  if (!cleanup.ok()) return cleanup.status();
  steps->push_back(std::make_unique<CtcStep>(std::move(pad), std::move(delimiter), *cleanup));
  return absl::OkStatus();
}

absl::Status AddReplace(const JsonField& field, Steps* steps) {
  absl::StatusOr<Replacement> replacement = Replacement::FromJson(field);
  if (!replacement.ok()) return replacement.status();
  steps->push_back(std::make_unique<ReplaceStep>(*std::move(replacement)));
  return absl::OkStatus();
}

absl::Status AddMetaspace(const JsonField& field, Steps* steps) {
  absl::StatusOr<Metaspace> metaspace = Metaspace::FromJson(field);
  if (!metaspace.ok()) return metaspace.status();
  steps->push_back(std::make_unique<MetaspaceStep>(*std::move(metaspace)));
  return absl::OkStatus();
}

absl::Status AddBpe(const JsonField& field, Steps* steps) {
  std::string suffix;
  if (absl::Status s = ReadText(field.Get("suffix"), "</w>", &suffix); !s.ok()) return s;
  steps->push_back(std::make_unique<BpeStep>(std::move(suffix)));
  return absl::OkStatus();
}

absl::Status AddSteps(const JsonField& field, Steps* steps) {
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "Strip") return AddStrip(field, steps);
  if (*type == "WordPiece") return AddWordPiece(field, steps);
  if (*type == "CTC") return AddCtc(field, steps);
  if (*type == "Replace") return AddReplace(field, steps);
  if (*type == "Metaspace") return AddMetaspace(field, steps);
  if (*type == "BPEDecoder") return AddBpe(field, steps);
  if (*type == "ByteLevel") {
    steps->push_back(std::make_unique<ByteLevelStep>());
  } else if (*type == "Fuse") {
    steps->push_back(std::make_unique<FuseStep>());
  } else if (*type == "ByteFallback") {
    steps->push_back(std::make_unique<ByteFallbackStep>());
  } else if (*type == "Sequence") {
    const JsonField list = field.Get("decoders");
    absl::StatusOr<const Json*> array = list.Array();
    if (!array.ok()) return array.status();
    for (size_t i = 0; i < (*array)->size(); ++i) {
      if (absl::Status s = AddSteps(list.At(i), steps); !s.ok()) return s;
    }
  } else {
    return absl::UnimplementedError(absl::StrCat(
        field.Get("type").Error("").message(), "is \"", *type,
        "\"; attune reads the decoders ByteLevel, BPEDecoder, ByteFallback, CTC, Fuse, Metaspace, "
        "Replace, Sequence, Strip and WordPiece"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Decoder> Decoder::FromJson(const JsonField& field) {
  Decoder decoder;
  decoder.join_with_spaces_ = !field.has_value();
  if (!field.has_value()) return decoder;
  if (absl::Status s = AddSteps(field, &decoder.steps_); !s.ok()) return s;
  return decoder;
}

absl::StatusOr<std::string> Decoder::Decode(std::vector<std::string> tokens) const {
  if (join_with_spaces_) return absl::StrJoin(tokens, " ");
  for (const auto& step : steps_) {
    if (absl::Status s = step->Apply(&tokens); !s.ok()) return s;
  }
  return absl::StrJoin(tokens, "");
}

}  // namespace attune
