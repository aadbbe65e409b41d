// BPE model (Sennrich et al., 2016): a piece starts as single symbols; the adjacent pair with the
// lowest rank, leftmost first, is merged until none is left.
//
// On bytes (after a ByteLevel pre-tokenizer) the symbols are bytes and the vocabulary is read
// through the visible alphabet; else they are characters, with byte_fallback and unk as the file
// says. Pieces that were seen before come from a cache shared by all threads.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/stages/piece_cache.h"
#include "worker/data/stages/token_model.h"
#include "worker/io/json.h"

namespace attune {

class Bpe : public TokenModel {
 public:
  // `model` is the "model" of a tokenizer.json. INVALID_ARGUMENT: a merge of tokens that are not in
  // the vocabulary, an id twice or out of range, ... UNIMPLEMENTED: dropout, affixes.
  static absl::StatusOr<std::unique_ptr<const TokenModel>> FromJson(const JsonField& model,
                                                                    bool on_bytes);

  // Characters that the vocabulary lacks are left out if there is neither byte_fallback nor unk.
  absl::Status Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const override;

 private:
  struct Merge {
    int32_t rank;
    int32_t id;
  };
  struct Symbol;

  Bpe();
  void FindPieces();
  absl::Status ReadMerges(const JsonField& merges);
  absl::Status ReadOptions(const JsonField& model);
  absl::Status AddMerge(const JsonField& field, absl::string_view left, absl::string_view right,
                        int32_t rank);
  void FindByteTokens();
  void FindWordStart();
  void TokenizeWord(absl::string_view word, int32_t offset, std::vector<ModelToken>* tokens) const;
  const Merge* FindMerge(int32_t left, int32_t right) const;
  void StartSymbols(absl::string_view piece, std::vector<Symbol>* symbols) const;
  void MergeSymbols(std::vector<Symbol>* symbols) const;

  bool on_bytes_ = false;
  bool ignore_merges_ = false;
  bool byte_fallback_ = false;
  bool fuse_unk_ = false;
  int32_t unk_ = -1;
  // Where no token has a U+2581 after another character, a piece may be cut before each such place:
  // no merge crosses it. Words then come from the cache, as they do behind a pre-tokenizer.
  bool cut_at_words_ = false;
  std::vector<std::string> pieces_;                            // by id, as the pieces have them
  absl::flat_hash_map<absl::string_view, int32_t> piece_ids_;  // views into pieces_
  absl::flat_hash_map<uint64_t, Merge> merges_;                // left << 32 | right
  std::array<int32_t, 256> byte_ids_;                          // on bytes: a byte's token; -1: none
  std::array<int32_t, 256> fallback_ids_;                      // "<0xNN>"
  std::unique_ptr<PieceCache> cache_;
};

}  // namespace attune
