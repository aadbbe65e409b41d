#include "worker/data/stages/bpe.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "worker/data/stages/byte_level.h"
#include "worker/data/unicode.h"

namespace attune {

// Tokens of short pieces. Sharded, so that threads seldom meet; a full shard takes nothing more,
// because the words of a text repeat and the first ones seen are the frequent ones.
class PieceCache {
 public:
  static constexpr size_t kMaxPieceBytes = 64;

  bool Find(absl::string_view piece, std::vector<BpeToken>* tokens) {
    Shard& shard = ShardOf(piece);
    std::lock_guard<std::mutex> lock(shard.mutex);
    const auto it = shard.tokens.find(piece);
    if (it == shard.tokens.end()) return false;
    tokens->insert(tokens->end(), it->second.begin(), it->second.end());
    return true;
  }

  void Insert(absl::string_view piece, std::vector<BpeToken> tokens) {
    Shard& shard = ShardOf(piece);
    std::lock_guard<std::mutex> lock(shard.mutex);
    if (shard.tokens.size() < kShardPieces) shard.tokens.emplace(piece, std::move(tokens));
  }

 private:
  static constexpr size_t kShards = 32;
  static constexpr size_t kShardPieces = 4096;
  struct Shard {
    std::mutex mutex;
    absl::flat_hash_map<std::string, std::vector<BpeToken>> tokens;
  };
  Shard& ShardOf(absl::string_view piece) { return shards_[absl::HashOf(piece) % kShards]; }
  std::array<Shard, kShards> shards_;
};

struct Bpe::Symbol {
  int32_t id;
  int32_t bytes;  // 0: merged into the one before
  int32_t previous;
  int32_t next;  // -1: none
};

Bpe::Bpe() : cache_(std::make_unique<PieceCache>()) {
  byte_ids_.fill(-1);
  fallback_ids_.fill(-1);
}
Bpe::~Bpe() = default;

absl::StatusOr<std::unique_ptr<Bpe>> Bpe::FromJson(const JsonField& model, bool on_bytes) {
  // Files of old versions lack the type.
  absl::StatusOr<std::string> type = model.Get("type").StringOr("BPE");
  if (!type.ok()) return type.status();
  if (*type != "BPE") {
    return absl::UnimplementedError(absl::StrCat(model.Get("type").Error("").message(), "is \"",
                                                 *type, "\"; attune reads the model BPE"));
  }
  std::unique_ptr<Bpe> bpe(new Bpe());
  bpe->on_bytes_ = on_bytes;
  if (absl::Status s = bpe->ReadVocab(model.Get("vocab")); !s.ok()) return s;
  if (absl::Status s = bpe->ReadMerges(model.Get("merges")); !s.ok()) return s;
  if (absl::Status s = bpe->ReadOptions(model); !s.ok()) return s;
  bpe->FindByteTokens();
  return bpe;
}

absl::Status Bpe::ReadVocab(const JsonField& vocab) {
  absl::StatusOr<const Json*> object = vocab.Object();
  if (!object.ok()) return object.status();
  int64_t size = 0;
  for (const auto& item : (*object)->items()) {
    absl::StatusOr<int64_t> id = JsonField(item.value(), "").Int();
    if (!id.ok() || *id < 0 || *id >= kMaxTokens) {
      return vocab.Get(item.key())
          .Error(
              absl::StrCat("is no token id: an integer from 0 to ", kMaxTokens - 1, " is needed"));
    }
    size = std::max(size, *id + 1);
  }
  tokens_.resize(static_cast<size_t>(size));
  std::vector<bool> taken(tokens_.size());
  for (const auto& item : (*object)->items()) {
    const size_t id = item.value().get<size_t>();
    if (taken[id]) return vocab.Get(item.key()).Error(absl::StrCat("has the id ", id, " twice"));
    taken[id] = true;
    tokens_[id] = item.key();
  }
  ids_.reserve(tokens_.size());
  pieces_.resize(tokens_.size());
  piece_ids_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (!taken[id]) continue;
    ids_.emplace(tokens_[id], static_cast<int32_t>(id));
    if (!on_bytes_) continue;
    // A token with a character outside the alphabet can never come out of bytes.
    std::optional<std::string> bytes = VisibleToBytes(tokens_[id]);
    if (!bytes.has_value()) continue;
    pieces_[id] = *std::move(bytes);
    piece_ids_.emplace(pieces_[id], static_cast<int32_t>(id));
  }
  if (!on_bytes_) piece_ids_ = ids_;
  return absl::OkStatus();
}

absl::Status Bpe::AddMerge(const JsonField& field, absl::string_view left, absl::string_view right,
                           int32_t rank) {
  const std::string merged = absl::StrCat(left, right);
  int32_t ids[3];
  int n = 0;
  for (absl::string_view token : {left, right, absl::string_view(merged)}) {
    const auto it = ids_.find(token);
    if (it == ids_.end()) {
      return field.Error(absl::StrCat("merges \"", absl::Utf8SafeCEscape(left), "\" and \"",
                                      absl::Utf8SafeCEscape(right), "\", but \"",
                                      absl::Utf8SafeCEscape(token), "\" is not in the vocabulary"));
    }
    ids[n++] = it->second;
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
  if (model.Get("unk_token").has_value()) {
    absl::StatusOr<std::string> unk = model.Get("unk_token").String();
    if (!unk.ok()) return unk.status();
    const auto it = ids_.find(*unk);
    if (it == ids_.end()) return model.Get("unk_token").Error("is not in the vocabulary");
    unk_ = it->second;
  }
  return absl::OkStatus();
}

void Bpe::FindByteTokens() {
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    if (const auto it = piece_ids_.find(absl::string_view(&c, 1));
        on_bytes_ && it != piece_ids_.end()) {
      byte_ids_[byte] = it->second;
    }
    if (const auto it = ids_.find(absl::StrFormat("<0x%02X>", byte));
        byte_fallback_ && it != ids_.end()) {
      fallback_ids_[byte] = it->second;
    }
  }
}

std::optional<int32_t> Bpe::TokenToId(absl::string_view token) const {
  const auto it = ids_.find(token);
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

const Bpe::Merge* Bpe::FindMerge(int32_t left, int32_t right) const {
  const auto it = merges_.find(static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right));
  return it == merges_.end() ? nullptr : &it->second;
}

void Bpe::StartSymbols(absl::string_view piece, std::vector<Symbol>* symbols) const {
  const auto add = [&](int32_t id, int32_t bytes) { symbols->push_back({id, bytes, 0, 0}); };
  int32_t unk_bytes = 0;  // of the unknown run that has not been added yet
  const auto flush_unk = [&] {
    if (unk_bytes > 0) add(unk_, unk_bytes);
    unk_bytes = 0;
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
      add(id, static_cast<int32_t>(i - begin));
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
      for (size_t k = 0; k < character.size(); ++k) {
        // The span of a visible character's second byte is empty, as its input is one byte.
        add(fallback_ids_[static_cast<uint8_t>(character[k])], on_bytes_ && k > 0 ? 0 : 1);
      }
    } else if (unk_ >= 0) {
      if (!fuse_unk_) flush_unk();
      unk_bytes += static_cast<int32_t>(i - begin);
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
    left.bytes += right.bytes;
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

void Bpe::Tokenize(absl::string_view piece, std::vector<BpeToken>* tokens) const {
  if (piece.empty()) return;
  if (ignore_merges_) {
    if (const auto it = piece_ids_.find(piece); it != piece_ids_.end()) {
      tokens->push_back({it->second, static_cast<int32_t>(piece.size())});
      return;
    }
  }
  const bool cacheable = piece.size() <= PieceCache::kMaxPieceBytes;
  if (cacheable && cache_->Find(piece, tokens)) return;
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  StartSymbols(piece, &symbols);
  MergeSymbols(&symbols);
  const size_t first = tokens->size();
  for (const Symbol& symbol : symbols) tokens->push_back({symbol.id, symbol.bytes});
  if (cacheable)
    cache_->Insert(piece, {tokens->begin() + static_cast<int64_t>(first), tokens->end()});
}

}  // namespace attune
