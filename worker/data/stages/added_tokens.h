// Added tokens: texts that are cut out before the model sees the rest, such as <|eot_id|>.
//
// Matching is leftmost-longest. Tokens with normalized = false are found in the input, the others
// in the normalised text (their own text normalised too). lstrip and rstrip take the white space
// beside a match into it; single_word drops a match that touches a word character.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/stages/aligned_text.h"
#include "worker/data/stages/normalizer.h"
#include "worker/io/json.h"

namespace attune {

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
  bool special = false;
};

// The "added_tokens" of a tokenizer.json. `field` may be missing.
absl::StatusOr<std::vector<AddedToken>> ReadAddedTokens(const JsonField& field);

// Finds any of a set of texts.
class TokenMatcher {
 public:
  // An entry is (text, added token); both must outlive the matcher. Empty texts are left out.
  void Add(absl::string_view text, const AddedToken* token);
  bool empty() const { return nodes_.size() == 1; }

  // Replaces each text piece by the parts between matches and the matches as tokens.
  void Cut(PieceList* list) const;

 private:
  struct Node {
    absl::flat_hash_map<uint8_t, int32_t> children;
    const AddedToken* token = nullptr;
  };
  // The longest match that begins at `begin`: its end, and the token; null if there is none.
  std::pair<size_t, const AddedToken*> MatchAt(absl::string_view text, size_t begin) const;
  void CutPiece(const Piece& piece, std::vector<Piece>* pieces) const;

  std::vector<Node> nodes_ = std::vector<Node>(1);
  bool first_[256] = {};  // bytes that some text begins with
};

}  // namespace attune
