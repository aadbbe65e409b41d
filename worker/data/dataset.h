// Dataset: JSONL files (plain or compressed), tokenised, with the mask of what is trained. The
// formats of lines are those of LineFormat (chat_example.h).
//
// The mask of a conversation comes from the template's `generation` marks where it has them. Else
// the conversation is rendered up to before (with the generation prompt) and up to after each
// assistant turn; both must be prefixes of the whole text, and what lies between is trained. The
// whole text is tokenised once: a token is trained if its bytes begin inside a trained range. The
// special token that ends a turn is trained with it, white space after that token is not. A
// message may say "weight": 0 to be left out. Each example has exactly one BOS if the tokenizer
// wants one. Prompt and completion are tokenised apart, as they are when the model is used.
//
// A document ("text") ends with an EOS and is trained whole; one that is longer than max_tokens is
// cut into several examples.
//
// Lines that are wrong are collected (max_errors of them) into one status, "file:line: what". Lines
// are tokenised by several threads; the result does not depend on how many. What is larger than
// spill_bytes lies in a file that is mapped, so memory does not grow with the data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/data/chat_example.h"
#include "worker/data/chat_template.h"
#include "worker/data/duplicates.h"
#include "worker/data/tokenizer.h"
#include "worker/data/tokenizer_config.h"
#include "worker/io/spill_buffer.h"

namespace attune {

using DatasetFormat = LineFormat;
enum class TrainOn : uint8_t { kAssistant, kLastAssistant, kAll };
enum class OverLong : uint8_t { kError, kTruncate, kDrop };  // kTruncate keeps the beginning

struct DatasetOptions {
  TrainOn train_on = TrainOn::kAssistant;
  OverLong over_long = OverLong::kError;
  int64_t max_tokens = 2048;  // of one example
  int max_errors = 20;
  int64_t max_line_bytes = 64 << 20;
  int threads = 0;  // that tokenise; 0: one per core
  std::string spill_directory = "/var/tmp";
  size_t spill_bytes = size_t{64} << 20;  // of each of three buffers
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
  bool is_document = false;  // may be cut into several
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
  int64_t exact_duplicates = 0;   // of an example before
  int64_t near_duplicates = 0;
};

// An example that says what another one says.
struct Repeat {
  int64_t example = 0;  // index into its Dataset
  int64_t first = 0;    // index of the other one
  bool exact = false;
};

class Dataset {
 public:
  int64_t size() const { return static_cast<int64_t>(records().size()); }
  ExampleView operator[](int64_t i) const;
  int64_t length(int64_t i) const;
  const DatasetCounts& counts() const { return counts_; }
  // Examples that repeat one of this dataset, ascending; of training examples, which this one
  // repeats.
  const std::vector<Repeat>& repeats() const { return repeats_; }
  const std::vector<Repeat>& leaks() const { return leaks_; }

 private:
  friend class DatasetReader;
  struct Record {
    int64_t begin;  // of its first token
    int64_t line;
    int64_t file;
  };
  explicit Dataset(const DatasetOptions& options);
  absl::Span<const Record> records() const { return records_.View<Record>(); }

  SpillBuffer ids_;      // int32, all examples one after the other
  SpillBuffer trained_;  // uint8
  SpillBuffer records_;
  DatasetCounts counts_;
  std::vector<Repeat> repeats_, leaks_;
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
  // `content`, if there is one, gets what duplicates are looked for in.
  absl::StatusOr<TokenizedExample> Tokenize(absl::string_view line, DatasetFormat format,
                                            std::string* content = nullptr) const;

 private:
  absl::StatusOr<TokenizedExample> TokenizeChat(const ExampleText& text) const;
  // Of a pair, or of a document.
  absl::StatusOr<TokenizedExample> TokenizePair(const ExampleText& text) const;
  // Byte ranges of the whole text, one per turn that is trained.
  absl::StatusOr<std::vector<ByteSpan>> TrainedRanges(const ExampleText& text,
                                                      const ChatRequest& request,
                                                      const RenderedChat& whole) const;
  absl::StatusOr<ByteSpan> RangeByPrefixes(const ChatRequest& request, int64_t turn,
                                           const std::string& whole) const;
  void MarkRange(const ByteSpan& range, absl::string_view text, const Encoding& encoding,
                 std::vector<uint8_t>* trained) const;
  void FixBos(TokenizedExample* example) const;

  const Tokenizer* tokenizer_;
  const ChatTemplate* chat_template_;
  DatasetOptions options_;
  std::vector<int32_t> bos_;  // what each example begins with
  int32_t bos_token_ = -1;    // never there twice; -1: none is known
  int32_t eos_token_ = -1;
};

// What repeats are looked for in: both may be null. Keys are indices of examples.
struct DuplicateSearch {
  DuplicateFinder* own = nullptr;             // takes this dataset's examples
  const DuplicateFinder* training = nullptr;  // has those of the training set
};

// Reads all files. INVALID_ARGUMENT with the collected errors, or for a dataset without a single
// example; NOT_FOUND for a missing file.
absl::StatusOr<Dataset> LoadDataset(absl::Span<const DatasetFile> files,
                                    const ExampleTokenizer& tokenizer,
                                    const DatasetOptions& options,
                                    const DuplicateSearch& search = {});

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
