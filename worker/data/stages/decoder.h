// Decoder stage: tokens back to text. Types: ByteLevel, Fuse, Sequence; null joins with spaces.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/json.h"

namespace attune {

class Decoder {
 public:
  // UNIMPLEMENTED for a type that is not in the list above.
  static absl::StatusOr<Decoder> FromJson(const JsonField& field);

  std::string Decode(std::vector<std::string> tokens) const;

 private:
  enum class Step : uint8_t { kByteLevel, kFuse };
  static absl::Status AddSteps(const JsonField& field, std::vector<Step>* steps);

  bool join_with_spaces_ = false;
  std::vector<Step> steps_;
};

}  // namespace attune
