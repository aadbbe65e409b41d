#include "worker/data/stages/decoder.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/data/stages/byte_level.h"
#include "worker/data/unicode.h"

namespace attune {

absl::StatusOr<Decoder> Decoder::FromJson(const JsonField& field) {
  Decoder decoder;
  decoder.join_with_spaces_ = !field.has_value();
  if (!field.has_value()) return decoder;
  if (absl::Status s = AddSteps(field, &decoder.steps_); !s.ok()) return s;
  return decoder;
}

absl::Status Decoder::AddSteps(const JsonField& field, std::vector<Step>* steps) {
  absl::StatusOr<std::string> type = field.Get("type").String();
  if (!type.ok()) return type.status();
  if (*type == "ByteLevel") {
    steps->push_back(Step::kByteLevel);
    return absl::OkStatus();
  }
  if (*type == "Fuse") {
    steps->push_back(Step::kFuse);
    return absl::OkStatus();
  }
  if (*type != "Sequence") {
    return absl::UnimplementedError(
        absl::StrCat(field.Get("type").Error("").message(), "is \"", *type,
                     "\"; attune reads the decoders ByteLevel, Fuse and Sequence"));
  }
  const JsonField list = field.Get("decoders");
  absl::StatusOr<const Json*> array = list.Array();
  if (!array.ok()) return array.status();
  for (size_t i = 0; i < (*array)->size(); ++i) {
    if (absl::Status s = AddSteps(list.At(i), steps); !s.ok()) return s;
  }
  return absl::OkStatus();
}

std::string Decoder::Decode(std::vector<std::string> tokens) const {
  if (join_with_spaces_) return absl::StrJoin(tokens, " ");
  for (Step step : steps_) {
    if (step == Step::kByteLevel) {
      // The bytes of a character may be spread over tokens, so they are put together first. A
      // token with a character outside the alphabet stands for itself.
      std::string bytes;
      for (const std::string& token : tokens) {
        const std::optional<std::string> decoded = VisibleToBytes(token);
        bytes.append(decoded.has_value() ? *decoded : token);
      }
      tokens = {ReplaceInvalidUtf8(bytes)};
    } else {
      tokens = {absl::StrJoin(tokens, "")};
    }
  }
  return absl::StrJoin(tokens, "");
}

}  // namespace attune
