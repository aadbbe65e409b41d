// WordPiece model (BERT): a word is cut greedily into the longest tokens, left to right; those
// after the first carry a prefix ("##"). A word that cannot be cut, or that is too long, is one
// unknown. WordLevel: a word is a token, or unknown.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "worker/data/stages/piece_cache.h"
#include "worker/data/stages/token_model.h"
#include "worker/data/stages/trie.h"

namespace attune {

class WordPiece : public TokenModel {
 public:
  static absl::StatusOr<std::unique_ptr<const TokenModel>> FromJson(const JsonField& model);

  absl::Status Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const override;

 private:
  // False if some part of the word has no token.
  bool Cut(absl::string_view word, std::vector<ModelToken>* tokens) const;

  int32_t unk_ = -1;
  int64_t max_characters_ = 100;
  std::unique_ptr<Trie> first_;         // tokens as they are
  std::unique_ptr<Trie> continuation_;  // tokens with the prefix, without it
  std::unique_ptr<PieceCache> cache_ = std::make_unique<PieceCache>();
};

class WordLevel : public TokenModel {
 public:
  static absl::StatusOr<std::unique_ptr<const TokenModel>> FromJson(const JsonField& model);

  absl::Status Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const override;

 private:
  int32_t unk_ = -1;
};

}  // namespace attune
