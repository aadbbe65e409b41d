// A chat template of any bytes, run on one conversation: it ends, within its limits.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "worker/data/jinja/interpreter.h"
#include "worker/data/jinja/parser.h"
#include "worker/data/unicode.h"

namespace {

using attune::jinja::Value;

const Value& Messages() {
  static const Value messages = *Value::FromJson(*attune::ParseOrderedJson(
      R"([{"role": "system", "content": "Be terse."},
          {"role": "user", "content": "Wie geht's, Jürgen? 🚀"},
          {"role": "assistant", "content": "<think>x</think> ok",
           "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, null]}}}]},
          {"role": "tool", "content": "42"}])",
      "messages"));
  return messages;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view source(reinterpret_cast<const char*>(data), size);
  if (attune::FindInvalidUtf8(source).has_value()) return 0;  // ChatTemplate refuses it before
  const auto tree = attune::jinja::ParseTemplate(source);
  if (!tree.ok()) return 0;
  attune::jinja::Interpreter interpreter(tree->get(), {.work = 300'000, .output_bytes = 1 << 20});
  for (auto& [name, value] :
       attune::jinja::Globals([] { return absl::CivilSecond(2024, 7, 26); })) {
    interpreter.SetVariable(name, value);
  }
  interpreter.SetVariable("messages", Messages());
  interpreter.SetVariable("tools", Value());
  interpreter.SetVariable("bos_token", Value(std::string("<s>")));
  interpreter.SetVariable("add_generation_prompt", Value(true));
  std::string text;
  std::vector<attune::ByteSpan> generation;
  if (!interpreter.Run(&text, &generation).ok()) return 0;
  if (attune::FindInvalidUtf8(text).has_value()) abort();
  for (const attune::ByteSpan& span : generation) {
    if (span.begin > span.end || span.end > static_cast<int64_t>(text.size())) abort();
  }
  return 0;
}
