#include "worker/data/tokenizer_config.h"

#include <dirent.h>
#include <errno.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "worker/io/file.h"
#include "worker/io/json.h"

namespace attune {
namespace {

constexpr int64_t kConfigLimitBytes = 64 << 20;
constexpr int64_t kTemplateLimitBytes = 4 << 20;

constexpr absl::string_view kRoles[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                        "pad_token", "cls_token", "mask_token"};

// A token is a string, or an object that a saved AddedToken became.
absl::Status ReadTokens(const JsonField& root, std::map<std::string, std::string>* tokens) {
  for (absl::string_view role : kRoles) {
    const JsonField field = root.Get(role);
    if (!field.has_value() || tokens->count(std::string(role)) > 0) continue;
    const bool is_object = field.json()->is_object();
    absl::StatusOr<std::string> text = is_object ? field.Get("content").String() : field.String();
    if (!text.ok()) return text.status();
    tokens->emplace(role, *std::move(text));
  }
  return absl::OkStatus();
}

absl::Status ReadFlag(const JsonField& field, std::optional<bool>* flag) {
  if (!field.has_value()) return absl::OkStatus();
  absl::StatusOr<bool> value = field.Bool();
  if (!value.ok()) return value.status();
  *flag = *value;
  return absl::OkStatus();
}

// One template, or a list of {"name", "template"}.
absl::Status ReadTemplates(const JsonField& field, std::map<std::string, std::string>* templates) {
  if (!field.has_value()) return absl::OkStatus();
  if (field.json()->is_string()) {
    (*templates)["default"] = field.json()->get<std::string>();
    return absl::OkStatus();
  }
  absl::StatusOr<const Json*> list = field.Array();
  if (!list.ok()) return field.Error("is neither a string nor a list of named templates");
  for (size_t i = 0; i < (*list)->size(); ++i) {
    absl::StatusOr<std::string> name = field.At(i).Get("name").String();
    if (!name.ok()) return name.status();
    absl::StatusOr<std::string> text = field.At(i).Get("template").String();
    if (!text.ok()) return text.status();
    (*templates)[*name] = *std::move(text);
  }
  return absl::OkStatus();
}

absl::Status ReadTemplateFile(const std::string& path, const std::string& name,
                              std::map<std::string, std::string>* templates) {
  absl::StatusOr<std::string> text = ReadFile(path, kTemplateLimitBytes);
  if (!text.ok()) return text.status();
  (*templates)[name] = *std::move(text);
  return absl::OkStatus();
}

absl::Status ReadTemplateDirectory(const std::string& path,
                                   std::map<std::string, std::string>* templates) {
  DIR* directory = opendir(path.c_str());
  if (directory == nullptr) {
    return errno == ENOENT ? absl::OkStatus() : FileError(errno, "open", path);
  }
  std::vector<std::string> names;
  while (const dirent* entry = readdir(directory)) {
    if (absl::EndsWith(entry->d_name, ".jinja")) names.emplace_back(entry->d_name);
  }
  closedir(directory);
  for (const std::string& name : names) {
    absl::Status status = ReadTemplateFile(
        absl::StrCat(path, "/", name), std::string(absl::StripSuffix(name, ".jinja")), templates);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TokenizerConfig> TokenizerConfig::Load(const std::string& directory) {
  TokenizerConfig config;
  config.source = directory;
  const std::string path = directory + "/tokenizer_config.json";
  if (FileExists(path)) {
    absl::StatusOr<Json> json = ReadJsonFile(path, kConfigLimitBytes);
    if (!json.ok()) return json.status();
    const JsonField root(*json, path);
    if (absl::StatusOr<const Json*> object = root.Object(); !object.ok()) return object.status();
    absl::Status status = ReadTokens(root, &config.special_tokens);
    status.Update(ReadFlag(root.Get("add_bos_token"), &config.add_bos_token));
    status.Update(ReadFlag(root.Get("add_eos_token"), &config.add_eos_token));
    status.Update(ReadTemplates(root.Get("chat_template"), &config.chat_templates));
    if (!status.ok()) return status;
  }
  const std::string map_path = directory + "/special_tokens_map.json";
  if (FileExists(map_path)) {
    absl::StatusOr<Json> json = ReadJsonFile(map_path, kConfigLimitBytes);
    if (!json.ok()) return json.status();
    absl::Status status = ReadTokens(JsonField(*json, map_path), &config.special_tokens);
    if (!status.ok()) return status;
  }
  const std::string template_path = directory + "/chat_template.jinja";
  if (FileExists(template_path)) {
    absl::Status status = ReadTemplateFile(template_path, "default", &config.chat_templates);
    if (!status.ok()) return status;
  }
  absl::Status status =
      ReadTemplateDirectory(directory + "/additional_chat_templates", &config.chat_templates);
  if (!status.ok()) return status;
  return config;
}

std::string TokenizerConfig::Token(const std::string& role) const {
  const auto it = special_tokens.find(role);
  return it == special_tokens.end() ? "" : it->second;
}

}  // namespace attune
