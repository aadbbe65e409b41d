// A tokenizer.json of any bytes: whatever loads can encode, and decodes what it encoded.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "worker/data/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view json(reinterpret_cast<const char*>(data), size);
  const auto tokenizer = attune::Tokenizer::FromJson(json, "input");
  if (!tokenizer.ok()) return 0;
  const std::string text =
      "Hello  world, it's 12345!\n\n\tß é \xF0\x9F\x9A\x80 <s> [MARK] aaaaaaaaaaaaaaaaaaaaaab";
  const auto encoding = tokenizer->Encode(text, /*add_special_tokens=*/true);
  if (!encoding.ok()) return 0;
  if (encoding->ids.size() != encoding->offsets.size()) abort();
  for (const attune::ByteSpan& span : encoding->offsets) {
    if (span.begin < 0 || span.end < span.begin || span.end > static_cast<int64_t>(text.size())) {
      abort();
    }
  }
  for (int32_t id : encoding->ids) {
    if (id < 0 || id >= tokenizer->vocab_size()) abort();
  }
  if (!tokenizer->Decode(encoding->ids, /*skip_special_tokens=*/false).ok()) abort();
  return 0;
}
