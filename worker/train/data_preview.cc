#include "worker/train/data_preview.h"

#include <algorithm>
#include <bit>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace attune {
namespace {

constexpr int kBarWidth = 40;

// Control characters that a terminal would obey are spelled out.
std::string Harmless(absl::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    const bool c1 =
        c == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F || c1) {
      absl::StrAppendFormat(&out, "\\x%02X", c1 ? static_cast<unsigned char>(text[++i]) : c);
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

std::string Marked(absl::string_view text, bool trained, bool color) {
  if (!trained) return std::string(text);
  return color ? absl::StrCat("\x1b[32m", text, "\x1b[0m") : absl::StrCat("⟦", text, "⟧");
}

// Text up to each change of the mask is decoded whole, because what a token reads as may depend on
// those before it.
std::string MarkedText(const Tokenizer& tokenizer, const ExampleView& example,
                       const PreviewOptions& options) {
  const size_t size = std::min(example.ids.size(), static_cast<size_t>(options.max_tokens));
  std::string out;
  size_t done_bytes = 0;
  for (size_t begin = 0; begin < size;) {
    size_t end = begin;
    while (end < size && example.trained[end] == example.trained[begin]) ++end;
    absl::StatusOr<std::string> text = tokenizer.Decode(example.ids.subspan(0, end), false);
    if (!text.ok()) return std::string(text.status().message());
    const std::string part = text->substr(std::min(done_bytes, text->size()));
    absl::StrAppend(&out, Marked(Harmless(part), example.trained[begin] != 0, options.color));
    done_bytes = text->size();
    begin = end;
  }
  const size_t left = example.ids.size() - size;
  if (left > 0) absl::StrAppend(&out, " ... and ", left, " tokens more");
  return out;
}

std::string FileName(const PreparedJob& job, int32_t file) {
  return std::filesystem::path(job.assignment.dataset_files(file)).filename().string();
}

struct Lengths {
  int64_t examples = 0, tokens = 0, trained = 0, longest = 0;
  std::vector<int64_t> bins;  // bin i: lengths in [2^i, 2^(i+1))

  void Add(const ExampleView& example) {
    const int64_t length = static_cast<int64_t>(example.ids.size());
    ++examples;
    tokens += length;
    trained += std::count(example.trained.begin() + 1, example.trained.end(), uint8_t{1});
    longest = std::max(longest, length);
    const size_t bin = static_cast<size_t>(std::bit_width(static_cast<uint64_t>(length))) - 1;
    if (bins.size() <= bin) bins.resize(bin + 1);
    ++bins[bin];
  }
};

std::string Line(const std::string& name, const Lengths& lengths) {
  const double share = lengths.tokens == 0 ? 0
                                           : 100.0 * static_cast<double>(lengths.trained) /
                                                 static_cast<double>(lengths.tokens);
  return absl::StrFormat("%-24s %9d examples %12d tokens %5.1f%% trained, longest %d\n", name,
                         lengths.examples, lengths.tokens, share, lengths.longest);
}

std::string Histogram(const Lengths& lengths) {
  std::string out = "tokens of an example\n";
  const int64_t most = *std::max_element(lengths.bins.begin(), lengths.bins.end());
  const auto used = [](int64_t n) { return n > 0; };
  const auto first = std::find_if(lengths.bins.begin(), lengths.bins.end(), used);
  for (auto bin = first; bin != lengths.bins.end(); ++bin) {
    const int64_t from = int64_t{1} << (bin - lengths.bins.begin());
    const int64_t width = *bin == 0 ? 0 : std::max<int64_t>(1, *bin * kBarWidth / most);
    std::string bar;
    for (int64_t i = 0; i < width; ++i) bar += "█";
    absl::StrAppendFormat(&out, "%8d-%-8d %9d %s\n", from, 2 * from - 1, *bin, bar);
  }
  return out;
}

}  // namespace

std::string PreviewExamples(const PreparedJob& job, const PreviewOptions& options) {
  std::string out;
  const auto& examples = job.train.examples;
  const size_t count = std::min(examples.size(), static_cast<size_t>(options.samples));
  for (size_t i = 0; i < count; ++i) {
    const ExampleView example = (*job.train.dataset)[examples[i]];
    absl::StrAppend(&out, "-- ", FileName(job, example.file), ":", example.line, ", ",
                    example.ids.size(), " tokens, trained ones ",
                    options.color ? "in green" : "in ⟦brackets⟧", "\n",
                    MarkedText(*job.tokenizer, example, options), "\n");
  }
  return out;
}

std::string DescribeData(const PreparedJob& job) {
  std::vector<Lengths> files(static_cast<size_t>(job.assignment.dataset_files_size()));
  Lengths all;
  for (int64_t i : job.train.examples) {
    const ExampleView example = (*job.train.dataset)[i];
    files[static_cast<size_t>(example.file)].Add(example);
    all.Add(example);
  }
  std::string out;
  for (size_t i = 0; i < files.size(); ++i) {
    out += Line(FileName(job, static_cast<int32_t>(i)), files[i]);
  }
  if (files.size() > 1) out += Line("all", all);
  if (!job.evaluation.examples.empty()) {
    Lengths held_out;
    for (int64_t i : job.evaluation.examples) held_out.Add((*job.evaluation.dataset)[i]);
    out += Line("held out", held_out);
  }
  return absl::StrCat(out, "\n", Histogram(all));
}

}  // namespace attune
