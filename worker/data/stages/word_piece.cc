#include "worker/data/stages/word_piece.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

absl::Status NoUnknownToken(absl::string_view word) {
  return absl::FailedPreconditionError(absl::StrCat(
      "\"", word, "\" has no token, and the vocabulary does not have model.unk_token"));
}

int64_t CountCharacters(absl::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return !IsUtf8Continuation(c); });
}

// The id of the unknown token; -1 if the vocabulary lacks it, which matters only when it is needed.
absl::StatusOr<int32_t> ReadUnknown(const JsonField& model, absl::string_view fallback,
                                    const Vocabulary& vocabulary) {
  absl::StatusOr<std::string> unk = model.Get("unk_token").StringOr(fallback);
  if (!unk.ok()) return unk.status();
  return vocabulary.Find(*unk);
}

}  // namespace

absl::StatusOr<std::unique_ptr<const TokenModel>> WordPiece::FromJson(const JsonField& model) {
  auto word_piece = std::make_unique<WordPiece>();
  Vocabulary& vocabulary = word_piece->vocabulary_;
  if (absl::Status s = vocabulary.ReadObject(model.Get("vocab")); !s.ok()) return s;
  absl::StatusOr<int32_t> unk = ReadUnknown(model, "[UNK]", vocabulary);
  if (!unk.ok()) return unk.status();
  word_piece->unk_ = *unk;
  absl::StatusOr<std::string> prefix = model.Get("continuing_subword_prefix").StringOr("##");
  if (!prefix.ok()) return prefix.status();
  absl::StatusOr<int64_t> limit = model.Get("max_input_chars_per_word").IntOr(100);
  if (!limit.ok()) return limit.status();
  if (*limit < 0) return model.Get("max_input_chars_per_word").Error("is negative");
  word_piece->max_characters_ = *limit;

  std::vector<std::pair<absl::string_view, int32_t>> first, continuation;
  for (const auto& [text, id] : vocabulary.ids()) {
    if (!text.empty()) first.emplace_back(text, id);
    if (absl::StartsWith(text, *prefix) && text.size() > prefix->size()) {
      continuation.emplace_back(text.substr(prefix->size()), id);
    }
  }
  word_piece->first_ = std::make_unique<Trie>(std::move(first));
  word_piece->continuation_ = std::make_unique<Trie>(std::move(continuation));
  return word_piece;
}

bool WordPiece::Cut(absl::string_view word, std::vector<ModelToken>* tokens) const {
  for (size_t begin = 0; begin < word.size();) {
    size_t length = 0;
    int32_t id = -1;
    const Trie& trie = begin == 0 ? *first_ : *continuation_;
    trie.ForEachPrefix(word.substr(begin), [&](size_t n, int32_t value) {
      length = n;
      id = value;
    });
    if (id < 0) return false;
    tokens->push_back({id, static_cast<int32_t>(begin), static_cast<int32_t>(begin + length)});
    begin += length;
  }
  return true;
}

absl::Status WordPiece::Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const {
  const bool cached = PieceCache::Takes(piece);
  if (cached && cache_->Find(piece, tokens)) return absl::OkStatus();
  const size_t first = tokens->size();
  if (CountCharacters(piece) > max_characters_ || !Cut(piece, tokens)) {
    if (unk_ < 0) return NoUnknownToken(piece);
    tokens->resize(first);
    tokens->push_back({unk_, 0, static_cast<int32_t>(piece.size())});
  }
  if (cached) cache_->Insert(piece, *tokens, first);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<const TokenModel>> WordLevel::FromJson(const JsonField& model) {
  auto word_level = std::make_unique<WordLevel>();
  if (absl::Status s = word_level->vocabulary_.ReadObject(model.Get("vocab")); !s.ok()) return s;
  absl::StatusOr<int32_t> unk = ReadUnknown(model, "<unk>", word_level->vocabulary_);
  if (!unk.ok()) return unk.status();
  word_level->unk_ = *unk;
  return word_level;
}

absl::Status WordLevel::Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const {
  int32_t id = vocabulary_.Find(piece);
  if (id < 0) id = unk_;
  if (id < 0) return NoUnknownToken(piece);
  tokens->push_back({id, 0, static_cast<int32_t>(piece.size())});
  return absl::OkStatus();
}

}  // namespace attune
