// The model of a tokenizer: a piece of text becomes ids.
// Types: BPE (bpe.h), Unigram (unigram.h), WordPiece and WordLevel (word_piece.h).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/stages/vocabulary.h"
#include "worker/io/json.h"

namespace attune {

struct ModelToken {
  int32_t id;
  int32_t begin;  // bytes of the piece
  int32_t end;
};

class TokenModel {
 public:
  virtual ~TokenModel() = default;

  // Appends the tokens of a piece (valid UTF-8). FAILED_PRECONDITION if it has a character that
  // the vocabulary lacks and the model has no token for the unknown, where Hugging Face fails too.
  virtual absl::Status Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const = 0;

  const Vocabulary& vocabulary() const { return vocabulary_; }

 protected:
  Vocabulary vocabulary_;
};

// The type that "model" has or, in files of old versions that name none, looks like. UNIMPLEMENTED
// for a type that is not in the list above.
absl::StatusOr<std::string> TokenModelType(const JsonField& model);

// `on_bytes`: the pieces are bytes as they are, but the vocabulary has them in the visible alphabet
// (byte_level.h). Only for BPE.
absl::StatusOr<std::unique_ptr<const TokenModel>> MakeTokenModel(const JsonField& model,
                                                                 bool on_bytes);

}  // namespace attune
