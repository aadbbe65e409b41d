#include "worker/data/jinja/lexer.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/jinja/value.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

constexpr size_t kNpos = absl::string_view::npos;

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameByte(char c) {
  return IsDigit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
bool IsNameStart(char c) { return IsNameByte(c) && !IsDigit(c); }

int DigitValue(char c) {
  if (IsDigit(c)) return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return 99;
}

std::string NormalizeNewlines(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"\r\n", "\n"}, {"\r", "\n"}});
}

class Lexer {
 public:
  explicit Lexer(absl::string_view source) : source_(NormalizeNewlines(source)) {
    if (absl::EndsWith(source_, "\n")) source_.pop_back();
  }

  absl::StatusOr<std::vector<Token>> Run() {
    while (pos_ < source_.size()) JINJA_RETURN_IF_ERROR(LexRoot());
    Emit(TokenKind::kEnd);
    return std::move(tokens_);
  }

 private:
  absl::string_view Rest(size_t from) const { return absl::string_view(source_).substr(from); }
  bool At(absl::string_view text) const { return absl::StartsWith(Rest(pos_), text); }
  absl::Status Error(absl::string_view what) const {
    return AtLine(line_, absl::InvalidArgumentError(what));
  }

  Token& Emit(TokenKind kind, std::string text = "") {
    tokens_.push_back(Token{.kind = kind, .line = line_, .text = std::move(text)});
    return tokens_.back();
  }

  // Moves to `end`, counting lines.
  void Advance(size_t end) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<int64_t>(pos_),
                                         source_.begin() + static_cast<int64_t>(end), '\n'));
    if (end > pos_) line_starting_ = source_[end - 1] == '\n';
    pos_ = end;
  }

  size_t SkipSpace(size_t at) const {
    while (at < source_.size()) {
      size_t next = at;
      if (!IsPythonSpace(NextCodePoint(source_, &next))) break;
      at = next;
    }
    return at;
  }

  // Text that ends before a tag at `tag`, whose third character may be - or +.
  void EmitData(size_t tag, bool variable) {
    absl::string_view text = Rest(pos_).substr(0, tag - pos_);
    const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    size_t end = text.size();
    if (sign == '-') {
      while (end > 0) {
        size_t i = end;
        if (!IsPythonSpace(PreviousCodePoint(text, &i))) break;
        end = i;
      }
    } else if (sign != '+' && !variable) {
      const size_t newline = text.rfind('\n');
      const size_t line_begin = newline == kNpos ? 0 : newline + 1;
      // Without a newline in it, the text begins its line only if the tag before ended the last.
      const bool begins_line = newline != kNpos || line_starting_;
      if (begins_line && SkipSpace(pos_ + line_begin) >= tag) end = line_begin;
    }
    if (end > 0) Emit(TokenKind::kData, std::string(text.substr(0, end)));
    Advance(tag);
  }

  absl::Status LexRoot() {
    size_t tag = pos_;
    while (true) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= source_.size()) {
        Emit(TokenKind::kData, std::string(Rest(pos_)));
        Advance(source_.size());
        return absl::OkStatus();
      }
      const char c = source_[tag + 1];
      if (c == '{' || c == '%' || c == '#') break;
      ++tag;
    }
    const char kind = source_[tag + 1];
    EmitData(tag, kind == '{');
    if (kind == '#') return LexComment();
    if (kind == '%') {
      size_t body = 0;
      if (RawBegin(&body)) return LexRaw(body);
    }
    const bool signed_tag =
        pos_ + 2 < source_.size() && (source_[pos_ + 2] == '-' || source_[pos_ + 2] == '+');
    Emit(kind == '{' ? TokenKind::kVariableBegin : TokenKind::kBlockBegin);
    Advance(pos_ + (signed_tag ? 3 : 2));
    return LexTag(kind == '%');
  }

  // Whether {% raw %} begins here, and where the text in it begins.
  bool RawBegin(size_t* body) const {
    size_t at = pos_ + 2;
    if (at < source_.size() && (source_[at] == '-' || source_[at] == '+')) ++at;
    at = SkipSpace(at);
    if (!absl::StartsWith(Rest(at), "raw")) return false;
    at = SkipSpace(at + 3);
    if (absl::StartsWith(Rest(at), "-%}")) {
      *body = SkipSpace(at + 3);
      return true;
    }
    *body = at + 2;
    return absl::StartsWith(Rest(at), "%}");
  }

  absl::Status LexRaw(size_t body) {
    Advance(body);
    for (size_t tag = source_.find("{%", pos_); tag != std::string::npos;
         tag = source_.find("{%", tag + 1)) {
      size_t at = tag + 2;
      if (at < source_.size() && (source_[at] == '-' || source_[at] == '+')) ++at;
      at = SkipSpace(at);
      if (!absl::StartsWith(Rest(at), "endraw")) continue;
      const size_t end = TagEnd(SkipSpace(at + 6), "%}");
      if (end == kNpos) continue;
      EmitData(tag, /*variable=*/false);
      Advance(end);
      return absl::OkStatus();
    }
    return Error("{% raw %} has no {% endraw %}");
  }

  absl::Status LexComment() {
    size_t body = pos_ + 2;
    if (body < source_.size() && (source_[body] == '-' || source_[body] == '+')) ++body;
    for (size_t at = body; at + 1 < source_.size(); ++at) {
      const size_t end = TagEnd(at, "#}");
      if (end == kNpos) continue;
      Advance(end);
      return absl::OkStatus();
    }
    return Error("a comment {# has no #}");
  }

  // If a block or comment ends at `at` ("%}", "-%}", "+%}"): where the text goes on, else kNpos.
  size_t TagEnd(size_t at, absl::string_view close) const {
    const absl::string_view rest = Rest(at);
    if (absl::StartsWith(rest, close)) {
      return at + 2 + (at + 2 < source_.size() && source_[at + 2] == '\n' ? 1 : 0);
    }
    if (rest.empty() || !absl::StartsWith(rest.substr(1), close)) return kNpos;
    if (rest[0] == '-') return SkipSpace(at + 3);
    if (rest[0] == '+') return at + 3;
    return kNpos;
  }

  size_t VariableEnd(size_t at) const {
    if (absl::StartsWith(Rest(at), "}}")) return at + 2;
    if (absl::StartsWith(Rest(at), "-}}")) return SkipSpace(at + 3);
    return kNpos;
  }

  absl::Status LexTag(bool block) {
    while (true) {
      Advance(SkipSpace(pos_));
      if (pos_ >= source_.size()) {
        return Error(block ? "a tag {% has no %}" : "a tag {{ has no }}");
      }
      if (brackets_.empty()) {
        const size_t end = block ? TagEnd(pos_, "%}") : VariableEnd(pos_);
        if (end != kNpos) {
          Emit(block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd);
          Advance(end);
          return absl::OkStatus();
        }
      }
      JINJA_RETURN_IF_ERROR(LexToken());
    }
  }

  absl::Status LexToken() {
    const char c = source_[pos_];
    if (IsDigit(c)) return LexNumber();
    if (IsNameStart(c)) {
      size_t end = pos_;
      while (end < source_.size() && IsNameByte(source_[end])) ++end;
      Emit(TokenKind::kName, source_.substr(pos_, end - pos_));
      Advance(end);
      return absl::OkStatus();
    }
    if (c == '"' || c == '\'') return LexString();
    return LexOperator();
  }

  // Digits with single underscores between them.
  size_t DigitsEnd(size_t at) const {
    while (at < source_.size() &&
           (IsDigit(source_[at]) || (source_[at] == '_' && at + 1 < source_.size() &&
                                     IsDigit(source_[at + 1]) && IsDigit(source_[at - 1])))) {
      ++at;
    }
    return at;
  }

  absl::Status LexNumber() {
    const absl::string_view rest = Rest(pos_);
    int base = 10;
    size_t end = pos_;
    bool is_float = false;
    if (rest.size() > 2 && rest[0] == '0' && absl::string_view("xXoObB").find(rest[1]) != kNpos) {
      base = rest[1] == 'x' || rest[1] == 'X' ? 16 : rest[1] == 'o' || rest[1] == 'O' ? 8 : 2;
      end = pos_ + 2;
      while (end < source_.size() && (source_[end] == '_' || DigitValue(source_[end]) < base)) ++end;
    } else {
      end = DigitsEnd(pos_);
      // "1.0" is a number, "1.foo" an attribute; after a dot (a.0.1) there are only integers.
      const bool after_dot = pos_ > 0 && source_[pos_ - 1] == '.';
      if (!after_dot && end + 1 < source_.size() && source_[end] == '.' &&
          IsDigit(source_[end + 1])) {
        is_float = true;
        end = DigitsEnd(end + 1);
      }
      if (!after_dot && end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
        size_t digits = end + 1;
        if (digits < source_.size() && (source_[digits] == '+' || source_[digits] == '-')) ++digits;
        if (digits < source_.size() && IsDigit(source_[digits])) {
          is_float = true;
          end = DigitsEnd(digits);
        }
      }
    }
    std::string text = source_.substr(pos_, end - pos_);
    text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
    Token& token = Emit(is_float ? TokenKind::kFloat : TokenKind::kInteger, text);
    bool ok;
    if (is_float) {
      ok = absl::SimpleAtod(text, &token.number);
    } else {
      const size_t skip = base == 10 ? 0 : 2;
      const auto result = std::from_chars(text.data() + skip, text.data() + text.size(),
                                          token.integer, base);
      ok = result.ec == std::errc() && result.ptr == text.data() + text.size();
    }
    if (!ok) return Error(absl::StrCat("the number ", text, " cannot be read"));
    Advance(end);
    return absl::OkStatus();
  }

  absl::Status LexString() {
    const char quote = source_[pos_];
    size_t end = pos_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) return Error("a string has no end");
    std::string text;
    JINJA_RETURN_IF_ERROR(Unescape(Rest(pos_ + 1).substr(0, end - pos_ - 1), &text));
    Emit(TokenKind::kString, std::move(text));
    Advance(end + 1);
    return absl::OkStatus();
  }

  // Python's escapes; an unknown one stays as it is.
  absl::Status Unescape(absl::string_view raw, std::string* text) const {
    constexpr absl::string_view kNames = "ntrabfv\\'\"";
    constexpr absl::string_view kValues = "\n\t\r\a\b\f\v\\'\"";
    for (size_t i = 0; i < raw.size(); ++i) {
      if (raw[i] != '\\' || i + 1 >= raw.size()) {
        text->push_back(raw[i]);
        continue;
      }
      const char c = raw[++i];
      if (const size_t known = kNames.find(c); known != kNpos) {
        text->push_back(kValues[known]);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const size_t count = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        JINJA_RETURN_IF_ERROR(AppendCodePoint(raw.substr(i + 1, count), count, 16, text));
        i += count;
      } else if (c >= '0' && c <= '7') {
        size_t count = 1;
        while (count < 3 && i + count < raw.size() && raw[i + count] >= '0' &&
               raw[i + count] <= '7') {
          ++count;
        }
        JINJA_RETURN_IF_ERROR(AppendCodePoint(raw.substr(i, count), count, 8, text));
        i += count - 1;
      } else if (c == 'N') {
        return AtLine(line_, absl::UnimplementedError("\\N{...} in a string"));
      } else if (c != '\n') {  // a backslash at the end of a line joins the lines
        text->push_back('\\');
        text->push_back(c);
      }
    }
    return absl::OkStatus();
  }

  absl::Status AppendCodePoint(absl::string_view digits, size_t count, int base,
                               std::string* text) const {
    uint32_t c = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), c, base);
    if (digits.size() != count || result.ec != std::errc() ||
        result.ptr != digits.data() + digits.size() || c > 0x10FFFF ||
        (c >= 0xD800 && c < 0xE000)) {
      return Error("a string has an escape that is no character");
    }
    AppendUtf8(c, text);
    return absl::OkStatus();
  }

  absl::Status LexOperator() {
    for (absl::string_view op : {"//", "**", "==", "!=", ">=", "<="}) {
      if (At(op)) {
        Emit(TokenKind::kOperator, std::string(op));
        Advance(pos_ + 2);
        return absl::OkStatus();
      }
    }
    const char c = source_[pos_];
    if (absl::string_view("+-/*%~[](){}><=.:|,;").find(c) == kNpos) {
      size_t end = pos_;
      NextCodePoint(source_, &end);
      return Error(absl::StrCat("unexpected character ", Rest(pos_).substr(0, end - pos_)));
    }
    if (c == '(' || c == '[' || c == '{') brackets_.push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    if (c == ')' || c == ']' || c == '}') {
      if (brackets_.empty() || brackets_.back() != c) {
        return Error(absl::StrCat("unexpected ", absl::string_view(&c, 1)));
      }
      brackets_.pop_back();
    }
    Emit(TokenKind::kOperator, std::string(1, c));
    Advance(pos_ + 1);
    return absl::OkStatus();
  }

  std::string source_;
  size_t pos_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::string brackets_;  // closing brackets that are awaited
  std::vector<Token> tokens_;
};

}  // namespace

absl::StatusOr<std::vector<Token>> Lex(absl::string_view source) { return Lexer(source).Run(); }

absl::Status AtLine(int line, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("line ", line, ": ", status.message()));
}

}  // namespace attune::jinja
