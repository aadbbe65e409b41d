// The visible alphabet of byte-level tokenizers (GPT-2): each byte has one printable character.
// Bytes 33-126, 161-172 and 174-255 stand for themselves, the other 68 for U+0100 onwards.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace attune {

char32_t ByteToVisible(uint8_t byte);
// -1 for a character outside the alphabet.
int VisibleToByte(char32_t c);

// nullopt if a character is outside the alphabet.
std::optional<std::string> VisibleToBytes(absl::string_view text);

}  // namespace attune
