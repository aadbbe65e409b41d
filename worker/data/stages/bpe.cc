#include "worker/data/stages/bpe.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "worker/data/stages/byte_level.h"
#include "worker/data/unicode.h"

namespace attune {

namespace {

constexpr absl::string_view kWordStart = "\xE2\x96\x81";  // U+2581, the space of SentencePiece

// The byte at which the word that begins at `begin` ends: before the next U+2581 that follows
// another character.
size_t WordEnd(absl::string_view text, size_t begin) {
  size_t at = begin;
  while (absl::StartsWith(text.substr(at), kWordStart)) at += kWordStart.size();
  const size_t end = text.find(kWordStart, at);
  return end == absl::string_view::npos ? text.size() : end;
}

}  // namespace

struct Bpe::Symbol {
  int32_t id;
  int32_t begin;  // bytes of the piece
  int32_t end;
  int32_t previous;
  int32_t next;  // -1: none
};

Bpe::Bpe() : cache_(std::make_unique<PieceCache>()) {
  byte_ids_.fill(-1);
  fallback_ids_.fill(-1);
}

absl::StatusOr<std::unique_ptr<const TokenModel>> Bpe::FromJson(const JsonField& model,
                                                                bool on_bytes) {
  std::unique_ptr<Bpe> bpe(new Bpe());
  bpe->on_bytes_ = on_bytes;
  if (absl::Status s = bpe->vocabulary_.ReadObject(model.Get("vocab")); !s.ok()) return s;
  bpe->FindPieces();
  if (absl::Status s = bpe->ReadMerges(model.Get("merges")); !s.ok()) return s;
  if (absl::Status s = bpe->ReadOptions(model); !s.ok()) return s;
  bpe->FindByteTokens();
  bpe->FindWordStart();
  return bpe;
}

void Bpe::FindPieces() {
  if (!on_bytes_) {
    piece_ids_ = vocabulary_.ids();
    return;
  }
  const std::vector<std::string>& tokens = vocabulary_.tokens();
  pieces_.resize(tokens.size());
  piece_ids_.reserve(tokens.size());
  for (const auto& [text, id] : vocabulary_.ids()) {
    // A token with a character outside the alphabet can never come out of bytes.
    std::optional<std::string> bytes = VisibleToBytes(text);
    if (!bytes.has_value()) continue;
    pieces_[id] = *std::move(bytes);
    piece_ids_.emplace(pieces_[id], id);
  }
}

void Bpe::FindWordStart() {
  if (on_bytes_ || ignore_merges_ || piece_ids_.count(kWordStart) == 0) return;
  cut_at_words_ = std::all_of(
      vocabulary_.tokens().begin(), vocabulary_.tokens().end(),
      [](const std::string& token) { return WordEnd(token, 0) == token.size(); });
}

absl::Status Bpe::AddMerge(const JsonField& field, absl::string_view left, absl::string_view right,
                           int32_t rank) {
  const std::string merged = absl::StrCat(left, right);
  int32_t ids[3];
  int n = 0;
  for (absl::string_view token : {left, right, absl::string_view(merged)}) {
    const int32_t id = vocabulary_.Find(token);
    if (id < 0) {
      return field.Error(absl::StrCat("merges \"", absl::Utf8SafeCEscape(left), "\" and \"",
                                      absl::Utf8SafeCEscape(right), "\", but \"",
                                      absl::Utf8SafeCEscape(token), "\" is not in the vocabulary"));
    }
    ids[n++] = id;
  }
  const uint64_t key = static_cast<uint64_t>(ids[0]) << 32 | static_cast<uint32_t>(ids[1]);
  merges_[key] = {rank, ids[2]};  // of a pair that is there twice, the later one counts
  return absl::OkStatus();
}

absl::Status Bpe::ReadMerges(const JsonField& merges) {
  absl::StatusOr<const Json*> array = merges.Array();
  if (!array.ok()) return array.status();
  merges_.reserve((*array)->size());
  int32_t rank = 0;
  for (size_t i = 0; i < (*array)->size(); ++i) {
    const Json& merge = (**array)[i];
    absl::string_view left, right;
    if (merge.is_string()) {
      const absl::string_view text = merge.get_ref<const std::string&>();
      if (absl::StartsWith(text, "#version")) continue;
      const size_t space = text.find(' ');
      if (space != absl::string_view::npos &&
          text.find(' ', space + 1) == absl::string_view::npos) {
        left = text.substr(0, space);
        right = text.substr(space + 1);
      }
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    }
    if (left.empty() || right.empty()) {
      return merges.At(i).Error("is no merge: \"left right\" or [\"left\", \"right\"] is needed");
    }
    if (absl::Status s = AddMerge(merges.At(i), left, right, rank++); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status Bpe::ReadOptions(const JsonField& model) {
  absl::StatusOr<double> dropout = model.Get("dropout").DoubleOr(0);
  if (!dropout.ok()) return dropout.status();
  if (*dropout != 0) {
    return absl::UnimplementedError(
        absl::StrCat(model.Get("dropout").Error("").message(),
                     "is set; attune tokenises without dropout. Set it to null."));
  }
  for (absl::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    absl::StatusOr<std::string> text = model.Get(affix).StringOr("");
    if (!text.ok()) return text.status();
    if (!text->empty()) {
      return absl::UnimplementedError(
          absl::StrCat(model.Get(affix).Error("").message(), "is set; attune does not read it"));
    }
  }
  struct Option {
    absl::string_view key;
    bool* value;
  };
  for (const Option& option :
       {Option{"ignore_merges", &ignore_merges_}, Option{"byte_fallback", &byte_fallback_},
        Option{"fuse_unk", &fuse_unk_}}) {
    absl::StatusOr<bool> value = model.Get(option.key).BoolOr(false);
    if (!value.ok()) return value.status();
    *option.value = *value;
  }
  absl::StatusOr<int32_t> unk = ReadTokenName(model.Get("unk_token"), vocabulary_);
  if (!unk.ok()) return unk.status();
  unk_ = *unk;
  return absl::OkStatus();
}

void Bpe::FindByteTokens() {
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    if (const auto it = piece_ids_.find(absl::string_view(&c, 1));
        on_bytes_ && it != piece_ids_.end()) {
      byte_ids_[byte] = it->second;
    }
    if (byte_fallback_) fallback_ids_[byte] = vocabulary_.Find(absl::StrFormat("<0x%02X>", byte));
  }
}

const Bpe::Merge* Bpe::FindMerge(int32_t left, int32_t right) const {
  const auto it = merges_.find(static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right));
  return it == merges_.end() ? nullptr : &it->second;
}

void Bpe::StartSymbols(absl::string_view piece, std::vector<Symbol>* symbols) const {
  const auto add = [&](int32_t id, size_t begin, size_t end) {
    symbols->push_back({id, static_cast<int32_t>(begin), static_cast<int32_t>(end), 0, 0});
  };
  size_t unk_begin = 0;  // of the unknown run that has not been added yet
  size_t unk_end = 0;
  const auto flush_unk = [&] {
    if (unk_end > unk_begin) add(unk_, unk_begin, unk_end);
    unk_begin = unk_end = 0;
  };
  for (size_t i = 0; i < piece.size();) {
    const size_t begin = i;
    int32_t id = -1;
    if (on_bytes_) {
      id = byte_ids_[static_cast<uint8_t>(piece[i++])];
    } else {
      NextCodePoint(piece, &i);
      const auto it = piece_ids_.find(piece.substr(begin, i - begin));
      if (it != piece_ids_.end()) id = it->second;
    }
    if (id >= 0) {
      flush_unk();
      add(id, begin, i);
      continue;
    }
    // On bytes the fallback would be spelled out for the visible character's UTF-8, not for the
    // byte; such a vocabulary (byte-level with holes, and <0xNN>) does as the file says.
    std::string character(piece.substr(begin, i - begin));
    if (on_bytes_) {
      character.clear();
      AppendUtf8(ByteToVisible(static_cast<uint8_t>(piece[begin])), &character);
    }
    const bool fallback =
        byte_fallback_ && std::all_of(character.begin(), character.end(), [&](char c) {
          return fallback_ids_[static_cast<uint8_t>(c)] >= 0;
        });
    if (fallback) {
      for (char c : character) add(fallback_ids_[static_cast<uint8_t>(c)], begin, i);
    } else if (unk_ >= 0) {
      if (!fuse_unk_) flush_unk();
      if (unk_end == 0) unk_begin = begin;
      unk_end = i;
    }
  }
  flush_unk();
}

void Bpe::MergeSymbols(std::vector<Symbol>* symbols) const {
  std::vector<Symbol>& s = *symbols;
  struct Candidate {
    int32_t rank;
    int32_t position;
    int32_t id;
    // A heap has the greatest on top: lowest rank, then leftmost.
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  thread_local std::vector<Candidate> heap;
  heap.clear();
  const int32_t n = static_cast<int32_t>(s.size());
  const auto consider = [&](int32_t left) {
    if (left < 0 || s[left].next < 0) return;
    if (const Merge* merge = FindMerge(s[left].id, s[s[left].next].id)) {
      heap.push_back({merge->rank, left, merge->id});
      std::push_heap(heap.begin(), heap.end());
    }
  };
  for (int32_t i = 0; i < n; ++i) {
    s[i].previous = i - 1;
    s[i].next = i + 1 < n ? i + 1 : -1;
  }
  for (int32_t i = 0; i < n; ++i) consider(i);
  std::vector<bool> gone(s.size());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate top = heap.back();
    heap.pop_back();
    Symbol& left = s[top.position];
    if (gone[top.position] || left.next < 0) continue;
    const Merge* merge = FindMerge(left.id, s[left.next].id);
    if (merge == nullptr || merge->id != top.id) continue;  // the neighbours changed meanwhile
    const Symbol& right = s[left.next];
    gone[left.next] = true;
    left.id = top.id;
    left.end = right.end;
    left.next = right.next;
    if (left.next >= 0) s[left.next].previous = top.position;
    consider(left.previous);
    consider(top.position);
  }
  size_t kept = 0;
  for (size_t i = 0; i < s.size(); ++i) {
    if (!gone[i]) s[kept++] = s[i];
  }
  s.resize(kept);
}

void Bpe::TokenizeWord(absl::string_view word, int32_t offset,
                       std::vector<ModelToken>* tokens) const {
  const size_t first = tokens->size();
  const bool cached = PieceCache::Takes(word);
  if (!cached || !cache_->Find(word, tokens)) {
    thread_local std::vector<Symbol> symbols;
    symbols.clear();
    symbols.reserve(word.size());
    StartSymbols(word, &symbols);
    MergeSymbols(&symbols);
    for (const Symbol& symbol : symbols) tokens->push_back({symbol.id, symbol.begin, symbol.end});
    if (cached) cache_->Insert(word, *tokens, first);
  }
  for (size_t i = first; i < tokens->size(); ++i) {
    (*tokens)[i].begin += offset;
    (*tokens)[i].end += offset;
  }
}

absl::Status Bpe::Tokenize(absl::string_view piece, std::vector<ModelToken>* tokens) const {
  if (ignore_merges_) {
    if (const auto it = piece_ids_.find(piece); it != piece_ids_.end()) {
      tokens->push_back({it->second, 0, static_cast<int32_t>(piece.size())});
      return absl::OkStatus();
    }
  }
  for (size_t begin = 0; begin < piece.size();) {
    const size_t end = cut_at_words_ ? WordEnd(piece, begin) : piece.size();
    TokenizeWord(piece.substr(begin, end - begin), static_cast<int32_t>(begin), tokens);
    begin = end;
  }
  return absl::OkStatus();
}

}  // namespace attune
