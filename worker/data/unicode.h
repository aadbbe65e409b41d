// UTF-8 and the character properties that tokenizers and templates need (tables of ICU).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace attune {

// Byte at which the text stops being UTF-8 (no surrogates, nothing overlong); nullopt if it is.
std::optional<int64_t> FindInvalidUtf8(absl::string_view text);
// INVALID_ARGUMENT "<what> is not UTF-8 at byte N" for such a text.
absl::Status CheckUtf8(absl::string_view text, absl::string_view what);

// Code point that begins at byte *i of valid UTF-8; moves *i past it.
char32_t NextCodePoint(absl::string_view text, size_t* i);
// Code point that ends before byte *i of valid UTF-8; moves *i to its first byte.
char32_t PreviousCodePoint(absl::string_view text, size_t* i);
void AppendUtf8(char32_t code_point, std::string* text);

inline bool IsUtf8Continuation(char byte) {
  return (static_cast<unsigned char>(byte) & 0xC0) == 0x80;
}

// Replaces each maximal ill-formed part by U+FFFD (Unicode 15, section 3.9, table 3-8).
std::string ReplaceInvalidUtf8(absl::string_view bytes);

bool IsWhiteSpace(char32_t c);     // White_Space
bool IsWordCharacter(char32_t c);  // \w of UTS #18
bool IsNumeric(char32_t c);        // Nd, Nl, No
bool IsPunctuation(char32_t c);    // P*, and the ASCII symbols
bool IsTitleOrUpperCase(char32_t c);

std::string ToUpperUtf8(absl::string_view text);
std::string ToLowerUtf8(absl::string_view text);

}  // namespace attune
