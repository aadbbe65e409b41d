#define PCRE2_CODE_UNIT_WIDTH 8
#include "worker/data/stages/regex.h"

#include <pcre2.h>

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "worker/data/unicode.h"

namespace attune {
namespace {

constexpr size_t kPatternLimitBytes = 1 << 16;
constexpr uint32_t kMatchLimit = 10'000'000;
constexpr uint32_t kHeapLimitKib = 64 * 1024;

constexpr absl::string_view kWordClass = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";

// What one thread needs to match; PCRE2 code itself is shared.
struct MatchScratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 4 << 20, nullptr);

  MatchScratch() {
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKib);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~MatchScratch() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
};

MatchScratch& Scratch() {
  thread_local MatchScratch scratch;
  return scratch;
}

std::string PcreMessage(int error) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(error, text, sizeof(text));
  return reinterpret_cast<const char*>(text);
}

// Rewrites a pattern left to right; remembers where the last atom began in the output, because an
// interval followed by + must be wrapped.
class Translator {
 public:
  explicit Translator(absl::string_view pattern) : in_(pattern) {}

  absl::StatusOr<std::string> Run() {
    while (i_ < in_.size() && status_.ok()) Step();
    if (!status_.ok()) return status_;
    return std::move(out_);
  }

 private:
  void Step() {
    const char c = in_[i_];
    if (c == '\\') return Escape(/*in_class=*/false);
    if (c == '[') return Class();
    if (c == '(') return OpenGroup();
    if (c == ')') {
      atom_ = groups_.empty() ? out_.size() : groups_.back();
      if (!groups_.empty()) groups_.pop_back();
      return Copy(1);
    }
    if (c == '{') return Interval();
    if (c != '*' && c != '+' && c != '?' && !IsUtf8Continuation(c)) atom_ = out_.size();
    Copy(1);
  }

  void OpenGroup() {
    if (absl::StartsWith(in_.substr(i_), "(*")) return Refuse("a (*VERB)");
    if (absl::StartsWith(in_.substr(i_), "(?#")) {
      const size_t end = in_.find(')', i_);
      return Copy(end == absl::string_view::npos ? in_.size() - i_ : end + 1 - i_);
    }
    groups_.push_back(out_.size());
    Copy(1);
    if (i_ < in_.size() && in_[i_] == '?') Copy(1);  // no quantifier here
  }

  void Interval() {
    const size_t end = in_.find('}', i_);
    const bool interval = end != absl::string_view::npos && end > i_ + 1 &&
                          in_.substr(i_ + 1, end - i_ - 1).find_first_not_of("0123456789,") ==
                              absl::string_view::npos;
    if (!interval) {
      atom_ = out_.size();
      return Copy(1);
    }
    Copy(1);
    if (in_[i_] == ',') out_.push_back('0');  // {,n}, which PCRE2 would take literally
    Copy(end + 1 - i_);
    if (i_ < in_.size() && in_[i_] == '+') {
      out_.insert(atom_, "(?:");
      out_.append(")");
    }
  }

  void Class() {
    atom_ = out_.size();
    Copy(1);
    if (i_ < in_.size() && in_[i_] == '^') Copy(1);
    if (i_ < in_.size() && in_[i_] == ']') Copy(1);  // first in a class: itself
    while (i_ < in_.size() && in_[i_] != ']' && status_.ok()) {
      if (in_[i_] == '\\') {
        Escape(/*in_class=*/true);
      } else if (absl::StartsWith(in_.substr(i_), "[:")) {
        const size_t end = in_.find(":]", i_);
        if (end == absl::string_view::npos) return Refuse("a class inside a class");
        Copy(end + 2 - i_);
      } else if (in_[i_] == '[') {
        return Refuse("a class inside a class");
      } else if (absl::StartsWith(in_.substr(i_), "&&")) {
        return Refuse("an intersection (&&) of classes");
      } else {
        Copy(1);
      }
    }
    if (i_ < in_.size()) Copy(1);
  }

  void Escape(bool in_class) {
    if (!in_class) atom_ = out_.size();
    if (i_ + 1 >= in_.size()) return Copy(1);
    const char c = in_[i_ + 1];
    switch (c) {
      case 's':
        return Replace("\\p{White_Space}");
      case 'S':
        return Replace("\\P{White_Space}");
      case 'w':
        return Replace(in_class ? std::string(kWordClass) : absl::StrCat("[", kWordClass, "]"));
      case 'W':
        if (in_class) return Refuse("\\W inside a class");
        return Replace(absl::StrCat("[^", kWordClass, "]"));
      case 'h':
      case 'H':
      case 'b':
      case 'B':
      case 'g':
      case 'k':
      case 'K':
      case 'X':
      case 'R':
      case 'y':
      case 'Y':
      case 'N':
      case 'O':
        if (in_class && c == 'b') return Copy(2);
        return Refuse(absl::StrCat("\\", absl::string_view(&c, 1)));
      case 'p':
      case 'P':
      case 'x': {
        const size_t end = i_ + 2 < in_.size() && in_[i_ + 2] == '{' ? in_.find('}', i_) : i_ + 1;
        return Copy((end == absl::string_view::npos ? i_ + 1 : end) + 1 - i_);
      }
      case 'u':  // \uHHHH
        if (i_ + 6 > in_.size()) return Refuse("\\u without four digits");
        out_.append(absl::StrCat("\\x{", in_.substr(i_ + 2, 4), "}"));
        i_ += 6;
        return;
      default:
        return Copy(2);
    }
  }

  void Copy(size_t size) {
    out_.append(in_.substr(i_, size).data(), in_.substr(i_, size).size());
    i_ += size;
  }
  void Replace(absl::string_view text) {
    out_.append(text.data(), text.size());
    i_ += 2;
  }
  void Refuse(absl::string_view what) {
    status_ = absl::UnimplementedError(absl::StrCat(
        "the regular expression has ", what, " at character ", i_, ", which attune does not read"));
  }

  absl::string_view in_;
  size_t i_ = 0;
  std::string out_;
  size_t atom_ = 0;
  std::vector<size_t> groups_;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<std::string> TranslateOniguruma(absl::string_view pattern) {
  return Translator(pattern).Run();
}

struct Regex::Code {
  pcre2_code* code = nullptr;
  bool jit = false;
  ~Code() { pcre2_code_free(code); }
};

Regex::Regex(std::unique_ptr<const Code> code) : code_(std::move(code)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

absl::StatusOr<Regex> Regex::Compile(absl::string_view pattern) {
  if (pattern.size() > kPatternLimitBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the regular expression has ", pattern.size(),
                                                   " bytes; at most ", kPatternLimitBytes,
                                                   " are read"));
  }
  if (absl::Status s = CheckUtf8(pattern, "the regular expression"); !s.ok()) return s;
  absl::StatusOr<std::string> translated = TranslateOniguruma(pattern);
  if (!translated.ok()) return translated.status();
  auto code = std::make_unique<Code>();
  int error = 0;
  PCRE2_SIZE at = 0;
  code->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated->data()), translated->size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                             &error, &at, nullptr);
  if (code->code == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("the regular expression \"", absl::Utf8SafeCEscape(pattern),
                     "\" does not compile: ", PcreMessage(error), " near character ", at));
  }
  // Without JIT (a hardened kernel refuses executable memory) the interpreter does the same.
  code->jit = pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE) == 0;
  return Regex(std::move(code));
}

absl::StatusOr<Regex> Regex::Literal(absl::string_view text) {
  std::string pattern;
  for (char c : text) {
    if (absl::string_view("\\^$.|?*+()[]{}#-&~ \t").find(c) != absl::string_view::npos) {
      pattern.push_back('\\');
    }
    pattern.push_back(c);
  }
  return Compile(pattern);
}

absl::Status Regex::FindAll(absl::string_view text, std::vector<ByteSpan>* matches) const {
  matches->clear();
  MatchScratch& scratch = Scratch();
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const PCRE2_SIZE* ovector = pcre2_get_ovector_pointer(scratch.data);
  size_t position = 0;
  int64_t last_end = -1;
  while (position <= text.size()) {
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (code_->jit) {
      rc = pcre2_jit_match(code_->code, subject, text.size(), position, PCRE2_NO_UTF_CHECK,
                           scratch.data, scratch.context);
    }
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(code_->code, subject, text.size(), position,
                       PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch.data, scratch.context);
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the tokenizer's regular expression gives up at byte ", position,
                       " of a text: ", PcreMessage(rc)));
    }
    const int64_t begin = static_cast<int64_t>(ovector[0]);
    const int64_t end = static_cast<int64_t>(ovector[1]);
    if (begin == end && end == last_end) {
      if (position >= text.size()) break;
      NextCodePoint(text, &position);
      continue;
    }
    matches->push_back({begin, end});
    position = ovector[1];
    last_end = end;
  }
  return absl::OkStatus();
}

}  // namespace attune
