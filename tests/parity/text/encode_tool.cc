// encode_tool TOKENIZER: reads lines of JSON strings, writes per line
//   {"ids": [...], "offsets": [[begin, end], ...], "decoded": "..."}   (no special tokens added)
// Driven by the live check beside it.
#include <cstdio>
#include <iostream>
#include <string>

#include "worker/data/tokenizer.h"
#include "worker/io/json.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: encode_tool TOKENIZER < strings.jsonl\n");
    return 2;
  }
  const absl::StatusOr<attune::Tokenizer> tokenizer = attune::Tokenizer::Load(argv[1]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
    return 1;
  }
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    const absl::StatusOr<attune::Json> text = attune::ParseJson(line, "input");
    attune::Json out;
    if (!text.ok() || !text->is_string()) {
      out["error"] = "the line is no JSON string";
    } else if (const auto encoding = tokenizer->Encode(text->get_ref<const std::string&>(), false);
               !encoding.ok()) {
      out["error"] = encoding.status().ToString();
    } else {
      out["ids"] = encoding->ids;
      out["offsets"] = attune::Json::array();
      for (const attune::ByteSpan& span : encoding->offsets) {
        out["offsets"].push_back({span.begin, span.end});
      }
      out["decoded"] = *tokenizer->Decode(encoding->ids, false);
    }
    std::cout << out.dump() << "\n";
  }
  return 0;
}
