#include "worker/data/dataset.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "worker/data/random.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr uint64_t kHoldOutStream = 1;  // packing.cc uses 2 and 3

// A short piece of text for a message.
std::string Shown(absl::string_view text) {
  size_t size = std::min<size_t>(text.size(), 40);
  while (size > 0 && size < text.size() && IsUtf8Continuation(text[size])) --size;
  std::string out;
  for (char c : text.substr(0, size)) {
    if (c == '\n') {
      out += "\\n";
    } else {
      out.push_back(c);
    }
  }
  return absl::StrCat("\"", out, size < text.size() ? "...\"" : "\"");
}

}  // namespace

Dataset::Dataset(const DatasetOptions& options)
    : ids_(options.spill_directory, options.spill_bytes),
      trained_(options.spill_directory, options.spill_bytes),
      records_(options.spill_directory, options.spill_bytes) {}

int64_t Dataset::length(int64_t i) const {
  CHECK(i >= 0 && i < size());
  const int64_t end = i + 1 < size() ? records()[static_cast<size_t>(i) + 1].begin
                                     : static_cast<int64_t>(trained_.size());
  return end - records()[static_cast<size_t>(i)].begin;
}

ExampleView Dataset::operator[](int64_t i) const {
  const size_t tokens = static_cast<size_t>(length(i));
  const Record& record = records()[static_cast<size_t>(i)];
  const size_t begin = static_cast<size_t>(record.begin);
  return {.ids = ids_.View<int32_t>().subspan(begin, tokens),
          .trained = trained_.View<uint8_t>().subspan(begin, tokens),
          .file = static_cast<int32_t>(record.file),
          .line = record.line};
}

int64_t TokenizedExample::NumTrained() const {
  if (trained.empty()) return 0;
  return std::count(trained.begin() + 1, trained.end(), uint8_t{1});
}

ExampleTokenizer::ExampleTokenizer(const Tokenizer* tokenizer, const TokenizerConfig& config,
                                   const ChatTemplate* chat_template, const DatasetOptions& options)
    : tokenizer_(tokenizer), chat_template_(chat_template), options_(options) {
  bos_token_ = tokenizer->TokenToId(config.Token("bos_token")).value_or(-1);
  eos_token_ = tokenizer->TokenToId(config.Token("eos_token")).value_or(-1);
  if (!config.add_bos_token.has_value()) {
    bos_.assign(tokenizer->prefix_ids().begin(), tokenizer->prefix_ids().end());
  } else if (*config.add_bos_token && bos_token_ >= 0) {
    bos_ = {bos_token_};
  }
  if (bos_token_ < 0 && bos_.size() == 1) bos_token_ = bos_[0];
  if (eos_token_ < 0 && !tokenizer->suffix_ids().empty()) {
    eos_token_ = tokenizer->suffix_ids().back();
  }
}

absl::StatusOr<TokenizedExample> ExampleTokenizer::Tokenize(absl::string_view line,
                                                            DatasetFormat format,
                                                            std::string* content) const {
  absl::StatusOr<ExampleText> text = ParseExample(line, format);
  if (!text.ok()) return text.status();
  if (text->kind == ExampleText::Kind::kPreference) {
    return absl::FailedPreconditionError(
        "is a preference pair (chosen and rejected), which sft cannot train on. Give prompt and "
        "completion, with the chosen answers as completions.");
  }
  if (content != nullptr) *content = text->Content();
  absl::StatusOr<TokenizedExample> example =
      text->kind == ExampleText::Kind::kChat ? TokenizeChat(*text) : TokenizePair(*text);
  if (!example.ok()) return example.status();
  FixBos(&*example);
  if (example->NumTrained() == 0) {
    return absl::InvalidArgumentError("nothing to train: no token of this example is trained");
  }
  return example;
}

absl::StatusOr<TokenizedExample> ExampleTokenizer::TokenizePair(const ExampleText& text) const {
  if (eos_token_ < 0) {
    return absl::FailedPreconditionError(
        "the tokenizer names no eos_token, which prompt/completion examples and documents must end "
        "with. Set it in tokenizer_config.json.");
  }
  absl::StatusOr<Encoding> prompt = tokenizer_->Encode(text.prompt, false);
  if (!prompt.ok()) return prompt.status();
  absl::StatusOr<Encoding> completion = tokenizer_->Encode(text.completion, false);
  if (!completion.ok()) return completion.status();
  TokenizedExample example;
  example.is_document = text.kind == ExampleText::Kind::kDocument;
  example.ids = std::move(prompt->ids);
  example.trained.assign(example.ids.size(), options_.train_on == TrainOn::kAll ? 1 : 0);
  example.ids.insert(example.ids.end(), completion->ids.begin(), completion->ids.end());
  if (example.ids.back() != eos_token_) example.ids.push_back(eos_token_);
  example.trained.resize(example.ids.size(), 1);
  return example;
}

absl::StatusOr<TokenizedExample> ExampleTokenizer::TokenizeChat(const ExampleText& text) const {
  if (chat_template_ == nullptr) {
    return absl::FailedPreconditionError(
        "the model has no chat template, which conversations need. Take a model that has one, or "
        "put chat_template.jinja beside its tokenizer.json.");
  }
  if (options_.train_on != TrainOn::kAll) {
    if (text.assistant_turns.empty()) {
      return absl::InvalidArgumentError("the conversation has no assistant turn: nothing to train");
    }
    if (std::find(text.trained_turns.begin(), text.trained_turns.end(), true) ==
        text.trained_turns.end()) {
      return absl::InvalidArgumentError(
          "no assistant turn is to be trained: all have weight 0, or belong to the prompt");
    }
  }
  const ChatRequest* request = &text.request;
  absl::StatusOr<RenderedChat> whole = chat_template_->Render(*request);
  if (!whole.ok() && text.verbatim_request.messages != text.request.messages) {
    request = &text.verbatim_request;  // a template that wants tool arguments as text
    absl::StatusOr<RenderedChat> verbatim = chat_template_->Render(*request);
    if (verbatim.ok()) whole = std::move(verbatim);
  }
  if (!whole.ok()) return whole.status();
  absl::StatusOr<Encoding> encoding = tokenizer_->Encode(whole->text, false);
  if (!encoding.ok()) return encoding.status();
  TokenizedExample example;
  example.trained.resize(encoding->ids.size());
  if (options_.train_on == TrainOn::kAll) {
    std::fill(example.trained.begin(), example.trained.end(), uint8_t{1});
  } else {
    absl::StatusOr<std::vector<ByteSpan>> ranges = TrainedRanges(text, *request, *whole);
    if (!ranges.ok()) return ranges.status();
    for (const ByteSpan& range : *ranges) {
      MarkRange(range, whole->text, *encoding, &example.trained);
    }
  }
  example.ids = std::move(encoding->ids);
  return example;
}

absl::StatusOr<std::vector<ByteSpan>> ExampleTokenizer::TrainedRanges(
    const ExampleText& text, const ChatRequest& request, const RenderedChat& whole) const {
  std::vector<size_t> turns;  // indices into text.assistant_turns
  for (size_t i = 0; i < text.trained_turns.size(); ++i) {
    if (text.trained_turns[i]) turns.push_back(i);
  }
  const bool all_turns =
      turns.size() == text.assistant_turns.size() && options_.train_on != TrainOn::kLastAssistant;
  if (options_.train_on == TrainOn::kLastAssistant) turns = {turns.back()};
  std::vector<ByteSpan> ranges;
  if (!chat_template_->HasGenerationTags(!request.tools.is_null())) {
    for (size_t i : turns) {
      absl::StatusOr<ByteSpan> range =
          RangeByPrefixes(request, text.assistant_turns[i], whole.text);
      if (!range.ok()) return range.status();
      ranges.push_back(*range);
    }
    return ranges;
  }
  if (all_turns) return whole.generation;
  if (whole.generation.size() != text.assistant_turns.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the chat template marks ", whole.generation.size(), " parts of the text for ",
        text.assistant_turns.size(),
        " assistant turns, so single turns cannot be chosen. Train on all assistant turns."));
  }
  for (size_t i : turns) ranges.push_back(whole.generation[i]);
  return ranges;
}

absl::StatusOr<ByteSpan> ExampleTokenizer::RangeByPrefixes(const ChatRequest& request, int64_t turn,
                                                           const std::string& whole) const {
  const int64_t count = static_cast<int64_t>(request.messages.size());
  int64_t edges[2] = {0, static_cast<int64_t>(whole.size())};
  for (int after = 0; after < 2; ++after) {
    const int64_t messages = turn + after;
    if (messages == count) continue;  // the whole text
    ChatRequest prefix;
    prefix.tools = request.tools;
    prefix.documents = request.documents;
    prefix.variables = request.variables;
    prefix.add_generation_prompt = after == 0;
    prefix.messages = OrderedJson(request.messages.begin(), request.messages.begin() + messages);
    const absl::StatusOr<RenderedChat> chat = chat_template_->Render(prefix);
    const std::string reason = absl::StrCat("the assistant turn messages[", turn,
                                            "] cannot be found in the text: the chat template ");
    constexpr absl::string_view kAdvice =
        ". Train on the last assistant turn only, or mark assistant text in the template with "
        "{% generation %}.";
    if (!chat.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(reason, "refuses the conversation up to it (",
                                                     chat.status().message(), ")", kAdvice));
    }
    if (!absl::StartsWith(whole, chat->text)) {
      const auto differ =
          std::mismatch(chat->text.begin(), chat->text.end(), whole.begin(), whole.end());
      const size_t at = static_cast<size_t>(differ.first - chat->text.begin());
      return absl::InvalidArgumentError(
          absl::StrCat(reason, "writes the conversation up to ", after == 0 ? "before" : "after",
                       " it differently from the whole one: at byte ", at, " ",
                       Shown(absl::string_view(chat->text).substr(at)), " instead of ",
                       Shown(absl::string_view(whole).substr(at)), kAdvice));
    }
    edges[after] = static_cast<int64_t>(chat->text.size());
  }
  return ByteSpan{edges[0], std::max(edges[0], edges[1])};
}

void ExampleTokenizer::MarkRange(const ByteSpan& range, absl::string_view text,
                                 const Encoding& encoding, std::vector<uint8_t>* trained) const {
  const auto& offsets = encoding.offsets;
  const auto begins_before = [](const ByteSpan& span, int64_t at) { return span.begin < at; };
  const auto first = std::lower_bound(offsets.begin(), offsets.end(), range.begin, begins_before);
  const auto last = std::lower_bound(first, offsets.end(), range.end, begins_before);
  size_t begin = static_cast<size_t>(first - offsets.begin());
  size_t end = static_cast<size_t>(last - offsets.begin());
  // What follows the end of the turn ("\n" after <|im_end|>) is never generated.
  size_t kept = end;
  while (
      kept > begin && !tokenizer_->is_special(encoding.ids[kept - 1]) &&
      IsBlank(text.substr(static_cast<size_t>(offsets[kept - 1].begin),
                          static_cast<size_t>(offsets[kept - 1].end - offsets[kept - 1].begin)))) {
    --kept;
  }
  const bool ends_with_special = kept > begin && tokenizer_->is_special(encoding.ids[kept - 1]);
  if (ends_with_special) {
    end = kept;
  } else if (end < encoding.ids.size() && end > begin &&
             tokenizer_->is_special(encoding.ids[end]) && encoding.ids[end] != bos_token_) {
    ++end;  // a template may put the turn's end outside of its generation mark
  }
  for (size_t i = begin; i < end; ++i) (*trained)[i] = 1;
}

void ExampleTokenizer::FixBos(TokenizedExample* example) const {
  auto& ids = example->ids;
  size_t repeated = 0;
  while (bos_token_ >= 0 && repeated + 1 < ids.size() && ids[repeated] == bos_token_ &&
         ids[repeated + 1] == bos_token_) {
    ++repeated;
  }
  ids.erase(ids.begin(), ids.begin() + static_cast<int64_t>(repeated));
  example->trained.erase(example->trained.begin(),
                         example->trained.begin() + static_cast<int64_t>(repeated));
  const bool there = ids.size() >= bos_.size() && std::equal(bos_.begin(), bos_.end(), ids.begin());
  if (there) return;
  ids.insert(ids.begin(), bos_.begin(), bos_.end());
  example->trained.insert(example->trained.begin(), bos_.size(), 0);
}

HeldOutSplit SplitHeldOut(int64_t num_examples, double fraction, uint64_t seed) {
  HeldOutSplit split;
  // Of the example that is nearest to being held out, and to being trained.
  std::pair<uint64_t, int64_t> lowest = {UINT64_MAX, -1};
  std::pair<uint64_t, int64_t> highest = {0, -1};
  for (int64_t i = 0; i < num_examples; ++i) {
    const uint64_t hash = HashOf(seed, static_cast<uint64_t>(i), kHoldOutStream);
    lowest = std::min(lowest, {hash, i});
    highest = std::max(highest, {hash, i});
    const double uniform = static_cast<double>(hash >> 11) * 0x1.0p-53;
    (uniform < fraction ? split.held_out : split.train).push_back(i);
  }
  if (fraction > 0 && num_examples >= 2) {
    if (split.held_out.empty()) {
      split.held_out.push_back(lowest.second);
      split.train.erase(std::find(split.train.begin(), split.train.end(), lowest.second));
    } else if (split.train.empty()) {
      split.train.push_back(highest.second);
      split.held_out.erase(std::find(split.held_out.begin(), split.held_out.end(), highest.second));
    }
  }
  return split;
}

}  // namespace attune
