#include "worker/data/chat_template.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/data/jinja/interpreter.h"
#include "worker/data/jinja/parser.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr size_t kSourceLimitBytes = 4 << 20;

// Work that a template may do: a base, and for each value that it is given.
constexpr int64_t kBaseWork = 20'000'000;
constexpr int64_t kWorkPerWeight = 4'000;

// A message as Transformers shows it to a template: keys whose value is null are left out, and
// reasoning is there under the name that most templates read and under the one that others do.
OrderedJson NormalizeMessage(const OrderedJson& message) {
  if (!message.is_object()) return message;
  const OrderedJson* reasoning = nullptr;
  for (const char* key : {"reasoning_content", "thinking", "reasoning"}) {
    const auto it = message.find(key);
    if (reasoning == nullptr && it != message.end() && !it->is_null()) reasoning = &*it;
  }
  OrderedJson out = OrderedJson::object();
  auto& pairs =
      static_cast<OrderedJson::object_t::Container&>(out.get_ref<OrderedJson::object_t&>());
  if (reasoning != nullptr) {
    const auto it = message.find("thinking");
    const bool own = it != message.end() && !it->is_null();
    pairs.emplace_back("thinking", own ? *it : *reasoning);
  }
  for (const auto& item : message.items()) {
    if (!item.value().is_null() && item.key() != "thinking") {
      pairs.emplace_back(item.key(), item.value());
    }
  }
  if (reasoning != nullptr) out["reasoning_content"] = *reasoning;
  return out;
}

OrderedJson NormalizeMessages(const OrderedJson& messages) {
  OrderedJson out = OrderedJson::array();
  for (const OrderedJson& message : messages) out.push_back(NormalizeMessage(message));
  return out;
}

absl::Status Annotate(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(),
                      absl::StrCat("chat template '", name, "', ", status.message()));
}

}  // namespace

struct ChatTemplate::Program {
  std::string name;
  std::unique_ptr<const jinja::Template> tree;
};

ChatTemplate::ChatTemplate() : clock_([] { return absl::CivilSecond(2024, 7, 26); }) {}
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<ChatTemplate> ChatTemplate::Load(const std::string& directory) {
  absl::StatusOr<TokenizerConfig> config = TokenizerConfig::Load(directory);
  if (!config.ok()) return config.status();
  return FromConfig(*config);
}

absl::StatusOr<ChatTemplate> ChatTemplate::FromConfig(const TokenizerConfig& config) {
  if (config.chat_templates.empty()) {
    return absl::NotFoundError(
        absl::StrCat(config.source,
                     " has no chat template: neither chat_template.jinja nor \"chat_template\" in "
                     "tokenizer_config.json. Base models often have none; take the instruct "
                     "model's, or train on prompt/completion lines."));
  }
  ChatTemplate result;
  result.special_tokens_ = config.special_tokens;
  for (const auto& [name, source] : config.chat_templates) {
    if (source.size() > kSourceLimitBytes) {
      return absl::InvalidArgumentError(absl::StrCat("chat template '", name, "' has ",
                                                     source.size(), " bytes; at most ",
                                                     kSourceLimitBytes, " are read"));
    }
    absl::Status utf8 = CheckUtf8(source, absl::StrCat("chat template '", name, "'"));
    if (!utf8.ok()) return utf8;
    auto tree = jinja::ParseTemplate(source);
    if (!tree.ok()) return Annotate(name, tree.status());
    result.programs_[name] =
        std::make_unique<const Program>(Program{.name = name, .tree = *std::move(tree)});
  }
  if (result.programs_.size() > 1 && result.programs_.count("default") == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.source, " has several chat templates, but none named 'default'"));
  }
  return result;
}

absl::StatusOr<ChatTemplate> ChatTemplate::FromSource(
    absl::string_view source, const std::string& name,
    const std::map<std::string, std::string>& special_tokens) {
  TokenizerConfig config;
  config.source = name;
  config.special_tokens = special_tokens;
  config.chat_templates[name] = std::string(source);
  return FromConfig(config);
}

const ChatTemplate::Program& ChatTemplate::Select(bool with_tools) const {
  if (programs_.size() == 1) return *programs_.begin()->second;
  const auto tool_use = programs_.find("tool_use");
  if (with_tools && tool_use != programs_.end()) return *tool_use->second;
  return *programs_.at("default");
}

bool ChatTemplate::HasGenerationTags(bool with_tools) const {
  return Select(with_tools).tree->has_generation;
}

absl::StatusOr<RenderedChat> ChatTemplate::Render(const ChatRequest& request) const {
  const Program& program = Select(!request.tools.is_null());
  std::vector<std::pair<std::string, jinja::Value>> variables;
  for (const auto& [role, text] : special_tokens_) {
    variables.emplace_back(role, jinja::Value(text));
  }
  int64_t weight = 0;
  const auto add = [&](const std::string& name, const OrderedJson& json) -> absl::Status {
    JINJA_ASSIGN(jinja::Value value, jinja::Value::FromJson(json));
    weight += value.weight();
    variables.emplace_back(name, std::move(value));
    return absl::OkStatus();
  };
  JINJA_RETURN_IF_ERROR(add("messages", NormalizeMessages(request.messages)));
  JINJA_RETURN_IF_ERROR(add("tools", request.tools));
  JINJA_RETURN_IF_ERROR(add("documents", request.documents));
  variables.emplace_back("add_generation_prompt", jinja::Value(request.add_generation_prompt));
  for (const auto& item : request.variables.items()) {
    JINJA_RETURN_IF_ERROR(add(item.key(), item.value()));
  }

  jinja::RenderLimits limits;
  limits.work = kBaseWork + kWorkPerWeight * weight;
  jinja::Interpreter interpreter(program.tree.get(), limits);
  for (auto& [name, value] : jinja::Globals(clock_)) {
    interpreter.SetVariable(name, std::move(value));
  }
  for (auto& [name, value] : variables) interpreter.SetVariable(name, std::move(value));
  RenderedChat chat;
  absl::Status status = interpreter.Run(&chat.text, &chat.generation);
  if (!status.ok()) return Annotate(program.name, status);
  return chat;
}

}  // namespace attune
