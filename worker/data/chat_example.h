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
  enum class Kind : uint8_t { kChat, kPair, kDocument, kPreference };
  Kind kind = Kind::kPair;

  // Chat, and the prompt and chosen answer of a preference.
  ChatRequest request;
  // The same with the arguments of tool calls as the line has them; equal to `request` where they
  // were no text. OpenAI writes them as JSON text, most templates want the object.
  ChatRequest verbatim_request;
  std::vector<int64_t> assistant_turns;  // indices of messages, ascending
  std::vector<bool> trained_turns;       // per assistant turn: not before the completion, weight 1

  // Pair: prompt and completion, trained on the latter. Document: completion, trained on all.
  // A preference of strings: prompt and chosen answer.
  std::string prompt;
  std::string completion;

  // Preference: the other answer, as text or as messages.
  std::string rejected;
  OrderedJson rejected_messages;

  // What is said in it: everything but instructions of the system. For finding duplicates.
  std::string Content() const;
};

// kAuto: by the keys of each line.
//   kChat              messages [, tools]                      OpenAI
//   kPromptCompletion  prompt, completion                      strings, or both lists of messages
//   kShareGpt          conversations [{from, value}] [, system, tools]
//   kAlpaca            instruction, output [, input, system, history [[asked, answered], ...]]
//   kText              text                                    continued pre-training
//   kPreference        chosen, rejected [, prompt]             strings or lists of messages
enum class LineFormat : uint8_t {
  kAuto,
  kChat,
  kPromptCompletion,
  kShareGpt,
  kAlpaca,
  kText,
  kPreference
};

// INVALID_ARGUMENT says what is wrong and where in the line ("messages[2].role ...").
absl::StatusOr<ExampleText> ParseExample(absl::string_view line, LineFormat format);

}  // namespace attune
