#include "worker/data/stages/unigram.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr double kUnkPenalty = 10.0;

}  // namespace

// The best way to cut the bytes before some place.
struct Unigram::Cut {
  double score = 0;
  int32_t begin = -1;  // of the last token; -1: no way leads here
  int32_t id = -1;     // -1: unknown
};

absl::Status Unigram::ReadVocab(const JsonField& vocab) {
  absl::StatusOr<const Json*> array = vocab.Array();
  if (!array.ok()) return array.status();
  const Json& list = **array;
  if (list.size() > static_cast<size_t>(Vocabulary::kMaxTokens)) {
    return vocab.Error(absl::StrCat("has ", list.size(), " tokens; at most ",
                                    Vocabulary::kMaxTokens, " are read"));
  }
  std::vector<std::string> tokens;
  tokens.reserve(list.size());
  double lowest = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < list.size(); ++i) {
    const Json& pair = list[i];
    if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_number() ||
        !std::isfinite(pair[1].get<double>())) {
      return vocab.At(i).Error("is no token: [\"text\", score] is needed");
    }
    tokens.push_back(pair[0].get<std::string>());
    scores_.push_back(pair[1].get<double>());
    lowest = std::min(lowest, scores_.back());
  }
  unk_score_ = lowest - kUnkPenalty;
  vocabulary_.Assign(std::move(tokens));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<const TokenModel>> Unigram::FromJson(const JsonField& model) {
  auto unigram = std::make_unique<Unigram>();
  if (absl::Status s = unigram->ReadVocab(model.Get("vocab")); !s.ok()) return s;
  const Vocabulary& vocabulary = unigram->vocabulary_;
  absl::StatusOr<int64_t> unk = model.Get("unk_id").IntOr(-1);
  if (!unk.ok()) return unk.status();
  const int64_t size = static_cast<int64_t>(vocabulary.tokens().size());
  if (model.Get("unk_id").has_value() && (*unk < 0 || *unk >= size)) {
    return model.Get("unk_id").Error(
        absl::StrCat("is ", *unk, ", but the vocabulary has ", size, " tokens"));
  }
  unigram->unk_ = static_cast<int32_t>(*unk);
  absl::StatusOr<bool> fallback = model.Get("byte_fallback").BoolOr(false);
  if (!fallback.ok()) return fallback.status();
  unigram->byte_fallback_ = *fallback;
  for (int byte = 0; byte < 256; ++byte) {
    unigram->fallback_ids_[byte] = vocabulary.Find(absl::StrFormat("<0x%02X>", byte));
  }
  std::vector<std::pair<absl::string_view, int32_t>> keys;
  for (const auto& [text, id] : vocabulary.ids()) {
    if (!text.empty()) keys.emplace_back(text, id);
  }
  unigram->trie_ = std::make_unique<Trie>(std::move(keys));
  return unigram;
}

void Unigram::FindBestCuts(absl::string_view piece, std::vector<Cut>* cuts) const {
  cuts->assign(piece.size() + 1, Cut{});
  for (size_t begin = 0; begin < piece.size();) {
    const double before = (*cuts)[begin].score;
    const auto offer = [&](size_t length, double score, int32_t id) {
      Cut& cut = (*cuts)[begin + length];
      if (cut.begin < 0 || score + before > cut.score) {
        cut = {score + before, static_cast<int32_t>(begin), id};
      }
    };
    size_t next = begin;
    NextCodePoint(piece, &next);
    bool covered = false;  // by a token of one character
    trie_->ForEachPrefix(piece.substr(begin), [&](size_t length, int32_t id) {
      offer(length, scores_[id], id);
      covered = covered || begin + length == next;
    });
    if (!covered) offer(next - begin, unk_score_, unk_);
    begin = next;
  }
}

absl::Status Unigram::Append(absl::string_view piece, int32_t begin, int32_t end,
                             std::vector<ModelToken>* tokens) const {
  const absl::string_view text = piece.substr(begin, end - begin);
  int32_t id = vocabulary_.Find(text);
  const auto has_byte = [&](char c) { return fallback_ids_[static_cast<uint8_t>(c)] >= 0; };
  if (id < 0 && byte_fallback_ && std::all_of(text.begin(), text.end(), has_byte)) {
    for (int32_t i = begin; i < end; ++i) {
      tokens->push_back({fallback_ids_[static_cast<uint8_t>(piece[i])], i, i + 1});
    }
    return absl::OkStatus();
  }
  if (id < 0) id = unk_;
  if (id < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("\"", text, "\" has no token, and the vocabulary has none for what is "
                     "unknown (model.unk_id)"));
  }
  tokens->push_back({id, begin, end});
  return absl::OkStatus();
}

absl::Status Unigram::Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const {
  const bool cached = PieceCache::Takes(piece);
  if (cached && cache_->Find(piece, tokens)) return absl::OkStatus();
  thread_local std::vector<Cut> cuts;
  FindBestCuts(piece, &cuts);
  std::vector<std::pair<int32_t, int32_t>> parts;  // last first
  for (int32_t end = static_cast<int32_t>(piece.size()); end > 0;) {
    const Cut& cut = cuts[end];
    const bool unknown = cut.id == unk_;
    const bool joins = unknown && !parts.empty() && parts.back().first == end &&
                       cuts[parts.back().second].id == unk_;
    if (joins) {
      parts.back().first = cut.begin;
    } else {
      parts.emplace_back(cut.begin, end);
    }
    end = cut.begin;
  }
  const size_t first = tokens->size();
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    if (absl::Status s = Append(piece, part->first, part->second, tokens); !s.ok()) return s;
  }
  if (cached) cache_->Insert(piece, *tokens, first);
  return absl::OkStatus();
}

}  // namespace attune
