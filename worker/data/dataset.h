// Dataset: JSONL files of conversations, tokenised, with the mask of what is trained.
//
// A line is one of
//   chat               {"messages": [{"role", "content", ...}, ...], "tools": [...]}   (OpenAI)
//   prompt/completion  {"prompt": string or messages, "completion": string or messages}
//
// The mask of a conversation comes from the template's `generation` marks where it has them. Else
// the conversation is rendered up to before (with the generation prompt) and up to after each
// assistant turn; both must be prefixes of the whole text, and what lies between is trained, with
// the token that ends the turn. The whole text is tokenised once: a token is trained if its bytes
// begin inside a trained range. Each example has exactly one BOS if the tokenizer wants one.
//
// Lines that are wrong are collected (max_errors of them) into one status, "file:line: what".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/data/chat_template.h"
#include "worker/data/tokenizer.h"
#include "worker/data/tokenizer_config.h"

namespace attune {

enum class DatasetFormat : uint8_t { kAuto, kChat, kPromptCompletion };  // kAuto: by the keys
enum class TrainOn : uint8_t { kAssistant, kLastAssistant, kAll };
enum class OverLong : uint8_t { kError, kTruncate, kDrop };  // kTruncate keeps the beginning

struct DatasetOptions {
  TrainOn train_on = TrainOn::kAssistant;
  OverLong over_long = OverLong::kError;
  int64_t max_tokens = 2048;  // of one example
  int max_errors = 20;
  int64_t max_line_bytes = 64 << 20;
};

struct DatasetFile {
  std::string path;
  DatasetFormat format = DatasetFormat::kAuto;
};

// One example; spans into the Dataset.
struct ExampleView {
  absl::Span<const int32_t> ids;
  absl::Span<const uint8_t> trained;  // per id: 1 if the model is trained to produce it
  int32_t file = 0;                   // index into the files that were read
  int64_t line = 0;                   // from 1
};

struct TokenizedExample {
  std::vector<int32_t> ids;
  std::vector<uint8_t> trained;
  // Tokens that can be trained: the first one has nothing that predicts it.
  int64_t NumTrained() const;
};

struct DatasetCounts {
  int64_t examples = 0;           // kept
  int64_t tokens = 0;             // of those kept
  int64_t trained_tokens = 0;     // of those kept
  int64_t truncated = 0;          // kept, but cut
  int64_t dropped_over_long = 0;  // by OverLong::kDrop
  int64_t dropped_untrained = 0;  // nothing to train was left after the cut
  int64_t longest_tokens = 0;     // before the cut
};

class Dataset {
 public:
  int64_t size() const { return static_cast<int64_t>(begins_.size()) - 1; }
  ExampleView operator[](int64_t i) const;
  int64_t length(int64_t i) const { return begins_[i + 1] - begins_[i]; }
  const DatasetCounts& counts() const { return counts_; }

 private:
  friend class DatasetReader;
  std::vector<int32_t> ids_;  // all examples, one after the other
  std::vector<uint8_t> trained_;
  std::vector<int64_t> begins_ = {0};
  std::vector<int64_t> lines_;
  std::vector<int32_t> files_;
  DatasetCounts counts_;
};

// Turns lines into examples. The tokenizer and the template must outlive it; Tokenize may be
// called from several threads at once.
class ExampleTokenizer {
 public:
  // `chat_template` may be null: then conversations are FAILED_PRECONDITION. FAILED_PRECONDITION
  // also if prompt/completion needs an EOS and the tokenizer names none.
  ExampleTokenizer(const Tokenizer* tokenizer, const TokenizerConfig& config,
                   const ChatTemplate* chat_template, const DatasetOptions& options);

  // One line. The status says what is wrong with it, without file and line. Knows nothing of
  // max_tokens.
  absl::StatusOr<TokenizedExample> Tokenize(absl::string_view line, DatasetFormat format) const;

 private:
  struct Ranges;
  absl::StatusOr<TokenizedExample> TokenizeChat(ChatRequest request, int64_t first_trained) const;
  absl::StatusOr<TokenizedExample> TokenizeText(const std::string& prompt,
                                                const std::string& completion) const;
  absl::StatusOr<std::vector<ByteSpan>> TrainedRanges(const ChatRequest& request,
                                                      const RenderedChat& whole,
                                                      int64_t first_trained) const;
  absl::StatusOr<std::vector<ByteSpan>> PrefixRanges(const ChatRequest& request,
                                                     const std::string& text,
                                                     const std::vector<int64_t>& turns) const;
  void AddBos(TokenizedExample* example) const;

  const Tokenizer* tokenizer_;
  const ChatTemplate* chat_template_;
  DatasetOptions options_;
  std::vector<int32_t> bos_;  // what each example begins with
  int32_t eos_ = -1;          // -1: none is known
};

// Reads all files. INVALID_ARGUMENT with the collected errors, or for a dataset without a single
// example; NOT_FOUND for a missing file.
absl::StatusOr<Dataset> LoadDataset(absl::Span<const DatasetFile> files,
                                    const ExampleTokenizer& tokenizer,
                                    const DatasetOptions& options);

// Indices of a dataset, ascending.
struct HeldOutSplit {
  std::vector<int64_t> train;
  std::vector<int64_t> held_out;
};

// Holds out each example with probability `fraction` by a hash of (seed, index), so that an
// example's side depends on nothing else. With 0 < fraction neither side is left empty as long as
// there are two examples.
HeldOutSplit SplitHeldOut(int64_t num_examples, double fraction, uint64_t seed);

}  // namespace attune
