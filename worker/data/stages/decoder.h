// Decoder stage: tokens back to text. A chain of steps, each from a list of texts to a list of
// texts; null joins with spaces.
// Types: ByteLevel, BPEDecoder, ByteFallback, CTC, Fuse, Metaspace, Replace, Sequence, Strip,
// WordPiece.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/json.h"

namespace attune {

class DecoderStep {
 public:
  virtual ~DecoderStep() = default;
  // All tokens are valid UTF-8, before and after.
  virtual absl::Status Apply(std::vector<std::string>* tokens) const = 0;
};

class Decoder {
 public:
  // UNIMPLEMENTED for a type that is not in the list above.
  static absl::StatusOr<Decoder> FromJson(const JsonField& field);

  absl::StatusOr<std::string> Decode(std::vector<std::string> tokens) const;

 private:
  bool join_with_spaces_ = false;
  std::vector<std::unique_ptr<const DecoderStep>> steps_;
};

}  // namespace attune
