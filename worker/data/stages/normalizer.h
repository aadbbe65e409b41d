// Normalizer stage: null, NFC, NFD, NFKC, NFKD, Sequence.
#pragma once

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

}  // namespace attune
