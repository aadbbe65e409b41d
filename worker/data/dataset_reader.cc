// Reads files into a Dataset: lines in batches, each tokenised by several threads, then added in
// order.
#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/data/dataset.h"
#include "worker/data/unicode.h"
#include "worker/io/line_reader.h"

namespace attune {
namespace {

constexpr size_t kBatchBytes = 4 << 20;
constexpr size_t kBatchLines = 4096;
constexpr size_t kLinesAtOnce = 8;  // that a thread takes

}  // namespace

class DatasetReader {
 public:
  DatasetReader(const ExampleTokenizer& tokenizer, const DatasetOptions& options,
                const DuplicateSearch& search)
      : tokenizer_(tokenizer), options_(options), search_(search), dataset_(options) {
    threads_ = options.threads > 0
                   ? options.threads
                   : std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 16);
  }

  absl::Status ReadFile(const DatasetFile& file, int32_t index) {
    absl::StatusOr<LineReader> reader = LineReader::Open(file.path, options_.max_line_bytes);
    if (!reader.ok()) return reader.status();
    while (!TooManyErrors()) {
      absl::StatusOr<bool> more = ReadBatch(&*reader);
      if (!more.ok()) return more.status();
      if (lines_.empty()) break;
      TokenizeBatch(file.format);
      if (absl::Status s = AddBatch(file, index); !s.ok()) return s;
      if (!*more) break;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Dataset> Finish(absl::Span<const DatasetFile> files) {
    if (!errors_.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(absl::StrJoin(errors_, "\n"),
                       TooManyErrors() ? "\nand perhaps more: reading stopped here" : ""));
    }
    for (SpillBuffer* buffer : {&dataset_.ids_, &dataset_.trained_, &dataset_.records_}) {
      if (absl::Status s = buffer->Finish(); !s.ok()) return s;
    }
    if (dataset_.size() > 0) return std::move(dataset_);
    std::vector<std::string> paths;
    for (const DatasetFile& file : files) paths.push_back(file.path);
    const DatasetCounts& counts = dataset_.counts_;
    return absl::InvalidArgumentError(absl::StrCat(
        "the dataset is empty: ", absl::StrJoin(paths, ", "),
        num_lines_ == 0
            ? " has no line"
            : absl::StrCat(" has ", num_lines_, " examples, but ", counts.dropped_over_long,
                           " were dropped as too long and ", counts.dropped_untrained,
                           " had nothing to train after the cut")));
  }

 private:
  struct Line {
    std::string text;
    int64_t number = 0;
    absl::StatusOr<TokenizedExample> example = absl::UnknownError("");
    TextFingerprint fingerprint;
  };

  bool TooManyErrors() const { return static_cast<int>(errors_.size()) >= options_.max_errors; }

  // False if the file ends here.
  absl::StatusOr<bool> ReadBatch(LineReader* reader) {
    lines_.clear();
    for (size_t bytes = 0; bytes < kBatchBytes && lines_.size() < kBatchLines;) {
      absl::string_view text;
      absl::StatusOr<bool> more = reader->Next(&text);
      if (!more.ok() || !*more) return more;
      if (IsBlank(text)) continue;
      bytes += text.size();
      lines_.emplace_back();
      lines_.back().text = std::string(text);
      lines_.back().number = reader->line_number();
    }
    return true;
  }

  void TokenizeBatch(DatasetFormat format) {
    const bool fingerprints = search_.own != nullptr || search_.training != nullptr;
    std::atomic<size_t> next{0};
    const auto work = [&] {
      std::string content;
      for (size_t begin; (begin = next.fetch_add(kLinesAtOnce)) < lines_.size();) {
        for (size_t i = begin; i < std::min(lines_.size(), begin + kLinesAtOnce); ++i) {
          Line& line = lines_[i];
          content.clear();
          line.example =
              tokenizer_.Tokenize(line.text, format, fingerprints ? &content : nullptr);
          if (fingerprints) line.fingerprint = TextFingerprint::Of(content);
        }
      }
    };
    const size_t wanted = std::min(static_cast<size_t>(threads_), lines_.size() / kLinesAtOnce);
    std::vector<std::thread> threads;
    for (size_t i = 1; i < wanted; ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
  }

  absl::Status AddBatch(const DatasetFile& file, int32_t index) {
    for (Line& line : lines_) {
      if (TooManyErrors()) break;
      ++num_lines_;
      absl::Status status = line.example.ok() ? AddLine(&line, index) : line.example.status();
      if (status.ok()) continue;
      const std::string message = absl::StrCat(file.path, ":", line.number, ": ", status.message());
      // The model's fault, or the disk's: each line would say it.
      if (!absl::IsInvalidArgument(status)) return absl::Status(status.code(), message);
      errors_.push_back(message);
    }
    return absl::OkStatus();
  }

  absl::Status AddLine(Line* line, int32_t file) {
    TokenizedExample& example = *line->example;
    DatasetCounts& counts = dataset_.counts_;
    const int64_t length = static_cast<int64_t>(example.ids.size());
    counts.longest_tokens = std::max(counts.longest_tokens, length);
    if (length > options_.max_tokens) {
      if (example.is_document) return AddDocument(*line, file);
      if (options_.over_long == OverLong::kError) {
        return absl::InvalidArgumentError(absl::StrCat(
            "the example has ", length, " tokens, but at most ", options_.max_tokens,
            " fit. Raise batch.micro_batch_tokens, or set over_long to truncate or drop."));
      }
      if (options_.over_long == OverLong::kDrop) {
        ++counts.dropped_over_long;
        return absl::OkStatus();
      }
      example.ids.resize(static_cast<size_t>(options_.max_tokens));
      example.trained.resize(static_cast<size_t>(options_.max_tokens));
      if (example.NumTrained() == 0) {
        ++counts.dropped_untrained;
        return absl::OkStatus();
      }
      ++counts.truncated;
    }
    NoteRepeats(line->fingerprint);
    return Append(example, file, line->number);
  }

  // In parts of max_tokens. A last part of one token has nothing to train, and is left out.
  absl::Status AddDocument(const Line& line, int32_t file) {
    NoteRepeats(line.fingerprint);
    const TokenizedExample& whole = *line.example;
    const size_t limit = static_cast<size_t>(options_.max_tokens);
    for (size_t begin = 0; begin + 1 < whole.ids.size(); begin += limit) {
      const size_t end = std::min(whole.ids.size(), begin + limit);
      TokenizedExample part;
      part.ids.assign(whole.ids.begin() + static_cast<int64_t>(begin),
                      whole.ids.begin() + static_cast<int64_t>(end));
      part.trained.assign(whole.trained.begin() + static_cast<int64_t>(begin),
                          whole.trained.begin() + static_cast<int64_t>(end));
      if (absl::Status s = Append(part, file, line.number); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  void NoteRepeats(const TextFingerprint& fingerprint) {
    const int64_t example = dataset_.counts_.examples;
    if (search_.own != nullptr) {
      const auto match = search_.own->FindOrAdd(fingerprint, example);
      if (match.first >= 0) {
        ++(match.exact ? dataset_.counts_.exact_duplicates : dataset_.counts_.near_duplicates);
        dataset_.repeats_.push_back({example, match.first, match.exact});
      }
    }
    if (search_.training != nullptr) {
      const auto match = search_.training->Find(fingerprint);
      if (match.first >= 0) dataset_.leaks_.push_back({example, match.first, match.exact});
    }
  }

  absl::Status Append(const TokenizedExample& example, int32_t file, int64_t line) {
    DatasetCounts& counts = dataset_.counts_;
    const Dataset::Record record = {counts.tokens, line, file};
    absl::Status status = dataset_.ids_.Append(absl::MakeConstSpan(example.ids));
    status.Update(dataset_.trained_.Append(absl::MakeConstSpan(example.trained)));
    status.Update(dataset_.records_.Append(absl::MakeConstSpan(&record, 1)));
    ++counts.examples;
    counts.tokens += static_cast<int64_t>(example.ids.size());
    counts.trained_tokens += example.NumTrained();
    return status;
  }

  const ExampleTokenizer& tokenizer_;
  const DatasetOptions& options_;
  const DuplicateSearch& search_;
  int threads_;
  Dataset dataset_;
  std::vector<Line> lines_;
  std::vector<std::string> errors_;
  int64_t num_lines_ = 0;
};

absl::StatusOr<Dataset> LoadDataset(absl::Span<const DatasetFile> files,
                                    const ExampleTokenizer& tokenizer,
                                    const DatasetOptions& options,
                                    const DuplicateSearch& search) {
  DatasetReader reader(tokenizer, options, search);
  for (size_t i = 0; i < files.size(); ++i) {
    absl::Status status = reader.ReadFile(files[i], static_cast<int32_t>(i));
    if (!status.ok()) return status;
  }
  return reader.Finish(files);
}

}  // namespace attune
