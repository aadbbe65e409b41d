#include "worker/data/stages/replacement.h"

#include <utility>

namespace attune {

absl::StatusOr<Regex> CompilePattern(const JsonField& pattern) {
  const bool literal = pattern.Get("String").has_value();
  const JsonField field = pattern.Get(literal ? "String" : "Regex");
  absl::StatusOr<std::string> text = field.String();
  if (!text.ok()) return text.status();
  if (literal && text->empty()) return field.Error("is empty");
  absl::StatusOr<Regex> regex = literal ? Regex::Literal(*text) : Regex::Compile(*text);
  if (!regex.ok()) {
    return absl::Status(regex.status().code(), field.Error(regex.status().message()).message());
  }
  return regex;
}

absl::StatusOr<Replacement> Replacement::FromJson(const JsonField& field) {
  Replacement replacement;
  absl::StatusOr<std::string> content = field.Get("content").String();
  if (!content.ok()) return content.status();
  replacement.content_ = *std::move(content);
  const JsonField pattern = field.Get("pattern");
  absl::StatusOr<Regex> regex = CompilePattern(pattern);
  if (!regex.ok()) return regex.status();
  if (pattern.Get("String").has_value()) {
    replacement.literal_ = pattern.Get("String").json()->get<std::string>();
  } else {
    replacement.regex_ = *std::move(regex);
  }
  return replacement;
}

absl::Status Replacement::FindAll(absl::string_view text, std::vector<ByteSpan>* matches) const {
  if (regex_.has_value()) return regex_->FindAll(text, matches);
  matches->clear();
  for (size_t at = text.find(literal_); at != absl::string_view::npos;
       at = text.find(literal_, at + literal_.size())) {
    const int64_t begin = static_cast<int64_t>(at);
    matches->push_back({begin, begin + static_cast<int64_t>(literal_.size())});
  }
  return absl::OkStatus();
}

}  // namespace attune
