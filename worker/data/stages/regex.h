// Regular expressions of tokenizer.json, which are in Oniguruma's dialect, run by PCRE2 (JIT).
//
// Where the dialects differ the pattern is rewritten: \s and \w have Oniguruma's meaning, ^ and $
// match at every line, {n,m}+ repeats instead of being possessive. Constructs without an equal
// (nested classes, &&, \W in a class, \h, (*VERB)) are UNIMPLEMENTED by name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/tokenizer.h"

namespace attune {

class Regex {
 public:
  // INVALID_ARGUMENT with the place in the pattern.
  static absl::StatusOr<Regex> Compile(absl::string_view pattern);
  // Matches exactly this text.
  static absl::StatusOr<Regex> Literal(absl::string_view text);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  // All matches in `text` (valid UTF-8), left to right, not overlapping. An empty match directly
  // after another match is left out. RESOURCE_EXHAUSTED if matching passes PCRE2's limit.
  absl::Status FindAll(absl::string_view text, std::vector<ByteSpan>* matches) const;

 private:
  struct Code;
  explicit Regex(std::unique_ptr<const Code> code);
  std::unique_ptr<const Code> code_;
};

// The pattern as PCRE2 needs it.
absl::StatusOr<std::string> TranslateOniguruma(absl::string_view pattern);

}  // namespace attune
