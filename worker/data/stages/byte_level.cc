#include "worker/data/stages/byte_level.h"

#include <array>

#include "worker/data/unicode.h"

namespace attune {
namespace {

struct Alphabet {
  std::array<char32_t, 256> visible;
  std::array<int16_t, 256 + 68> byte;  // by code point

  Alphabet() {
    byte.fill(-1);
    char32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      visible[b] = itself ? static_cast<char32_t>(b) : next++;
      byte[visible[b]] = static_cast<int16_t>(b);
    }
  }
};

const Alphabet& TheAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

}  // namespace

char32_t ByteToVisible(uint8_t byte) {
  return TheAlphabet().visible[byte];
}

int VisibleToByte(char32_t c) {
  const Alphabet& alphabet = TheAlphabet();
  return c < alphabet.byte.size() ? alphabet.byte[c] : -1;
}

std::optional<std::string> VisibleToBytes(absl::string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const int byte = VisibleToByte(NextCodePoint(text, &i));
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
  }
  return bytes;
}

}  // namespace attune
