// One line of a dataset: its JSON, checked, as what a chat template or a tokenizer takes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/chat_template.h"
#include "worker/io/json.h"

namespace attune {

struct ExampleText {
  bool is_chat = false;

  // Chat.
  ChatRequest request;
  // The same with the arguments of tool calls as the line has them; equal to `request` where they
  // were no text. OpenAI writes them as JSON text, most templates want the object.
  ChatRequest verbatim_request;
  std::vector<int64_t> assistant_turns;  // indices of messages, ascending
  std::vector<bool> trained_turns;       // per assistant turn: not before the completion, weight 1

  // Prompt and completion.
  std::string prompt;
  std::string completion;
};

enum class LineFormat : uint8_t { kAuto, kChat, kPromptCompletion };

// INVALID_ARGUMENT says what is wrong and where in the line ("messages[2].role ...").
absl::StatusOr<ExampleText> ParseExample(absl::string_view line, LineFormat format);

}  // namespace attune
