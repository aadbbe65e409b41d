// Normalizers that look at one character at a time: Lowercase, StripAccents, Nmt, BertNormalizer,
// ByteLevel (each byte as its visible character).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/data/stages/normalizer.h"
#include "worker/io/json.h"

namespace attune {

bool IsCharacterNormalizer(absl::string_view type);
// For a type of which IsCharacterNormalizer is true.
absl::StatusOr<std::unique_ptr<const Normalizer>> MakeCharacterNormalizer(absl::string_view type,
                                                                          const JsonField& field);

}  // namespace attune
