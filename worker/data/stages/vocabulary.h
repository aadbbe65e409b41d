// The tokens of a model by id and by text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "worker/io/json.h"

namespace attune {

class Vocabulary {
 public:
  // Ids must lie below this; so far the largest vocabularies have about a million tokens.
  static constexpr int64_t kMaxTokens = 1 << 22;

  // Views point into the vocabulary, so it stays where it is.
  Vocabulary() = default;
  Vocabulary(const Vocabulary&) = delete;
  Vocabulary& operator=(const Vocabulary&) = delete;

  // {"text": id, ...}. INVALID_ARGUMENT for an id twice or out of range.
  absl::Status ReadObject(const JsonField& field);
  // Token i has the id i. Of a text that is there twice, the later id counts.
  void Assign(std::vector<std::string> tokens);

  // -1 if there is none.
  int32_t Find(absl::string_view token) const {
    const auto it = ids_.find(token);
    return it == ids_.end() ? -1 : it->second;
  }
  // Indexed by id; "" where no token has it.
  const std::vector<std::string>& tokens() const { return tokens_; }
  const absl::flat_hash_map<absl::string_view, int32_t>& ids() const { return ids_; }

 private:
  std::vector<std::string> tokens_;
  absl::flat_hash_map<absl::string_view, int32_t> ids_;  // views into tokens_
};

// The id of the token that `field` names; -1 if the field is missing. INVALID_ARGUMENT if the
// vocabulary does not have it.
absl::StatusOr<int32_t> ReadTokenName(const JsonField& field, const Vocabulary& vocabulary);

}  // namespace attune
