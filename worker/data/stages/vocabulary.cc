#include "worker/data/stages/vocabulary.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace attune {

absl::Status Vocabulary::ReadObject(const JsonField& field) {
  absl::StatusOr<const Json*> object = field.Object();
  if (!object.ok()) return object.status();
  int64_t size = 0;
  for (const auto& item : (*object)->items()) {
    absl::StatusOr<int64_t> id = JsonField(item.value(), "").Int();
    if (!id.ok() || *id < 0 || *id >= kMaxTokens) {
      return field.Get(item.key())
          .Error(
              absl::StrCat("is no token id: an integer from 0 to ", kMaxTokens - 1, " is needed"));
    }
    size = std::max(size, *id + 1);
  }
  tokens_.resize(static_cast<size_t>(size));
  std::vector<bool> taken(tokens_.size());
  for (const auto& item : (*object)->items()) {
    const size_t id = item.value().get<size_t>();
    if (taken[id]) return field.Get(item.key()).Error(absl::StrCat("has the id ", id, " twice"));
    taken[id] = true;
    tokens_[id] = item.key();
  }
  ids_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (taken[id]) ids_.emplace(tokens_[id], static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

void Vocabulary::Assign(std::vector<std::string> tokens) {
  tokens_ = std::move(tokens);
  ids_.clear();
  ids_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    ids_.insert_or_assign(absl::string_view(tokens_[id]), static_cast<int32_t>(id));
  }
}

absl::StatusOr<int32_t> ReadTokenName(const JsonField& field, const Vocabulary& vocabulary) {
  if (!field.has_value()) return -1;
  absl::StatusOr<std::string> token = field.String();
  if (!token.ok()) return token.status();
  const int32_t id = vocabulary.Find(*token);
  if (id < 0) return field.Error("is not in the vocabulary");
  return id;
}

}  // namespace attune
