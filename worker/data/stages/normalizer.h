// Normalizer stage. Types: null, Sequence; NFC, NFD, NFKC, NFKD, Replace, Prepend, Strip (here);
// Lowercase, StripAccents, Nmt, BertNormalizer, ByteLevel (character_normalizer.h);
// Precompiled (precompiled.h).
#pragma once

#include <deque>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/data/stages/aligned_text.h"
#include "worker/io/json.h"

namespace attune {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  // Appends a buffer to `buffers` if the piece changes, and points the piece to it; a piece that
  // becomes empty has begin == end.
  virtual absl::Status Normalize(std::deque<AlignedText>* buffers, Piece* piece) const = 0;
};

// Null for null. UNIMPLEMENTED for a type that is not in the list above.
absl::StatusOr<std::unique_ptr<const Normalizer>> MakeNormalizer(const JsonField& field);

// NFC, NFD, NFKC or NFKD.
absl::StatusOr<std::unique_ptr<const Normalizer>> MakeUnicodeForm(absl::string_view form);

}  // namespace attune
