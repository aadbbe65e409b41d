// Metaspace, as pre-tokenizer and as decoder: spaces are written as a visible character (U+2581),
// and a text begins with one.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "worker/io/json.h"

namespace attune {

struct Metaspace {
  enum class Scheme : uint8_t { kAlways, kFirst, kNever };

  std::string replacement = "\xE2\x96\x81";  // one character
  // Which pieces get a space in front if they have none: all, the one that begins the input, none.
  Scheme scheme = Scheme::kAlways;
  bool split = true;  // cut before each space

  static absl::StatusOr<Metaspace> FromJson(const JsonField& field);
};

}  // namespace attune
