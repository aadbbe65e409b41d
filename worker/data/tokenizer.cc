#include "worker/data/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "worker/data/stages/added_tokens.h"
#include "worker/data/stages/aligned_text.h"
#include "worker/data/stages/token_model.h"
#include "worker/data/stages/decoder.h"
#include "worker/data/stages/normalizer.h"
#include "worker/data/stages/post_processor.h"
#include "worker/data/stages/pre_tokenizer.h"
#include "worker/data/unicode.h"
#include "worker/io/json.h"

namespace attune {
namespace {

constexpr int64_t kFileLimitBytes = 256 << 20;
constexpr size_t kTextLimitBytes = size_t{1} << 30;

}  // namespace

class TokenizerStages {
 public:
  static absl::StatusOr<std::unique_ptr<const TokenizerStages>> FromJson(const JsonField& root);

  absl::StatusOr<Encoding> Encode(absl::string_view text, bool add_special_tokens) const;
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids,
                                     bool skip_special_tokens) const;

  int64_t vocab_size() const { return static_cast<int64_t>(tokens_.size()); }
  const std::string* IdToToken(int32_t id) const {
    if (id < 0 || id >= vocab_size() || !tokens_[id].has_value()) return nullptr;
    return &*tokens_[id];
  }
  std::optional<int32_t> TokenToId(absl::string_view token) const {
    const auto it = added_ids_.find(token);
    if (it != added_ids_.end()) return it->second;
    const int32_t id = model_->vocabulary().Find(token);
    if (id < 0) return std::nullopt;
    return id;
  }
  bool is_special(int32_t id) const { return id >= 0 && id < vocab_size() && special_[id]; }
  const PostProcessor& post_processor() const { return post_processor_; }

 private:
  absl::Status AddTokens(const JsonField& field);
  absl::Status CheckIds(const JsonField& root) const;
  absl::Status CutAndNormalize(PieceList* list) const;
  absl::Status AppendModelTokens(const Piece& piece, std::vector<ModelToken>* scratch,
                                 Encoding* out) const;

  std::unique_ptr<const Normalizer> normalizer_;
  PreTokenizer pre_tokenizer_;
  std::unique_ptr<const TokenModel> model_;
  PostProcessor post_processor_;
  Decoder decoder_;
  std::vector<AddedToken> added_;
  absl::flat_hash_map<std::string, int32_t> added_ids_;
  std::vector<std::string> normalized_contents_;  // of added_, for the matcher
  TokenMatcher in_input_;
  TokenMatcher in_normalized_;
  std::vector<std::optional<std::string>> tokens_;  // by id, added tokens included
  std::vector<bool> special_;
};

absl::StatusOr<std::unique_ptr<const TokenizerStages>> TokenizerStages::FromJson(
    const JsonField& root) {
  if (absl::StatusOr<const Json*> object = root.Object(); !object.ok()) return object.status();
  auto stages = std::make_unique<TokenizerStages>();

  absl::StatusOr<std::unique_ptr<const Normalizer>> normalizer =
      MakeNormalizer(root.Get("normalizer"));
  if (!normalizer.ok()) return normalizer.status();
  stages->normalizer_ = *std::move(normalizer);

  const JsonField model = root.Get("model");
  absl::StatusOr<std::string> type = TokenModelType(model);
  if (!type.ok()) return type.status();
  absl::StatusOr<PreTokenizer> pre_tokenizer =
      MakePreTokenizer(root.Get("pre_tokenizer"), /*model_takes_bytes=*/*type == "BPE");
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();
  stages->pre_tokenizer_ = *std::move(pre_tokenizer);
  absl::StatusOr<std::unique_ptr<const TokenModel>> made =
      MakeTokenModel(model, stages->pre_tokenizer_.bytes_to_visible_at_end);
  if (!made.ok()) return made.status();
  stages->model_ = *std::move(made);

  absl::StatusOr<PostProcessor> post_processor = MakePostProcessor(root.Get("post_processor"));
  if (!post_processor.ok()) return post_processor.status();
  stages->post_processor_ = *std::move(post_processor);

  absl::StatusOr<Decoder> decoder = Decoder::FromJson(root.Get("decoder"));
  if (!decoder.ok()) return decoder.status();
  stages->decoder_ = *std::move(decoder);

  if (absl::Status s = stages->AddTokens(root.Get("added_tokens")); !s.ok()) return s;
  if (absl::Status s = stages->CheckIds(root); !s.ok()) return s;
  return stages;
}

absl::Status TokenizerStages::AddTokens(const JsonField& field) {
  absl::StatusOr<std::vector<AddedToken>> added = ReadAddedTokens(field);
  if (!added.ok()) return added.status();
  added_ = *std::move(added);
  for (const std::string& token : model_->vocabulary().tokens()) {
    tokens_.push_back(token.empty() ? std::nullopt : std::make_optional(token));
  }
  for (size_t i = 0; i < added_.size(); ++i) {
    AddedToken& token = added_[i];
    if (const int32_t id = model_->vocabulary().Find(token.content); id >= 0) {
      token.id = id;  // the model's own id wins, as in Hugging Face
    }
    if (tokens_.size() <= static_cast<size_t>(token.id)) tokens_.resize(token.id + 1);
    std::optional<std::string>& place = tokens_[token.id];
    if (place.has_value() && *place != token.content) {
      return field.At(i).Error(absl::StrCat("\"", absl::Utf8SafeCEscape(token.content),
                                            "\" has the id ", token.id, ", which \"",
                                            absl::Utf8SafeCEscape(*place), "\" has already"));
    }
    place = token.content;
    added_ids_.emplace(token.content, token.id);
  }
  special_.resize(tokens_.size());
  normalized_contents_.resize(added_.size());
  for (size_t i = 0; i < added_.size(); ++i) {
    const AddedToken& token = added_[i];
    if (token.special) special_[token.id] = true;
    if (!token.normalized) {
      in_input_.Add(token.content, &token);
      continue;
    }
    normalized_contents_[i] = token.content;
    if (normalizer_ != nullptr && !token.content.empty()) {
      std::deque<AlignedText> buffers;
      buffers.emplace_back(token.content, 0);
      Piece piece{&buffers.front(), 0, static_cast<int64_t>(token.content.size())};
      if (absl::Status s = normalizer_->Normalize(&buffers, &piece); !s.ok()) return s;
      normalized_contents_[i] = std::string(piece.view());
      tokens_[token.id] = normalized_contents_[i];  // so Hugging Face decodes it
    }
    in_normalized_.Add(normalized_contents_[i], &token);
  }
  return absl::OkStatus();
}

absl::Status TokenizerStages::CheckIds(const JsonField& root) const {
  for (const std::vector<int32_t>* ids : {&post_processor_.prefix, &post_processor_.suffix}) {
    for (int32_t id : *ids) {
      if (IdToToken(id) == nullptr) {
        return root.Get("post_processor")
            .Error(absl::StrCat("adds the token ", id, ", which the vocabulary does not have"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status TokenizerStages::CutAndNormalize(PieceList* list) const {
  in_input_.Cut(list);
  if (normalizer_ != nullptr) {
    for (Piece& piece : list->pieces) {
      if (piece.token >= 0) continue;
      if (absl::Status s = normalizer_->Normalize(&list->buffers, &piece); !s.ok()) return s;
    }
    list->pieces.erase(std::remove_if(list->pieces.begin(), list->pieces.end(),
                                      [](const Piece& piece) { return piece.begin == piece.end; }),
                       list->pieces.end());
  }
  in_normalized_.Cut(list);
  return absl::OkStatus();
}

absl::Status TokenizerStages::AppendModelTokens(const Piece& piece,
                                                std::vector<ModelToken>* scratch,
                                                Encoding* out) const {
  scratch->clear();
  if (absl::Status s = model_->Tokenize(piece.view(), scratch); !s.ok()) return s;
  const absl::string_view text = piece.text->text();
  for (const ModelToken& token : *scratch) {
    // Out to whole characters, so that a span of the input is text.
    int64_t begin = piece.begin + token.begin;
    int64_t end = piece.begin + token.end;
    while (begin > piece.begin && IsUtf8Continuation(text[begin])) --begin;
    while (end < piece.end && IsUtf8Continuation(text[end])) ++end;
    out->ids.push_back(token.id);
    out->offsets.push_back(piece.text->Origin(begin, end));
  }
  return absl::OkStatus();
}

absl::StatusOr<Encoding> TokenizerStages::Encode(absl::string_view text,
                                                 bool add_special_tokens) const {
  if (text.size() > kTextLimitBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", text.size(), " bytes; at most 1 GiB is tokenised at once"));
  }
  if (absl::Status s = CheckUtf8(text, "the text"); !s.ok()) return s;
  PieceList list;
  if (!text.empty()) {
    list.buffers.emplace_back(text, 0);
    list.pieces.push_back({&list.buffers.front(), 0, static_cast<int64_t>(text.size())});
  }
  if (absl::Status s = CutAndNormalize(&list); !s.ok()) return s;
  if (absl::Status s = pre_tokenizer_.Apply(&list); !s.ok()) return s;

  Encoding out;
  const auto add_special = [&](const std::vector<int32_t>& ids, int64_t at) {
    for (int32_t id : ids) {
      out.ids.push_back(id);
      out.offsets.push_back({at, at});
    }
  };
  if (add_special_tokens) add_special(post_processor_.prefix, 0);
  std::vector<ModelToken> scratch;
  for (const Piece& piece : list.pieces) {
    if (piece.token < 0) {
      if (absl::Status s = AppendModelTokens(piece, &scratch, &out); !s.ok()) return s;
    } else {
      out.ids.push_back(piece.token);
      out.offsets.push_back(piece.text->Origin(piece.begin, piece.end));
    }
  }
  if (add_special_tokens) {
    add_special(post_processor_.suffix, static_cast<int64_t>(text.size()));
  }
  return out;
}

absl::StatusOr<std::string> TokenizerStages::Decode(absl::Span<const int32_t> ids,
                                                    bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (int32_t id : ids) {
    const std::string* token = IdToToken(id);
    if (token == nullptr || (skip_special_tokens && special_[id])) continue;
    tokens.push_back(*token);
  }
  return decoder_.Decode(std::move(tokens));
}

Tokenizer::Tokenizer(std::unique_ptr<const TokenizerStages> stages) : stages_(std::move(stages)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

absl::StatusOr<Tokenizer> Tokenizer::Load(const std::string& path) {
  std::string file = path;
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) file += "/tokenizer.json";
  absl::StatusOr<std::string> text = ReadFile(file, kFileLimitBytes);
  if (!text.ok()) return text.status();
  return FromJson(*text, file);
}

absl::StatusOr<Tokenizer> Tokenizer::FromJson(absl::string_view json, const std::string& source) {
  absl::StatusOr<Json> parsed = ParseJson(json, source, {.max_depth = 64});
  if (!parsed.ok()) return parsed.status();
  absl::StatusOr<std::unique_ptr<const TokenizerStages>> stages =
      TokenizerStages::FromJson(JsonField(*parsed, source));
  if (!stages.ok()) return stages.status();
  return Tokenizer(*std::move(stages));
}

absl::StatusOr<Encoding> Tokenizer::Encode(absl::string_view text, bool add_special_tokens) const {
  return stages_->Encode(text, add_special_tokens);
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids,
                                              bool skip_special_tokens) const {
  for (int32_t id : ids) {
    if (id < 0) return absl::InvalidArgumentError(absl::StrCat("no token has the id ", id));
  }
  return stages_->Decode(ids, skip_special_tokens);
}

int64_t Tokenizer::vocab_size() const {
  return stages_->vocab_size();
}

std::optional<int32_t> Tokenizer::TokenToId(absl::string_view token) const {
  return stages_->TokenToId(token);
}

std::optional<std::string> Tokenizer::IdToToken(int32_t id) const {
  const std::string* token = stages_->IdToToken(id);
  if (token == nullptr) return std::nullopt;
  return *token;
}

bool Tokenizer::is_special(int32_t id) const {
  return stages_->is_special(id);
}

absl::Span<const int32_t> Tokenizer::prefix_ids() const {
  return stages_->post_processor().prefix;
}

absl::Span<const int32_t> Tokenizer::suffix_ids() const {
  return stages_->post_processor().suffix;
}

}  // namespace attune
