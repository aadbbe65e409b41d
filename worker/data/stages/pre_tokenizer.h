// Pre-tokenizer stage: cuts text into pieces that tokens do not cross.
// Types: Split, ByteLevel, Metaspace, Digits, Punctuation, Sequence; BertPreTokenizer,
// CharDelimiterSplit, FixedLength, UnicodeScripts, Whitespace, WhitespaceSplit.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/data/stages/aligned_text.h"
#include "worker/io/json.h"

namespace attune {

// One step over all pieces that are still text.
class PreTokenizerStep {
 public:
  virtual ~PreTokenizerStep() = default;
  virtual absl::Status Apply(PieceList* list) const = 0;
};

struct PreTokenizer {
  std::vector<std::unique_ptr<const PreTokenizerStep>> steps;
  // The last step would be to write each byte as its visible character. It is left to the model,
  // which then works on bytes.
  bool bytes_to_visible_at_end = false;

  absl::Status Apply(PieceList* list) const;
};

// Of null: no step. UNIMPLEMENTED for a type that is not in the list above. `model_takes_bytes`:
// bytes_to_visible_at_end may be set.
absl::StatusOr<PreTokenizer> MakePreTokenizer(const JsonField& field, bool model_takes_bytes);

}  // namespace attune
