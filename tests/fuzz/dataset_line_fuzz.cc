// A line of a dataset of any bytes: it becomes an example with something to train, or an error.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "worker/data/dataset.h"
#include "worker/io/file.h"

namespace {

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
    abort();
  }
  return *std::move(value);
}

struct Fixture {
  const std::string folder = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/text/";
  attune::Tokenizer tokenizer = Must(attune::Tokenizer::Load(folder + "tokenizer.json"));
  attune::TokenizerConfig config;
  attune::ChatTemplate marked = Must(attune::ChatTemplate::FromSource(
      Must(attune::ReadFile(folder + "templates/turns.jinja")), "turns"));
  attune::ChatTemplate plain = Must(attune::ChatTemplate::FromSource(
      "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
      "{{ m.content | trim }}{{ m.tool_calls | tojson if m.tool_calls }}<|eot_id|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}",
      "plain", {{"bos_token", "<|begin_of_text|>"}}));

  Fixture() {
    config.special_tokens = {{"bos_token", "<|begin_of_text|>"}, {"eos_token", "<|eot_id|>"}};
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Fixture fixture;
  const absl::string_view line(reinterpret_cast<const char*>(data), size);
  for (const attune::ChatTemplate* chat_template : {&fixture.marked, &fixture.plain}) {
    const attune::ExampleTokenizer tokenizer(&fixture.tokenizer, fixture.config, chat_template, {});
    const auto example = tokenizer.Tokenize(line, attune::DatasetFormat::kAuto);
    if (!example.ok()) {
      if (example.status().message().empty()) abort();
      continue;
    }
    if (example->ids.size() != example->trained.size() || example->NumTrained() < 1) abort();
    const int32_t bos = *fixture.tokenizer.TokenToId("<|begin_of_text|>");
    if (example->ids[0] != bos || example->ids[1] == bos) abort();
  }
  return 0;
}
