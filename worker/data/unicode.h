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

// Nothing but ASCII white space.
bool IsBlank(absl::string_view text);

bool IsWhiteSpace(char32_t c);     // White_Space
bool IsWordCharacter(char32_t c);  // \w of UTS #18
bool IsNumeric(char32_t c);        // Nd, Nl, No
bool IsTitleOrUpperCase(char32_t c);

// Classes of Hugging Face `tokenizers`, with the age of its tables: characters that came later are
// in none of them.
bool IsPunctuation(char32_t c);     // P* of Unicode 8, and the ASCII symbols
bool IsControl(char32_t c);         // Cc, Cf, Co of Unicode 8
bool IsNonspacingMark(char32_t c);  // Mn of Unicode 8
bool IsMark(char32_t c);            // M* of Unicode 9
// The script of a character, Hiragana and Katakana being Han; -1 for those of no script of their
// own.
int ScriptOf(char32_t c);

// Full lower case of a character by itself.
void AppendLowerUtf8(char32_t code_point, std::string* text);

std::string ToUpperUtf8(absl::string_view text);
std::string ToLowerUtf8(absl::string_view text);

}  // namespace attune
