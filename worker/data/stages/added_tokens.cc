#include "worker/data/stages/added_tokens.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "worker/data/stages/vocabulary.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr size_t kMaxContentBytes = 4096;  // matching may look this far ahead at every byte

size_t SpaceBefore(absl::string_view text, size_t end, size_t limit) {
  while (end > limit) {
    size_t i = end;
    if (!IsWhiteSpace(PreviousCodePoint(text, &i))) break;
    end = i;
  }
  return std::max(end, limit);
}

size_t SpaceAfter(absl::string_view text, size_t begin) {
  while (begin < text.size()) {
    size_t i = begin;
    if (!IsWhiteSpace(NextCodePoint(text, &i))) break;
    begin = i;
  }
  return begin;
}

bool TouchesWord(absl::string_view text, size_t begin, size_t end) {
  size_t before = begin;
  size_t after = end;
  return (begin > 0 && IsWordCharacter(PreviousCodePoint(text, &before))) ||
         (end < text.size() && IsWordCharacter(NextCodePoint(text, &after)));
}

}  // namespace

absl::StatusOr<std::vector<AddedToken>> ReadAddedTokens(const JsonField& field) {
  std::vector<AddedToken> tokens;
  if (!field.has_value()) return tokens;
  absl::StatusOr<const Json*> array = field.Array();
  if (!array.ok()) return array.status();
  tokens.reserve((*array)->size());
  for (size_t i = 0; i < (*array)->size(); ++i) {
    const JsonField item = field.At(i);
    AddedToken token;
    absl::StatusOr<int64_t> id = item.Get("id").Int();
    if (!id.ok()) return id.status();
    if (*id < 0 || *id >= Vocabulary::kMaxTokens) {
      return item.Get("id").Error(
          absl::StrCat("is ", *id, "; ids from 0 to ", Vocabulary::kMaxTokens - 1, " are read"));
    }
    token.id = static_cast<int32_t>(*id);
    absl::StatusOr<std::string> content = item.Get("content").String();
    if (!content.ok()) return content.status();
    if (content->size() > kMaxContentBytes) {
      return item.Get("content").Error(
          absl::StrCat("has ", content->size(), " bytes; at most ", kMaxContentBytes, " are read"));
    }
    token.content = *std::move(content);
    absl::StatusOr<bool> special = item.Get("special").BoolOr(false);
    if (!special.ok()) return special.status();
    token.special = *special;
    struct Flag {
      absl::string_view key;
      bool* value;
      bool fallback;
    };
    for (const Flag& flag :
         {Flag{"single_word", &token.single_word, false}, Flag{"lstrip", &token.lstrip, false},
          Flag{"rstrip", &token.rstrip, false},
          Flag{"normalized", &token.normalized, !token.special}}) {
      absl::StatusOr<bool> value = item.Get(flag.key).BoolOr(flag.fallback);
      if (!value.ok()) return value.status();
      *flag.value = *value;
    }
    tokens.push_back(std::move(token));
  }
  return tokens;
}

void TokenMatcher::Add(absl::string_view text, const AddedToken* token) {
  if (text.empty()) return;
  first_[static_cast<uint8_t>(text.front())] = true;
  int32_t node = 0;
  for (char c : text) {
    const auto [it, inserted] = nodes_[node].children.try_emplace(
        static_cast<uint8_t>(c), static_cast<int32_t>(nodes_.size()));
    node = it->second;
    if (inserted) nodes_.emplace_back();
  }
  if (nodes_[node].token == nullptr) nodes_[node].token = token;
}

std::pair<size_t, const AddedToken*> TokenMatcher::MatchAt(absl::string_view text,
                                                           size_t begin) const {
  std::pair<size_t, const AddedToken*> longest = {begin, nullptr};
  int32_t node = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    const auto it = nodes_[node].children.find(static_cast<uint8_t>(text[i]));
    if (it == nodes_[node].children.end()) break;
    node = it->second;
    if (nodes_[node].token != nullptr) longest = {i + 1, nodes_[node].token};
  }
  return longest;
}

void TokenMatcher::CutPiece(const Piece& piece, std::vector<Piece>* pieces) const {
  const absl::string_view text = piece.view();
  const auto add = [&](size_t begin, size_t end, int32_t token) {
    pieces->push_back({piece.text, piece.begin + static_cast<int64_t>(begin),
                       piece.begin + static_cast<int64_t>(end), token});
  };
  size_t done = 0;  // what lies before is in `pieces`
  for (size_t i = 0; i < text.size();) {
    if (!first_[static_cast<uint8_t>(text[i])]) {
      ++i;
      continue;
    }
    const auto [match_end, token] = MatchAt(text, i);
    if (token == nullptr) {
      ++i;
      continue;
    }
    size_t begin = i;
    size_t end = match_end;
    i = match_end;
    if (token->single_word && TouchesWord(text, begin, end)) continue;
    if (token->lstrip) begin = SpaceBefore(text, begin, std::min(done, begin));
    if (token->rstrip) end = SpaceAfter(text, end);
    if (done < begin) add(done, begin, -1);
    add(begin, end, token->id);
    done = end;
  }
  if (done < text.size()) add(done, text.size(), -1);
}

void TokenMatcher::Cut(PieceList* list) const {
  if (empty()) return;
  std::vector<Piece> pieces;
  pieces.reserve(list->pieces.size());
  for (const Piece& piece : list->pieces) {
    if (piece.token >= 0) {
      pieces.push_back(piece);
    } else {
      CutPiece(piece, &pieces);
    }
  }
  list->pieces = std::move(pieces);
}

}  // namespace attune
