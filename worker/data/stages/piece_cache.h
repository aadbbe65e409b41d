// Tokens of short pieces that were seen before, shared by all threads. Sharded, so that threads
// seldom meet; a full shard takes nothing more, because the words of a text repeat and the first
// ones seen are the frequent ones.
#pragma once

#include <array>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/strings/string_view.h"
#include "worker/data/stages/token_model.h"

namespace attune {

class PieceCache {
 public:
  static bool Takes(absl::string_view piece) { return piece.size() <= kMaxPieceBytes; }

  bool Find(absl::string_view piece, std::vector<ModelToken>* tokens) {
    Shard& shard = ShardOf(piece);
    std::lock_guard<std::mutex> lock(shard.mutex);
    const auto it = shard.tokens.find(piece);
    if (it == shard.tokens.end()) return false;
    tokens->insert(tokens->end(), it->second.begin(), it->second.end());
    return true;
  }

  // Of what `tokens` holds, from the index `first` on.
  void Insert(absl::string_view piece, const std::vector<ModelToken>& tokens, size_t first) {
    Shard& shard = ShardOf(piece);
    std::lock_guard<std::mutex> lock(shard.mutex);
    if (shard.tokens.size() >= kShardPieces) return;
    shard.tokens.emplace(piece, std::vector<ModelToken>(
                                    tokens.begin() + static_cast<int64_t>(first), tokens.end()));
  }

 private:
  static constexpr size_t kMaxPieceBytes = 64;
  static constexpr size_t kShards = 32;
  static constexpr size_t kShardPieces = 4096;
  struct Shard {
    std::mutex mutex;
    absl::flat_hash_map<std::string, std::vector<ModelToken>> tokens;
  };
  Shard& ShardOf(absl::string_view piece) { return shards_[absl::HashOf(piece) % kShards]; }
  std::array<Shard, kShards> shards_;
};

}  // namespace attune
