// A pattern and what stands in its place: {"pattern": {"String"|"Regex": ...}, "content": ...},
// as the normalizer and the decoder Replace have it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/stages/regex.h"
#include "worker/io/json.h"

namespace attune {

class Replacement {
 public:
  static absl::StatusOr<Replacement> FromJson(const JsonField& field);

  // As Regex::FindAll.
  absl::Status FindAll(absl::string_view text, std::vector<ByteSpan>* matches) const;
  const std::string& content() const { return content_; }

 private:
  std::string literal_;         // if there is no regex_
  std::optional<Regex> regex_;
  std::string content_;
};

// {"String": ...} or {"Regex": ...}, compiled. INVALID_ARGUMENT names the key.
absl::StatusOr<Regex> CompilePattern(const JsonField& pattern);

}  // namespace attune
