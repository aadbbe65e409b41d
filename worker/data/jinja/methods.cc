// Methods of strings, dicts and lists, as Python has them.
#include <unicode/uchar.h>

#include <algorithm>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/data/jinja/builtins.h"
#include "worker/data/jinja/interpreter.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

using Method = absl::StatusOr<Value> (*)(Interpreter&, const Value& self, const Args& args);

// --- strings ---

template <bool kLeft, bool kRight>
absl::StatusOr<Value> Strip(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("strip", 1, {}));
  const Value* chars = args.Get(0, "chars");
  if (chars != nullptr && chars->is_none()) chars = nullptr;
  JINJA_ASSIGN(const std::string set, StringArg(chars, "", "the argument of strip"));
  return Value(StripChars(self.string(), chars == nullptr ? nullptr : &set, kLeft, kRight));
}

// Words between runs of white space; at most `limit` splits (negative: all), from either end. What
// is left beyond the limit keeps the white space on its far side.
std::vector<Value> SplitSpace(absl::string_view text, int64_t limit, bool from_right) {
  std::vector<ByteSpan> words;
  bool in_word = false;
  for (size_t i = 0; i < text.size();) {
    const int64_t begin = static_cast<int64_t>(i);
    const bool space = IsPythonSpace(NextCodePoint(text, &i));
    if (!space && !in_word) words.push_back({begin, begin});
    if (!space) words.back().end = static_cast<int64_t>(i);
    in_word = !space;
  }
  const int64_t n = static_cast<int64_t>(words.size());
  if (limit >= 0 && n > limit) {
    if (from_right) {
      words.erase(words.begin(), words.begin() + (n - limit - 1));
      words.front().begin = 0;
    } else {
      words.resize(static_cast<size_t>(limit + 1));
      words.back().end = static_cast<int64_t>(text.size());
    }
  }
  std::vector<Value> parts;
  for (const ByteSpan& word : words) {
    parts.emplace_back(
        text.substr(static_cast<size_t>(word.begin), static_cast<size_t>(word.end - word.begin)));
  }
  return parts;
}

std::vector<Value> SplitAt(absl::string_view text, absl::string_view separator, int64_t limit,
                           bool from_right) {
  std::vector<Value> parts;
  while (limit < 0 || static_cast<int64_t>(parts.size()) < limit) {
    const size_t at = from_right ? text.rfind(separator) : text.find(separator);
    if (at == absl::string_view::npos) break;
    parts.emplace_back(from_right ? text.substr(at + separator.size()) : text.substr(0, at));
    text = from_right ? text.substr(0, at) : text.substr(at + separator.size());
  }
  parts.emplace_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

template <bool kFromRight>
absl::StatusOr<Value> Split(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("split", 2, {"sep", "maxsplit"}));
  JINJA_ASSIGN(const int64_t limit, IntArg(args.Get(1, "maxsplit"), -1, "maxsplit of split"));
  const Value* separator = args.Get(0, "sep");
  std::vector<Value> parts;
  if (separator == nullptr || separator->is_none()) {
    parts = SplitSpace(self.string(), limit, kFromRight);
  } else {
    JINJA_ASSIGN(const std::string text, StringArg(separator, "", "the separator of split"));
    if (text.empty()) return absl::InvalidArgumentError("split: empty separator");
    parts = SplitAt(self.string(), text, limit, kFromRight);
  }
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(static_cast<int64_t>(parts.size())));
  return Value::List(std::move(parts));
}

absl::StatusOr<Value> SplitLines(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("splitlines", 1, {"keepends"}));
  const bool keep = TruthArg(args.Get(0, "keepends"), false);
  const absl::string_view text = self.string();
  std::vector<Value> lines;
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t end = i;
    const char32_t c = NextCodePoint(text, &i);
    const bool line_end = (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 ||
                          c == 0x2028 || c == 0x2029;
    if (!line_end) continue;
    if (c == '\r' && i < text.size() && text[i] == '\n') ++i;
    lines.emplace_back(text.substr(begin, (keep ? i : end) - begin));
    begin = i;
  }
  if (begin < text.size()) lines.emplace_back(text.substr(begin));
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(static_cast<int64_t>(lines.size())));
  return Value::List(std::move(lines));
}

template <bool kStart>
absl::StatusOr<Value> StartsOrEndsWith(Interpreter&, const Value& self, const Args& args) {
  const absl::string_view what = kStart ? "startswith" : "endswith";
  JINJA_RETURN_IF_ERROR(args.Check(what, 1, {}));
  if (args.positional.size() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(what, " needs one argument"));
  }
  const Value& affix = args.positional[0];
  std::vector<Value> candidates = {affix};
  if (affix.is_tuple()) candidates = affix.sequence().items;
  for (const Value& candidate : candidates) {
    JINJA_ASSIGN(const std::string text, StringArg(&candidate, "", "the argument of startswith"));
    if (kStart ? absl::StartsWith(self.string(), text) : absl::EndsWith(self.string(), text)) {
      return Value(true);
    }
  }
  return Value(false);
}

absl::StatusOr<Value> ReplaceMethod(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("replace", 3, {"count"}));
  if (args.positional.size() < 2) {
    return absl::InvalidArgumentError("replace needs two arguments");
  }
  JINJA_ASSIGN(const std::string from, StringArg(args.Get(0, ""), "", "the argument of replace"));
  JINJA_ASSIGN(const std::string to, StringArg(args.Get(1, ""), "", "the argument of replace"));
  JINJA_ASSIGN(const int64_t count, IntArg(args.Get(2, "count"), -1, "count of replace"));
  const int64_t growth =
      static_cast<int64_t>(self.string().size() + 1) * static_cast<int64_t>(to.size() / 16 + 1);
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(growth / (from.empty() ? 1 : 16) + 1));
  return Value(ReplaceAll(self.string(), from, to, count));
}

template <std::string (*kMap)(absl::string_view)>
absl::StatusOr<Value> Mapped(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("the method", 0, {}));
  return Value(kMap(self.string()));
}

// Index in code points of the first or last occurrence, or -1.
template <bool kLast, bool kMustExist>
absl::StatusOr<Value> FindIn(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("find", 1, {}));
  JINJA_ASSIGN(const std::string text, StringArg(args.Get(0, ""), "", "the argument of find"));
  const size_t at = kLast ? self.string().rfind(text) : self.string().find(text);
  if (at == std::string::npos) {
    if (kMustExist) return absl::InvalidArgumentError("index: substring not found");
    return Value(int64_t{-1});
  }
  return Value(CountCodePoints(absl::string_view(self.string()).substr(0, at)));
}

absl::StatusOr<Value> CountIn(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("count", 1, {}));
  JINJA_ASSIGN(const std::string text, StringArg(args.Get(0, ""), "", "the argument of count"));
  if (text.empty()) return Value(CountCodePoints(self.string()) + 1);
  return Value(
      static_cast<int64_t>(SplitAt(self.string(), text, -1, /*from_right=*/false).size() - 1));
}

absl::StatusOr<Value> JoinWith(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("join", 1, {}));
  if (args.positional.empty()) return absl::InvalidArgumentError("join needs an argument");
  JINJA_ASSIGN(const std::vector<Value> items, Elements(args.positional[0]));
  std::string text;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat("join: item ", i, " is a ", items[i].TypeName(), ", not a string"));
    }
    JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(items[i].weight() + self.weight()));
    if (i > 0) text += self.string();
    text += items[i].string();
  }
  return Value(std::move(text));
}

// All characters have the property, and there is one.
template <bool (*kProperty)(char32_t)>
absl::StatusOr<Value> AllAre(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("the method", 0, {}));
  const absl::string_view text = self.string();
  for (size_t i = 0; i < text.size();) {
    if (!kProperty(NextCodePoint(text, &i))) return Value(false);
  }
  return Value(!text.empty());
}

bool IsAlpha(char32_t c) {
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_L_MASK) != 0;
}
bool IsDecimal(char32_t c) {
  return u_charType(static_cast<UChar32>(c)) == U_DECIMAL_DIGIT_NUMBER;
}
bool IsDigit(char32_t c) {
  return IsDecimal(c) ||
         u_getIntPropertyValue(static_cast<UChar32>(c), UCHAR_NUMERIC_TYPE) == U_NT_DIGIT;
}
bool IsNumericValue(char32_t c) {
  return u_getIntPropertyValue(static_cast<UChar32>(c), UCHAR_NUMERIC_TYPE) != U_NT_NONE;
}
bool IsAlnum(char32_t c) {
  return IsAlpha(c) || IsNumericValue(c);
}

template <bool kUpper>
absl::StatusOr<Value> IsCase(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("the method", 0, {}));
  const absl::string_view text = self.string();
  bool cased = false;
  for (size_t i = 0; i < text.size();) {
    const UChar32 c = static_cast<UChar32>(NextCodePoint(text, &i));
    const bool upper = u_hasBinaryProperty(c, UCHAR_UPPERCASE);
    const bool lower = u_hasBinaryProperty(c, UCHAR_LOWERCASE);
    if (kUpper ? lower || u_charType(c) == U_TITLECASE_LETTER
               : upper || u_charType(c) == U_TITLECASE_LETTER) {
      return Value(false);
    }
    cased = cased || upper || lower;
  }
  return Value(cased);
}

template <bool kPrefix>
absl::StatusOr<Value> RemoveAffix(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("removeprefix", 1, {}));
  JINJA_ASSIGN(const std::string affix, StringArg(args.Get(0, ""), "", "the affix"));
  absl::string_view text = self.string();
  if (kPrefix && absl::StartsWith(text, affix)) text.remove_prefix(affix.size());
  if (!kPrefix && absl::EndsWith(text, affix)) text.remove_suffix(affix.size());
  return Value(text);
}

template <bool kLast>
absl::StatusOr<Value> Partition(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("partition", 1, {}));
  JINJA_ASSIGN(const std::string separator, StringArg(args.Get(0, ""), "", "the separator"));
  if (separator.empty()) return absl::InvalidArgumentError("partition: empty separator");
  const absl::string_view text = self.string();
  const size_t at = kLast ? text.rfind(separator) : text.find(separator);
  const Value empty{std::string()};
  if (at == absl::string_view::npos) {
    return kLast ? Value::Tuple({empty, empty, self}) : Value::Tuple({self, empty, empty});
  }
  return Value::Tuple(
      {Value(text.substr(0, at)), Value(separator), Value(text.substr(at + separator.size()))});
}

// --- dicts ---

absl::StatusOr<Value> DictGet(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("get", 2, {}));
  if (args.positional.empty()) return absl::InvalidArgumentError("get needs a key");
  if (const Value* value = self.dict().Find(args.positional[0])) return *value;
  return args.positional.size() > 1 ? args.positional[1] : Value();
}

absl::StatusOr<Value> DictItems(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("items", 0, {}));
  JINJA_RETURN_IF_ERROR(
      interpreter.budget().Charge(2 * static_cast<int64_t>(self.dict().items.size())));
  std::vector<Value> items;
  for (const auto& [key, value] : self.dict().items) {
    JINJA_ASSIGN(Value pair, Value::Tuple({key, value}));
    items.push_back(std::move(pair));
  }
  return Value::List(std::move(items));
}

absl::StatusOr<Value> DictKeys(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("keys", 0, {}));
  JINJA_RETURN_IF_ERROR(
      interpreter.budget().Charge(static_cast<int64_t>(self.dict().items.size())));
  JINJA_ASSIGN(std::vector<Value> keys, Elements(self));
  return Value::List(std::move(keys));
}

absl::StatusOr<Value> DictValues(Interpreter& interpreter, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("values", 0, {}));
  JINJA_RETURN_IF_ERROR(
      interpreter.budget().Charge(static_cast<int64_t>(self.dict().items.size())));
  std::vector<Value> values;
  for (const auto& item : self.dict().items) values.push_back(item.second);
  return Value::List(std::move(values));
}

absl::StatusOr<Value> Copy(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("copy", 0, {}));
  return self;
}

// --- lists ---

absl::StatusOr<Value> ListIndex(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("index", 1, {}));
  if (args.positional.empty()) return absl::InvalidArgumentError("index needs an argument");
  const auto& items = self.sequence().items;
  for (size_t i = 0; i < items.size(); ++i) {
    if (Equal(items[i], args.positional[0])) return Value(static_cast<int64_t>(i));
  }
  return absl::InvalidArgumentError("index: the value is not in the list");
}

absl::StatusOr<Value> ListCount(Interpreter&, const Value& self, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("count", 1, {}));
  if (args.positional.empty()) return absl::InvalidArgumentError("count needs an argument");
  const auto& items = self.sequence().items;
  return Value(static_cast<int64_t>(std::count_if(
      items.begin(), items.end(), [&](const Value& v) { return Equal(v, args.positional[0]); })));
}

absl::StatusOr<Value> Refuse(Interpreter&, const Value& self, const Args&) {
  return absl::InvalidArgumentError(absl::StrCat("a template cannot change a ", self.TypeName(),
                                                 "; make a new one with + or a namespace"));
}

absl::StatusOr<Value> NotThere(Interpreter&, const Value&, const Args&) {
  return absl::UnimplementedError("attune has not this method of Python");
}

struct NamedMethod {
  absl::string_view name;
  Method method;
};

constexpr NamedMethod kStringMethods[] = {
    {"capitalize", Mapped<Capitalize>},
    {"casefold", NotThere},
    {"center", NotThere},
    {"count", CountIn},
    {"encode", NotThere},
    {"endswith", StartsOrEndsWith<false>},
    {"expandtabs", NotThere},
    {"find", FindIn<false, false>},
    {"format", NotThere},
    {"format_map", NotThere},
    {"index", FindIn<false, true>},
    {"isalnum", AllAre<IsAlnum>},
    {"isalpha", AllAre<IsAlpha>},
    {"isascii", NotThere},
    {"isdecimal", AllAre<IsDecimal>},
    {"isdigit", AllAre<IsDigit>},
    {"isidentifier", NotThere},
    {"islower", IsCase<false>},
    {"isnumeric", AllAre<IsNumericValue>},
    {"isprintable", NotThere},
    {"isspace", AllAre<IsPythonSpace>},
    {"istitle", NotThere},
    {"isupper", IsCase<true>},
    {"join", JoinWith},
    {"ljust", NotThere},
    {"lower", Mapped<ToLowerUtf8>},
    {"lstrip", Strip<true, false>},
    {"maketrans", NotThere},
    {"partition", Partition<false>},
    {"removeprefix", RemoveAffix<true>},
    {"removesuffix", RemoveAffix<false>},
    {"replace", ReplaceMethod},
    {"rfind", FindIn<true, false>},
    {"rindex", FindIn<true, true>},
    {"rjust", NotThere},
    {"rpartition", Partition<true>},
    {"rsplit", Split<true>},
    {"rstrip", Strip<false, true>},
    {"split", Split<false>},
    {"splitlines", SplitLines},
    {"startswith", StartsOrEndsWith<true>},
    {"strip", Strip<true, true>},
    {"swapcase", NotThere},
    {"title", Mapped<TitleWords>},
    {"translate", NotThere},
    {"upper", Mapped<ToUpperUtf8>},
    {"zfill", NotThere},
};

constexpr NamedMethod kDictMethods[] = {
    {"clear", Refuse},      {"copy", Copy},     {"fromkeys", NotThere}, {"get", DictGet},
    {"items", DictItems},   {"keys", DictKeys}, {"pop", Refuse},        {"popitem", Refuse},
    {"setdefault", Refuse}, {"update", Refuse}, {"values", DictValues},
};

constexpr NamedMethod kListMethods[] = {
    {"append", Refuse}, {"clear", Refuse},    {"copy", Copy},     {"count", ListCount},
    {"extend", Refuse}, {"index", ListIndex}, {"insert", Refuse}, {"pop", Refuse},
    {"remove", Refuse}, {"reverse", Refuse},  {"sort", Refuse},
};

constexpr NamedMethod kTupleMethods[] = {{"count", ListCount}, {"index", ListIndex}};

template <size_t N>
Method LookUp(const NamedMethod (&methods)[N], absl::string_view name) {
  for (const NamedMethod& method : methods) {
    if (method.name == name) return method.method;
  }
  return nullptr;
}

}  // namespace

std::shared_ptr<const Function> FindMethod(const Value& self, const std::string& name) {
  Method method = nullptr;
  if (self.is_string()) method = LookUp(kStringMethods, name);
  if (self.is_dict()) method = LookUp(kDictMethods, name);
  if (self.is_list()) method = LookUp(kListMethods, name);
  if (self.is_tuple()) method = LookUp(kTupleMethods, name);
  if (method == nullptr) return nullptr;
  return std::make_shared<const Function>(Function{
      name, [self, method](Interpreter& interpreter, const Args& args) {
        absl::Status charged = interpreter.budget().Charge(self.is_dict() ? 1 : self.weight());
        if (!charged.ok()) return absl::StatusOr<Value>(charged);
        return method(interpreter, self, args);
      }});
}

std::string StripChars(absl::string_view text, const std::string* chars, bool left, bool right) {
  std::u32string set;
  if (chars != nullptr) {
    for (size_t i = 0; i < chars->size();) set.push_back(NextCodePoint(*chars, &i));
  }
  const auto strips = [&](char32_t c) {
    return chars == nullptr ? IsPythonSpace(c) : set.find(c) != std::u32string::npos;
  };
  size_t begin = 0;
  size_t end = text.size();
  while (left && begin < end) {
    size_t i = begin;
    if (!strips(NextCodePoint(text, &i))) break;
    begin = i;
  }
  while (right && end > begin) {
    size_t i = end;
    if (!strips(PreviousCodePoint(text, &i))) break;
    end = i;
  }
  return std::string(text.substr(begin, end - begin));
}

namespace {

std::string TitleCase(absl::string_view character) {
  size_t i = 0;
  const UChar32 c = static_cast<UChar32>(NextCodePoint(character, &i));
  std::string upper = ToUpperUtf8(character);
  if (CountCodePoints(upper) > 1) {  // ß, ligatures: only the first of them is upper case
    size_t first = 0;
    NextCodePoint(upper, &first);
    return absl::StrCat(upper.substr(0, first), ToLowerUtf8(upper.substr(first)));
  }
  std::string out;
  AppendUtf8(static_cast<char32_t>(u_totitle(c)), &out);
  return out;
}

}  // namespace

std::string Capitalize(absl::string_view text) {
  if (text.empty()) return "";
  size_t first = 0;
  NextCodePoint(text, &first);
  return absl::StrCat(TitleCase(text.substr(0, first)), ToLowerUtf8(text.substr(first)));
}

std::string TitleWords(absl::string_view text) {
  std::string out;
  bool after_cased = false;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const UChar32 c = static_cast<UChar32>(NextCodePoint(text, &i));
    const absl::string_view character = text.substr(begin, i - begin);
    out += after_cased ? ToLowerUtf8(character) : TitleCase(character);
    after_cased = u_hasBinaryProperty(c, UCHAR_CASED);
  }
  return out;
}

std::string TitleFilter(absl::string_view text) {
  std::string out;
  std::string word;
  const auto flush = [&] {
    if (word.empty()) return;
    size_t first = 0;
    NextCodePoint(word, &first);
    absl::StrAppend(&out, ToUpperUtf8(word.substr(0, first)), ToLowerUtf8(word.substr(first)));
    word.clear();
  };
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = NextCodePoint(text, &i);
    if (IsPythonSpace(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<') {
      flush();
      absl::StrAppend(&out, text.substr(begin, i - begin));
    } else {
      absl::StrAppend(&word, text.substr(begin, i - begin));
    }
  }
  flush();
  return out;
}

std::string ReplaceAll(absl::string_view text, absl::string_view from, absl::string_view to,
                       int64_t count) {
  std::string out;
  size_t i = 0;
  if (from.empty()) {  // before each character and at the end
    for (; count != 0; --count) {
      absl::StrAppend(&out, to);
      if (i >= text.size()) return out;
      const size_t begin = i;
      NextCodePoint(text, &i);
      absl::StrAppend(&out, text.substr(begin, i - begin));
    }
  }
  for (; count != 0; --count) {
    const size_t at = text.find(from, i);
    if (at == absl::string_view::npos || from.empty()) break;
    absl::StrAppend(&out, text.substr(i, at - i), to);
    i = at + from.size();
  }
  absl::StrAppend(&out, text.substr(i));
  return out;
}

}  // namespace attune::jinja
