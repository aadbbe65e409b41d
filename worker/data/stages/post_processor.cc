#include "worker/data/stages/post_processor.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "worker/data/stages/vocabulary.h"

namespace attune {
namespace {

absl::Status AppendSpecial(const JsonField& processor, const JsonField& item,
                           std::vector<int32_t>* ids) {
  absl::StatusOr<std::string> name = item.Get("SpecialToken").Get("id").String();
  if (!name.ok()) return name.status();
  absl::StatusOr<std::vector<int64_t>> token_ids =
      processor.Get("special_tokens").Get(*name).Get("ids").IntArray();
  if (!token_ids.ok()) return token_ids.status();
  for (int64_t id : *token_ids) {
    if (id < 0 || id >= Vocabulary::kMaxTokens) {
      return processor.Get("special_tokens").Get(*name).Error(absl::StrCat("has the id ", id));
    }
    ids->push_back(static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

absl::StatusOr<PostProcessor> ReadTemplate(const JsonField& field) {
  PostProcessor result;
  const JsonField single = field.Get("single");
  absl::StatusOr<const Json*> array = single.Array();
  if (!array.ok()) return array.status();
  bool seen_text = false;
  for (size_t i = 0; i < (*array)->size(); ++i) {
    const JsonField item = single.At(i);
    if (item.Get("SpecialToken").has_value()) {
      absl::Status s = AppendSpecial(field, item, seen_text ? &result.suffix : &result.prefix);
      if (!s.ok()) return s;
      continue;
    }
    absl::StatusOr<std::string> sequence = item.Get("Sequence").Get("id").String();
    if (!sequence.ok()) return sequence.status();
    if (*sequence != "A" || seen_text) {
      return single.Error("must have the sequence A exactly once");
    }
    seen_text = true;
  }
  if (!seen_text) return single.Error("must have the sequence A exactly once");
  return result;
}

// {"cls": ["<s>", 0], "sep": ["</s>", 2]}
absl::StatusOr<PostProcessor> ReadClsSep(const JsonField& field) {
  PostProcessor result;
  for (const bool is_prefix : {true, false}) {
    const JsonField pair = field.Get(is_prefix ? "cls" : "sep");
    absl::StatusOr<const Json*> array = pair.Array();
    if (!array.ok()) return array.status();
    absl::StatusOr<int64_t> id = (*array)->size() == 2 ? pair.At(1).Int() : int64_t{-1};
    if (!id.ok()) return id.status();
    if (*id < 0 || *id >= Vocabulary::kMaxTokens) {
      return pair.Error("is no token: [\"text\", id] is needed");
    }
    (is_prefix ? result.prefix : result.suffix).push_back(static_cast<int32_t>(*id));
  }
  return result;
}

}  // namespace

absl::StatusOr<PostProcessor> MakePostProcessor(const JsonField& field) {
  PostProcessor result;
  if (!field.has_value()) return result;
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "TemplateProcessing") return ReadTemplate(field);
  if (*type == "BertProcessing" || *type == "RobertaProcessing") return ReadClsSep(field);
  if (*type == "ByteLevel") return result;  // trims offsets, which ours never are
  if (*type != "Sequence") {
    return absl::UnimplementedError(
        absl::StrCat(field.Get("type").Error("").message(), "is \"", *type,
                     "\"; attune reads the post-processors TemplateProcessing, BertProcessing, "
                     "RobertaProcessing, ByteLevel and Sequence"));
  }
  const JsonField list = field.Get("processors");
  absl::StatusOr<const Json*> array = list.Array();
  if (!array.ok()) return array.status();
  for (size_t i = 0; i < (*array)->size(); ++i) {
    absl::StatusOr<PostProcessor> part = MakePostProcessor(list.At(i));
    if (!part.ok()) return part.status();
    // A later processor works on what the earlier one gave.
    result.prefix.insert(result.prefix.begin(), part->prefix.begin(), part->prefix.end());
    result.suffix.insert(result.suffix.end(), part->suffix.begin(), part->suffix.end());
  }
  return result;
}

}  // namespace attune
