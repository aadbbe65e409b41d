// Unigram model (Kudo, 2018): of all ways to cut a piece into tokens, the one whose scores (log
// probabilities) have the greatest sum, found by Viterbi. A character that no token covers costs
// min(scores) - 10; runs of such characters become one unknown, or bytes with byte_fallback.
//
// Cost: O(bytes of the piece x longest token); short pieces come from a cache.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "worker/data/stages/piece_cache.h"
#include "worker/data/stages/token_model.h"
#include "worker/data/stages/trie.h"

namespace attune {

class Unigram : public TokenModel {
 public:
  // `model` is the "model" of a tokenizer.json: "vocab" [[text, score], ...], "unk_id".
  static absl::StatusOr<std::unique_ptr<const TokenModel>> FromJson(const JsonField& model);

  absl::Status Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const override;

 private:
  struct Cut;
  absl::Status ReadVocab(const JsonField& vocab);
  void FindBestCuts(absl::string_view piece, std::vector<Cut>* cuts) const;
  // The piece [begin, end), which is a token or unknown.
  absl::Status Append(absl::string_view piece, int32_t begin, int32_t end,
                      std::vector<ModelToken>* tokens) const;

  std::vector<double> scores_;
  double unk_score_ = 0;
  int32_t unk_ = -1;
  bool byte_fallback_ = false;
  std::array<int32_t, 256> fallback_ids_;  // "<0xNN>"; -1: none
  std::unique_ptr<Trie> trie_;
  std::unique_ptr<PieceCache> cache_ = std::make_unique<PieceCache>();
};

}  // namespace attune
