#include "worker/data/stages/token_model.h"

#include "absl/strings/str_cat.h"
#include "worker/data/stages/bpe.h"
#include "worker/data/stages/unigram.h"
#include "worker/data/stages/word_piece.h"

namespace attune {

absl::StatusOr<std::string> TokenModelType(const JsonField& model) {
  if (absl::StatusOr<const Json*> object = model.Object(); !object.ok()) return object.status();
  if (!model.Get("type").has_value()) {
    if (model.Get("merges").has_value()) return "BPE";
    if (model.Get("vocab").has_value() && model.Get("vocab").json()->is_array()) return "Unigram";
    return model.Get("continuing_subword_prefix").has_value() ? "WordPiece" : "WordLevel";
  }
  absl::StatusOr<std::string> type = model.Get("type").String();
  if (!type.ok()) return type.status();
  for (absl::string_view known : {"BPE", "Unigram", "WordPiece", "WordLevel"}) {
    if (*type == known) return type;
  }
  return absl::UnimplementedError(
      absl::StrCat(model.Get("type").Error("").message(), "is \"", *type,
                   "\"; attune reads the models BPE, Unigram, WordPiece and WordLevel"));
}

absl::StatusOr<std::unique_ptr<const TokenModel>> MakeTokenModel(const JsonField& model,
                                                                 bool on_bytes) {
  absl::StatusOr<std::string> type = TokenModelType(model);
  if (!type.ok()) return type.status();
  if (*type == "BPE") return Bpe::FromJson(model, on_bytes);
  if (*type == "Unigram") return Unigram::FromJson(model);
  if (*type == "WordPiece") return WordPiece::FromJson(model);
  return WordLevel::FromJson(model);
}

}  // namespace attune
