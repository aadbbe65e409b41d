// Filters, as jinja2 has them (with Transformers' tojson). Text is not escaped anywhere, so `safe`
// changes nothing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "worker/data/jinja/builtins.h"
#include "worker/data/jinja/interpreter.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

using Filter = absl::StatusOr<Value> (*)(Interpreter&, const Value&, const Args&);

template <std::string (*kMap)(absl::string_view)>
absl::StatusOr<Value> TextFilter(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("the filter", 0, {}));
  JINJA_ASSIGN(const std::string text, Str(value));
  return Value(kMap(text));
}

std::string Same(absl::string_view text) { return std::string(text); }

std::string Escape(absl::string_view text) {
  return absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"'", "&#39;"}, {"\"", "&#34;"}});
}

absl::StatusOr<Value> Trim(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("trim", 1, {"chars"}));
  JINJA_ASSIGN(const std::string text, Str(value));
  const Value* chars = args.Get(0, "chars");
  if (chars != nullptr && chars->is_none()) chars = nullptr;
  JINJA_ASSIGN(const std::string set, StringArg(chars, "", "chars of trim"));
  return Value(StripChars(text, chars == nullptr ? nullptr : &set, true, true));
}

absl::StatusOr<Value> Replace(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("replace", 3, {"old", "new", "count"}));
  const Value* from_value = args.Get(0, "old");
  const Value* to_value = args.Get(1, "new");
  if (from_value == nullptr || to_value == nullptr) {
    return absl::InvalidArgumentError("replace needs two arguments");
  }
  JINJA_ASSIGN(const std::string text, Str(value));
  JINJA_ASSIGN(const std::string from, Str(*from_value));
  JINJA_ASSIGN(const std::string to, Str(*to_value));
  const Value* count_value = args.Get(2, "count");
  if (count_value != nullptr && count_value->is_none()) count_value = nullptr;
  JINJA_ASSIGN(const int64_t count, IntArg(count_value, -1, "count of replace"));
  const int64_t places =
      static_cast<int64_t>(text.size() / std::max<size_t>(from.size(), 1)) + 1;
  JINJA_RETURN_IF_ERROR(
      interpreter.budget().Charge(places * static_cast<int64_t>(to.size() / 16 + 1)));
  return Value(ReplaceAll(text, from, to, count));
}

absl::StatusOr<Value> Length(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("length", 0, {}));
  if (value.is_string()) return Value(CountCodePoints(value.string()));
  if (value.is_sequence()) return Value(static_cast<int64_t>(value.sequence().items.size()));
  if (value.is_dict()) return Value(static_cast<int64_t>(value.dict().items.size()));
  if (value.is_undefined()) return Value(int64_t{0});
  return absl::InvalidArgumentError(absl::StrCat("a ", value.TypeName(), " has no length"));
}

absl::StatusOr<Value> Items(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("items", 0, {}));
  if (value.is_undefined()) return Value::List({});
  if (!value.is_dict()) {
    return absl::InvalidArgumentError(
        absl::StrCat("items needs a mapping, not ", value.TypeName()));
  }
  return interpreter.Call(Value(FindMethod(value, "items")), {});
}

absl::StatusOr<Value> ToList(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("list", 0, {}));
  JINJA_ASSIGN(std::vector<Value> items, Elements(value));
  return Value::List(std::move(items));
}

absl::StatusOr<Value> Default(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("default", 2, {"default_value", "boolean"}));
  if (!value.is_undefined() && !(TruthArg(args.Get(1, "boolean"), false) && !value.Truth())) {
    return value;
  }
  const Value* fallback = args.Get(0, "default_value");
  return fallback == nullptr ? Value(std::string()) : *fallback;
}

// value.a.b.0 for "a.b.0"; integers index. The value as it is for no attribute.
absl::StatusOr<Value> AttributePath(const Value& value, const Value* path) {
  if (path == nullptr || path->is_none()) return value;
  if (path->is_int()) return Index(value, *path);
  JINJA_ASSIGN(const std::string text, StringArg(path, "", "an attribute"));
  Value current = value;
  for (absl::string_view part : absl::StrSplit(text, '.')) {
    int64_t number = 0;
    const bool integer = !part.empty() &&
                         part.find_first_not_of("0123456789") == absl::string_view::npos &&
                         absl::SimpleAtoi(part, &number);
    JINJA_ASSIGN(current, Index(current, integer ? Value(number) : Value(part)));
  }
  return current;
}

absl::StatusOr<Value> Join(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("join", 2, {"d", "attribute"}));
  std::string separator;
  if (const Value* d = args.Get(0, "d")) {
    JINJA_ASSIGN(separator, Str(*d));
  }
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  std::string text;
  for (size_t i = 0; i < items.size(); ++i) {
    JINJA_ASSIGN(const Value item, AttributePath(items[i], args.Get(1, "attribute")));
    JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(
        item.weight() + static_cast<int64_t>(separator.size() / 16)));
    if (i > 0) text += separator;
    JINJA_RETURN_IF_ERROR(AppendStr(item, &text));
  }
  return Value(std::move(text));
}

absl::StatusOr<Value> Map(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  std::vector<Value> mapped;
  mapped.reserve(items.size());
  if (args.positional.empty()) {
    JINJA_RETURN_IF_ERROR(args.Check("map", 0, {"attribute", "default"}));
    const Value* path = args.Get(0, "attribute");
    if (path == nullptr) return absl::InvalidArgumentError("map needs a filter or an attribute");
    const Value* fallback = args.Get(1, "default");
    for (const Value& item : items) {
      JINJA_ASSIGN(Value result, AttributePath(item, path));
      if (result.is_undefined() && fallback != nullptr) result = *fallback;
      mapped.push_back(std::move(result));
    }
    return Value::List(std::move(mapped));
  }
  JINJA_ASSIGN(const std::string name, StringArg(&args.positional[0], "", "the filter of map"));
  Args rest{{args.positional.begin() + 1, args.positional.end()}, args.keywords};
  for (const Value& item : items) {
    JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(item.weight() + 1));
    JINJA_ASSIGN(Value result, ApplyFilter(interpreter, name, item, rest));
    mapped.push_back(std::move(result));
  }
  return Value::List(std::move(mapped));
}

// select, reject, selectattr, rejectattr.
template <bool kWithAttribute, bool kKeep>
absl::StatusOr<Value> Select(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  const size_t first = kWithAttribute ? 1 : 0;
  if (args.positional.size() < first) {
    return absl::InvalidArgumentError("selectattr and rejectattr need an attribute");
  }
  std::string test;
  Args rest;
  if (args.positional.size() > first) {
    JINJA_ASSIGN(test, StringArg(&args.positional[first], "", "the test of select"));
    rest.positional.assign(args.positional.begin() + static_cast<int64_t>(first) + 1,
                           args.positional.end());
    rest.keywords = args.keywords;
  }
  std::vector<Value> kept;
  for (const Value& item : items) {
    JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(1));
    JINJA_ASSIGN(const Value subject,
                 AttributePath(item, kWithAttribute ? &args.positional[0] : nullptr));
    bool holds = subject.Truth();
    if (!test.empty()) {
      JINJA_ASSIGN(holds, ApplyTest(interpreter, test, subject, rest));
    }
    if (holds == kKeep) kept.push_back(item);
  }
  return Value::List(std::move(kept));
}

absl::StatusOr<Value> First(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("first", 0, {}));
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  return items.empty() ? Value::UndefinedOf("no first item, the sequence was empty")
                       : items.front();
}

absl::StatusOr<Value> Last(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("last", 0, {}));
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  return items.empty() ? Value::UndefinedOf("no last item, the sequence was empty")
                       : items.back();
}

absl::StatusOr<Value> Reverse(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("reverse", 0, {}));
  JINJA_ASSIGN(std::vector<Value> items, Elements(value));
  std::reverse(items.begin(), items.end());
  if (!value.is_string()) return Value::List(std::move(items));
  std::string text;
  for (const Value& item : items) text += item.string();
  return Value(std::move(text));
}

// Sorts stably by key; strings by lower case unless `case_sensitive`.
absl::Status SortBy(Interpreter& interpreter, bool case_sensitive, bool reverse,
                    std::vector<std::pair<Value, Value>>* keyed) {
  for (auto& [key, value] : *keyed) {
    if (!case_sensitive && key.is_string()) key = Value(ToLowerUtf8(key.string()));
  }
  absl::Status status;
  const auto less = [&](const auto& a, const auto& b) {
    if (!status.ok()) return false;
    status = interpreter.budget().Charge(1 + (a.first.weight() + b.first.weight()) / 4);
    if (!status.ok()) return false;
    const absl::StatusOr<bool> result =
        reverse ? Less(b.first, a.first) : Less(a.first, b.first);
    status = result.status();
    return result.ok() && *result;
  };
  std::stable_sort(keyed->begin(), keyed->end(), less);
  return status;
}

absl::StatusOr<Value> Sort(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("sort", 3, {"reverse", "case_sensitive", "attribute"}));
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : items) {
    JINJA_ASSIGN(Value key, AttributePath(item, args.Get(2, "attribute")));
    keyed.emplace_back(std::move(key), item);
  }
  JINJA_RETURN_IF_ERROR(SortBy(interpreter, TruthArg(args.Get(1, "case_sensitive"), false),
                               TruthArg(args.Get(0, "reverse"), false), &keyed));
  std::vector<Value> sorted;
  for (auto& pair : keyed) sorted.push_back(std::move(pair.second));
  return Value::List(std::move(sorted));
}

absl::StatusOr<Value> DictSort(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("dictsort", 3, {"case_sensitive", "by", "reverse"}));
  JINJA_ASSIGN(const std::string by, StringArg(args.Get(1, "by"), "key", "by of dictsort"));
  if (by != "key" && by != "value") {
    return absl::InvalidArgumentError("dictsort sorts by 'key' or 'value'");
  }
  if (value.is_undefined()) return value.UndefinedError();
  if (!value.is_dict()) {
    return absl::InvalidArgumentError(
        absl::StrCat("dictsort needs a mapping, not ", value.TypeName()));
  }
  std::vector<std::pair<Value, Value>> keyed;
  for (const auto& [key, item] : value.dict().items) {
    JINJA_ASSIGN(Value pair, Value::Tuple({key, item}));
    keyed.emplace_back(by == "key" ? key : item, std::move(pair));
  }
  JINJA_RETURN_IF_ERROR(SortBy(interpreter, TruthArg(args.Get(0, "case_sensitive"), false),
                               TruthArg(args.Get(2, "reverse"), false), &keyed));
  std::vector<Value> sorted;
  for (auto& pair : keyed) sorted.push_back(std::move(pair.second));
  return Value::List(std::move(sorted));
}

absl::StatusOr<Value> Unique(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("unique", 2, {"case_sensitive", "attribute"}));
  const bool case_sensitive = TruthArg(args.Get(0, "case_sensitive"), false);
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  std::vector<Value> seen;
  std::vector<Value> kept;
  for (const Value& item : items) {
    JINJA_ASSIGN(Value key, AttributePath(item, args.Get(1, "attribute")));
    if (!case_sensitive && key.is_string()) key = Value(ToLowerUtf8(key.string()));
    JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(
        static_cast<int64_t>(seen.size() + 1) * (1 + key.weight() / 4)));
    if (std::any_of(seen.begin(), seen.end(), [&](const Value& v) { return Equal(v, key); })) {
      continue;
    }
    seen.push_back(std::move(key));
    kept.push_back(item);
  }
  return Value::List(std::move(kept));
}

template <bool kMax>
absl::StatusOr<Value> Extreme(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("min and max", 2, {"case_sensitive", "attribute"}));
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  if (items.empty()) return Value::UndefinedOf("no aggregated item, the sequence was empty");
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : items) {
    JINJA_ASSIGN(Value key, AttributePath(item, args.Get(1, "attribute")));
    keyed.emplace_back(std::move(key), item);
  }
  // The first of equal ones, in both directions.
  JINJA_RETURN_IF_ERROR(SortBy(interpreter, TruthArg(args.Get(0, "case_sensitive"), false), kMax,
                               &keyed));
  return keyed.front().second;
}

absl::StatusOr<Value> Sum(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("sum", 2, {"attribute", "start"}));
  JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
  const Value* start = args.Get(1, "start");
  Value total = start == nullptr ? Value(int64_t{0}) : *start;
  for (const Value& item : items) {
    JINJA_ASSIGN(const Value term, AttributePath(item, args.Get(0, "attribute")));
    JINJA_ASSIGN(total, Binary("+", total, term, &interpreter.budget()));
  }
  return total;
}

absl::StatusOr<Value> ToFloat(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("float", 1, {"default"}));
  if (value.is_undefined()) return value.UndefinedError();
  if (value.is_number()) return Value(value.AsDouble());
  double number = 0;
  if (value.is_string() && absl::SimpleAtod(value.string(), &number)) return Value(number);
  const Value* fallback = args.Get(0, "default");
  return fallback == nullptr ? Value(0.0) : *fallback;
}

absl::StatusOr<Value> ToInt(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("int", 2, {"default", "base"}));
  JINJA_ASSIGN(const int64_t base, IntArg(args.Get(1, "base"), 10, "base of int"));
  if (value.is_undefined()) return value.UndefinedError();
  const Value* fallback = args.Get(0, "default");
  const Value otherwise = fallback == nullptr ? Value(int64_t{0}) : *fallback;
  if (value.is_bool() || value.is_int()) return Value(value.AsInt());
  double number = 0;
  if (value.is_string()) {
    std::string text = StripChars(value.string(), nullptr, true, true);
    if (base != 10) return absl::UnimplementedError("the filter int with a base other than 10");
    int64_t integer = 0;
    if (absl::SimpleAtoi(text, &integer)) return Value(integer);
    if (!absl::SimpleAtod(text, &number)) return otherwise;
  } else if (value.is_float()) {
    number = value.float_value();
  } else {
    return otherwise;
  }
  if (!(std::abs(number) < 9.2e18)) return otherwise;
  return Value(static_cast<int64_t>(number));
}

absl::StatusOr<Value> Abs(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("abs", 0, {}));
  if (value.is_undefined()) return value.UndefinedError();
  if (!value.is_number()) {
    return absl::InvalidArgumentError(absl::StrCat("abs of a ", value.TypeName()));
  }
  if (value.is_float()) return Value(std::abs(value.float_value()));
  if (value.AsInt() == INT64_MIN) return absl::InvalidArgumentError("an integer overflows");
  return Value(std::abs(value.AsInt()));
}

absl::StatusOr<Value> Round(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("round", 2, {"precision", "method"}));
  JINJA_ASSIGN(const int64_t precision, IntArg(args.Get(0, "precision"), 0, "precision of round"));
  JINJA_ASSIGN(const std::string method,
               StringArg(args.Get(1, "method"), "common", "method of round"));
  if (value.is_undefined()) return value.UndefinedError();
  if (!value.is_number()) {
    return absl::InvalidArgumentError(absl::StrCat("round of a ", value.TypeName()));
  }
  if (precision < 0 || precision > 15) {
    return absl::UnimplementedError("the filter round with a precision outside 0 to 15");
  }
  const double number = value.AsDouble();
  const double scale = std::pow(10.0, static_cast<double>(precision));
  if (method == "floor") return Value(std::floor(number * scale) / scale);
  if (method == "ceil") return Value(std::ceil(number * scale) / scale);
  if (method != "common") {
    return absl::InvalidArgumentError("the method of round is 'common', 'ceil' or 'floor'");
  }
  if (!value.is_float()) return Value(value.AsInt());
  // Python rounds the decimal value exactly, half to even; so does printf.
  char buffer[512];
  std::snprintf(buffer, sizeof(buffer), "%.*f", static_cast<int>(precision), number);
  double rounded = number;
  if (!absl::SimpleAtod(buffer, &rounded)) return Value(number);
  return Value(rounded);
}

absl::StatusOr<Value> Indent(Interpreter& interpreter, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("indent", 3, {"width", "first", "blank"}));
  JINJA_ASSIGN(const std::string text, Str(value));
  std::string indent = "    ";
  if (const Value* width = args.Get(0, "width")) {
    if (width->is_string()) {
      indent = width->string();
    } else {
      JINJA_ASSIGN(const int64_t spaces, IntArg(width, 4, "width of indent"));
      if (spaces > 1000) return absl::InvalidArgumentError("indent by more than 1000");
      indent = std::string(static_cast<size_t>(std::max<int64_t>(spaces, 0)), ' ');
    }
  }
  const bool blank = TruthArg(args.Get(2, "blank"), false);
  const std::vector<absl::string_view> lines = absl::StrSplit(text, '\n');
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(
      static_cast<int64_t>(lines.size()) * static_cast<int64_t>(1 + indent.size() / 16)));
  std::string out = TruthArg(args.Get(1, "first"), false) ? indent : "";
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) absl::StrAppend(&out, "\n", blank || !lines[i].empty() ? indent : "");
    absl::StrAppend(&out, lines[i]);
  }
  return Value(std::move(out));
}

absl::StatusOr<Value> Attr(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("attr", 1, {"name"}));
  JINJA_ASSIGN(const std::string name, StringArg(args.Get(0, "name"), "", "the name of attr"));
  // Attributes only: unlike value.name, it does not look at keys.
  if (value.is_dict()) {
    if (std::shared_ptr<const Function> method = FindMethod(value, name)) {
      return Value(std::move(method));
    }
    return Value::UndefinedOf(absl::StrCat("'dict' object has no attribute '", name, "'"));
  }
  return Attribute(value, name);
}

absl::StatusOr<Value> ToJson(Interpreter&, const Value& value, const Args& args) {
  JINJA_RETURN_IF_ERROR(
      args.Check("tojson", 4, {"ensure_ascii", "indent", "separators", "sort_keys"}));
  JsonStyle style;
  style.ensure_ascii = TruthArg(args.Get(0, "ensure_ascii"), false);
  style.sort_keys = TruthArg(args.Get(3, "sort_keys"), false);
  const Value* indent = args.Get(1, "indent");
  if (indent != nullptr && !indent->is_none()) {
    style.multi_line = true;
    style.item_separator = ",";
    if (indent->is_string()) {
      style.indent = indent->string();
    } else {
      JINJA_ASSIGN(const int64_t spaces, IntArg(indent, 0, "indent of tojson"));
      if (spaces > 100) return absl::InvalidArgumentError("tojson with an indent over 100");
      style.indent = std::string(static_cast<size_t>(std::max<int64_t>(spaces, 0)), ' ');
    }
  }
  const Value* separators = args.Get(2, "separators");
  if (separators != nullptr && !separators->is_none()) {
    if (!separators->is_sequence() || separators->sequence().items.size() != 2 ||
        !separators->sequence().items[0].is_string() ||
        !separators->sequence().items[1].is_string()) {
      return absl::InvalidArgumentError("separators of tojson must be two strings");
    }
    style.item_separator = separators->sequence().items[0].string();
    style.key_separator = separators->sequence().items[1].string();
  }
  std::string text;
  JINJA_RETURN_IF_ERROR(AppendJson(value, style, 0, &text));
  return Value(std::move(text));
}

struct NamedFilter {
  absl::string_view name;
  Filter filter;
};

constexpr NamedFilter kFilters[] = {
    {"abs", Abs},
    {"attr", Attr},
    {"capitalize", TextFilter<Capitalize>},
    {"count", Length},
    {"d", Default},
    {"default", Default},
    {"dictsort", DictSort},
    {"e", TextFilter<Escape>},
    {"escape", TextFilter<Escape>},
    {"first", First},
    {"float", ToFloat},
    {"indent", Indent},
    {"int", ToInt},
    {"items", Items},
    {"join", Join},
    {"last", Last},
    {"length", Length},
    {"list", ToList},
    {"lower", TextFilter<ToLowerUtf8>},
    {"map", Map},
    {"max", Extreme<true>},
    {"min", Extreme<false>},
    {"reject", Select<false, false>},
    {"rejectattr", Select<true, false>},
    {"replace", Replace},
    {"reverse", Reverse},
    {"round", Round},
    {"safe", TextFilter<Same>},
    {"select", Select<false, true>},
    {"selectattr", Select<true, true>},
    {"sort", Sort},
    {"string", TextFilter<Same>},
    {"sum", Sum},
    {"title", TextFilter<TitleFilter>},
    {"tojson", ToJson},
    {"trim", Trim},
    {"unique", Unique},
    {"upper", TextFilter<ToUpperUtf8>},
};

Filter FindFilter(absl::string_view name) {
  for (const NamedFilter& filter : kFilters) {
    if (filter.name == name) return filter.filter;
  }
  return nullptr;
}

}  // namespace

bool IsFilter(absl::string_view name) { return FindFilter(name) != nullptr; }

absl::StatusOr<Value> ApplyFilter(Interpreter& interpreter, const std::string& name,
                                  const Value& value, const Args& args) {
  const Filter filter = FindFilter(name);
  if (filter == nullptr) {
    return absl::UnimplementedError(absl::StrCat("attune has no filter '", name, "'"));
  }
  return filter(interpreter, value, args);
}

}  // namespace attune::jinja
