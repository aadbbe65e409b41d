// What lies beside tokenizer.json: special tokens by role, and chat templates.
//
// Read from tokenizer_config.json, special_tokens_map.json (for roles that the former lacks),
// chat_template.jinja (wins over the string in tokenizer_config.json) and
// additional_chat_templates/*.jinja, as Transformers does.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace attune {

struct TokenizerConfig {
  std::string source;  // directory, for errors
  // "bos_token", "eos_token", "pad_token", ... -> text. Templates see them as variables.
  std::map<std::string, std::string> special_tokens;
  // name -> template; the one without a name is "default".
  std::map<std::string, std::string> chat_templates;
  std::optional<bool> add_bos_token;
  std::optional<bool> add_eos_token;

  // Of a directory. Files that are not there are no error; wrong ones are INVALID_ARGUMENT.
  static absl::StatusOr<TokenizerConfig> Load(const std::string& directory);

  // The text of a role, or "".
  std::string Token(const std::string& role) const;
};

}  // namespace attune
