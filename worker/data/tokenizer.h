// Tokenizer: text to token ids and back, as a Hugging Face tokenizer.json describes it.
//
//   text -> added tokens cut out -> normalizer -> pre-tokenizer -> model -> post-processor -> ids
//
// Each stage is a file in stages/: added_tokens, normalizer, pre_tokenizer, token_model (bpe,
// unigram, word_piece), post_processor, decoder. A stage type that is not there is UNIMPLEMENTED at
// Load, by its name.
// Ids equal those of Hugging Face `tokenizers`; the Unicode tables are those of PCRE2 and ICU.
// The file's truncation and padding are not applied: they belong to a call, not to a vocabulary.
//
// Cost: linear in the text but for one piece of n symbols, which costs n log n.
// All methods are const and may be called from several threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace attune {

// Half-open range of bytes.
struct ByteSpan {
  int64_t begin = 0;
  int64_t end = 0;
  friend bool operator==(const ByteSpan&, const ByteSpan&) = default;
};

struct Encoding {
  std::vector<int32_t> ids;
  // Per id, the bytes of the input text that it stands for. Tokens that are parts of one
  // character all have that whole character; tokens that the post-processor added have an empty
  // span.
  std::vector<ByteSpan> offsets;
};

class TokenizerStages;

class Tokenizer {
 public:
  // `path` is a tokenizer.json or a directory that holds one. INVALID_ARGUMENT names the key.
  static absl::StatusOr<Tokenizer> Load(const std::string& path);
  // From the text of a tokenizer.json; `source` names it in errors.
  static absl::StatusOr<Tokenizer> FromJson(absl::string_view json, const std::string& source);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // INVALID_ARGUMENT if the text is not UTF-8 (it says at which byte) or exceeds 1 GiB.
  // Special tokens are those of the post-processor (BOS, ...); special tokens that are written
  // out in the text are always recognised.
  absl::StatusOr<Encoding> Encode(absl::string_view text, bool add_special_tokens) const;

  // Bytes that are no UTF-8 become U+FFFD, and ids that no token has (rows with which a model is
  // padded) are left out, as in Hugging Face. INVALID_ARGUMENT for a negative id.
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const;

  // The largest id + 1, added tokens included: the least number of embedding rows.
  int64_t vocab_size() const;
  std::optional<int32_t> TokenToId(absl::string_view token) const;
  // As in the vocabulary: byte-level tokens in their visible alphabet ("Ġthe").
  std::optional<std::string> IdToToken(int32_t id) const;
  bool is_special(int32_t id) const;

  // What the post-processor puts before and after a text.
  absl::Span<const int32_t> prefix_ids() const;
  absl::Span<const int32_t> suffix_ids() const;

 private:
  explicit Tokenizer(std::unique_ptr<const TokenizerStages> stages);
  std::unique_ptr<const TokenizerStages> stages_;
};

}  // namespace attune
