#include "worker/data/unicode.h"

#include <unicode/locid.h>
#include <unicode/uchar.h>
#include <unicode/uscript.h>
#include <unicode/unistr.h>
#include <unicode/utf8.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

// Whether Unicode `version` has the character.
bool IsOfAge(char32_t c, uint8_t version) {
  UVersionInfo age;
  u_charAge(static_cast<UChar32>(c), age);
  return age[0] <= version;
}

}  // namespace

std::optional<int64_t> FindInvalidUtf8(absl::string_view text) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(text.data());
  const int64_t size = static_cast<int64_t>(text.size());
  int64_t i = 0;
  while (i < size) {
    uint64_t word;
    if (i + 8 <= size && (std::memcpy(&word, data + i, 8), (word & 0x8080808080808080u) == 0)) {
      i += 8;  // eight ASCII characters
      continue;
    }
    const int64_t begin = i;
    UChar32 c;
    U8_NEXT(data, i, size, c);
    if (c < 0) return begin;
  }
  return std::nullopt;
}

absl::Status CheckUtf8(absl::string_view text, absl::string_view what) {
  const std::optional<int64_t> at = FindInvalidUtf8(text);
  if (!at.has_value()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " is not UTF-8 at byte ", *at));
}

char32_t NextCodePoint(absl::string_view text, size_t* i) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(text.data());
  UChar32 c;
  U8_NEXT_UNSAFE(data, *i, c);
  return static_cast<char32_t>(c);
}

char32_t PreviousCodePoint(absl::string_view text, size_t* i) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(text.data());
  UChar32 c;
  U8_PREV_UNSAFE(data, *i, c);
  return static_cast<char32_t>(c);
}

void AppendUtf8(char32_t code_point, std::string* text) {
  uint8_t buffer[U8_MAX_LENGTH];
  size_t size = 0;
  U8_APPEND_UNSAFE(buffer, size, static_cast<UChar32>(code_point));
  text->append(reinterpret_cast<char*>(buffer), size);
}

std::string ReplaceInvalidUtf8(absl::string_view bytes) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(bytes.data());
  const int64_t size = static_cast<int64_t>(bytes.size());
  std::string text;
  text.reserve(bytes.size());
  int64_t i = 0;
  while (i < size) {
    const int64_t begin = i;
    UChar32 c;
    U8_NEXT(data, i, size, c);  // past an ill-formed part, ICU advances by the maximal subpart
    if (c < 0) {
      text.append("\xEF\xBF\xBD");
    } else {
      text.append(bytes.substr(begin, i - begin).data(), i - begin);
    }
  }
  return text;
}

bool IsBlank(absl::string_view text) {
  return text.find_first_not_of(" \t\r\n\v\f") == absl::string_view::npos;
}

bool IsWhiteSpace(char32_t c) {
  return u_hasBinaryProperty(static_cast<UChar32>(c), UCHAR_WHITE_SPACE);
}

bool IsWordCharacter(char32_t c) {
  const UChar32 u = static_cast<UChar32>(c);
  return u_hasBinaryProperty(u, UCHAR_ALPHABETIC) || u_hasBinaryProperty(u, UCHAR_JOIN_CONTROL) ||
         (U_MASK(u_charType(u)) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0;
}

bool IsNumeric(char32_t c) {
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_N_MASK) != 0;
}

bool IsPunctuation(char32_t c) {
  const bool ascii = (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) ||
                     (c >= 123 && c <= 126);
  if (c < 0x80) return ascii;
  if (c == 0x166D || c == 0x111C9) return true;  // until Unicode 12 and 11
  return IsOfAge(c, 8) && (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_P_MASK) != 0;
}

bool IsControl(char32_t c) {
  constexpr uint32_t kMask = U_GC_CC_MASK | U_GC_CF_MASK | U_GC_CO_MASK;
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & kMask) != 0 && IsOfAge(c, 8);
}

bool IsNonspacingMark(char32_t c) {
  if (c < 0x300) return false;
  if (c == 0x1734) return true;  // until Unicode 14
  for (char32_t later : {0x1885, 0x1886, 0xA9BD, 0x111C9}) {
    if (c == later) return false;  // were of another class then
  }
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_MN_MASK) != 0 && IsOfAge(c, 8);
}

bool IsMark(char32_t c) {
  if (c < 0x300) return false;
  if (c == 0x1CF2 || c == 0x1CF3) return true;  // until Unicode 12
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_M_MASK) != 0 && IsOfAge(c, 9) &&
         c != 0x111C9;
}

int ScriptOf(char32_t c) {
  UErrorCode code = U_ZERO_ERROR;
  const UScriptCode script = uscript_getScript(static_cast<UChar32>(c), &code);
  if (c == 0x30FC || script == USCRIPT_HIRAGANA || script == USCRIPT_KATAKANA) return USCRIPT_HAN;
  return c == ' ' || script == USCRIPT_UNKNOWN || U_FAILURE(code) ? -1 : script;
}

bool IsTitleOrUpperCase(char32_t c) {
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & (U_GC_LU_MASK | U_GC_LT_MASK)) != 0;
}

std::string ToUpperUtf8(absl::string_view text) {
  std::string out;
  icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<int32_t>(text.size())))
      .toUpper(icu::Locale::getRoot())
      .toUTF8String(out);
  return out;
}

std::string ToLowerUtf8(absl::string_view text) {
  std::string out;
  icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<int32_t>(text.size())))
      .toLower(icu::Locale::getRoot())
      .toUTF8String(out);
  return out;
}

void AppendLowerUtf8(char32_t code_point, std::string* text) {
  if (code_point == 0x130) {  // the one character whose lower case has two
    text->append("i\xCC\x87");
  } else {
    AppendUtf8(static_cast<char32_t>(u_tolower(static_cast<UChar32>(code_point))), text);
  }
}

}  // namespace attune
