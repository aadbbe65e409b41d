// ChatTemplate: conversations to text, by the Jinja template that travels with a model.
//
// The text equals what jinja2 gives as Transformers sets it up (trim_blocks, lstrip_blocks, loop
// controls, tojson without HTML escapes, raise_exception, strftime_now, the `generation` tag).
// Templates come from strangers: they run in an interpreter of our own (jinja/) that reaches
// nothing outside its variables, and is bounded in steps, depth and output.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "worker/data/tokenizer.h"
#include "worker/data/tokenizer_config.h"
#include "worker/io/json.h"

namespace attune {

struct ChatRequest {
  OrderedJson messages = OrderedJson::array();
  OrderedJson tools;      // null: none
  OrderedJson documents;  // null: none
  bool add_generation_prompt = false;
  // Further variables (object), for example {"enable_thinking": false}. They win over the
  // special tokens' variables.
  OrderedJson variables = OrderedJson::object();
};

struct RenderedChat {
  std::string text;
  // Bytes of `text` inside {% generation %} blocks, ascending.
  std::vector<ByteSpan> generation;
};

class ChatTemplate {
 public:
  // What strftime_now shows; by default 2024-07-26 00:00 UTC, so that a text is the same on every
  // day. Programs that generate for people pass the clock.
  using Clock = std::function<absl::CivilSecond()>;

  // NOT_FOUND if the directory has no chat template. INVALID_ARGUMENT with the line for a
  // template that does not parse, UNIMPLEMENTED with the line for a construct outside the subset.
  static absl::StatusOr<ChatTemplate> Load(const std::string& directory);
  static absl::StatusOr<ChatTemplate> FromConfig(const TokenizerConfig& config);
  // One template. `special_tokens` are its variables ("bos_token", ...).
  static absl::StatusOr<ChatTemplate> FromSource(
      absl::string_view source, const std::string& name,
      const std::map<std::string, std::string>& special_tokens = {});

  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;
  ~ChatTemplate();

  // With several named templates: "tool_use" if there are tools and it exists, else "default".
  // INVALID_ARGUMENT with the template's own message if it calls raise_exception, and with the
  // line if an expression fails; RESOURCE_EXHAUSTED if it passes a limit. Thread-safe.
  absl::StatusOr<RenderedChat> Render(const ChatRequest& request) const;

  // Whether the template that Render would take marks the assistant's text.
  bool HasGenerationTags(bool with_tools) const;

  void set_clock(Clock clock) { clock_ = std::move(clock); }

 private:
  struct Program;
  ChatTemplate();
  const Program& Select(bool with_tools) const;

  std::map<std::string, std::unique_ptr<const Program>> programs_;
  std::map<std::string, std::string> special_tokens_;
  Clock clock_;
};

}  // namespace attune
