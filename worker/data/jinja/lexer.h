// Template source to tokens, as jinja2's lexer with trim_blocks and lstrip_blocks:
//   - line ends become \n, and one at the end of the source goes away;
//   - the first newline after a block or comment goes away (trim_blocks);
//   - white space before a block or comment that begins its line goes away (lstrip_blocks);
//   - "-" inside a tag strips all white space on that side, "+" keeps it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace attune::jinja {

enum class TokenKind : uint8_t {
  kData,           // text: template data between tags
  kVariableBegin,  // {{
  kVariableEnd,    // }}
  kBlockBegin,     // {%
  kBlockEnd,       // %}
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  int line = 0;
  std::string text;     // unescaped for strings
  int64_t integer = 0;
  double number = 0;
};

// INVALID_ARGUMENT "line N: what". The last token is kEnd.
absl::StatusOr<std::vector<Token>> Lex(absl::string_view source);

// An error of the template at a line, with the code of `status`.
absl::Status AtLine(int line, const absl::Status& status);

}  // namespace attune::jinja
