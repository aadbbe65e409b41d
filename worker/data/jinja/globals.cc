// Tests ("x is string") and global functions.
#include <time.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "worker/data/jinja/builtins.h"
#include "worker/data/jinja/interpreter.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as jinja2's sandbox

enum class Test : uint8_t {
  kBoolean, kCallable, kDefined, kDivisibleBy, kEqual, kEven, kFalse, kFilter, kFloat, kGreater,
  kGreaterOrEqual, kIn, kInteger, kIterable, kLess, kLessOrEqual, kLower, kMapping, kNone,
  kNotEqual, kNumber, kOdd, kSameAs, kSequence, kString, kTest, kTrue, kUndefined, kUpper,
};

struct NamedTest {
  absl::string_view name;
  Test test;
};

constexpr NamedTest kTests[] = {
    {"boolean", Test::kBoolean},
    {"callable", Test::kCallable},
    {"defined", Test::kDefined},
    {"divisibleby", Test::kDivisibleBy},
    {"eq", Test::kEqual},
    {"equalto", Test::kEqual},
    {"even", Test::kEven},
    {"false", Test::kFalse},
    {"filter", Test::kFilter},
    {"float", Test::kFloat},
    {"ge", Test::kGreaterOrEqual},
    {"greaterthan", Test::kGreater},
    {"gt", Test::kGreater},
    {"in", Test::kIn},
    {"integer", Test::kInteger},
    {"iterable", Test::kIterable},
    {"le", Test::kLessOrEqual},
    {"lessthan", Test::kLess},
    {"lower", Test::kLower},
    {"lt", Test::kLess},
    {"mapping", Test::kMapping},
    {"ne", Test::kNotEqual},
    {"none", Test::kNone},
    {"number", Test::kNumber},
    {"odd", Test::kOdd},
    {"sameas", Test::kSameAs},
    {"sequence", Test::kSequence},
    {"string", Test::kString},
    {"test", Test::kTest},
    {"true", Test::kTrue},
    {"undefined", Test::kUndefined},
    {"upper", Test::kUpper},
};

const NamedTest* FindTest(absl::string_view name) {
  for (const NamedTest& test : kTests) {
    if (test.name == name) return &test;
  }
  return nullptr;
}

// The argument of a test that needs one.
absl::StatusOr<Value> OneArgument(const std::string& name, const Args& args) {
  if (args.positional.size() != 1) {
    return absl::InvalidArgumentError(absl::StrCat("the test '", name, "' needs one argument"));
  }
  return args.positional[0];
}

absl::StatusOr<bool> CompareTest(Interpreter& interpreter, Test test, const Value& value,
                                 const Value& other) {
  Budget* budget = &interpreter.budget();
  switch (test) {
    case Test::kEqual:
      return Compare("==", value, other, budget);
    case Test::kNotEqual:
      return Compare("!=", value, other, budget);
    case Test::kLess:
      return Compare("<", value, other, budget);
    case Test::kLessOrEqual:
      return Compare("<=", value, other, budget);
    case Test::kGreater:
      return Compare(">", value, other, budget);
    case Test::kGreaterOrEqual:
      return Compare(">=", value, other, budget);
    case Test::kIn:
      return Compare("in", value, other, budget);
    case Test::kDivisibleBy: {
      JINJA_ASSIGN(const Value rest, Binary("%", value, other, budget));
      return Equal(rest, Value(int64_t{0}));
    }
    default:  // sameas: identity, which only singletons and equal scalars have here
      return value.TypeName() == other.TypeName() && Equal(value, other);
  }
}

bool IsCased(const Value& value, std::string (*map)(absl::string_view)) {
  const absl::StatusOr<std::string> text = Str(value);
  if (!text.ok() || map(*text) != *text) return false;
  // A text without letters is neither upper nor lower case.
  return ToUpperUtf8(*text) != *text || ToLowerUtf8(*text) != *text;
}

absl::StatusOr<Value> Range(Interpreter& interpreter, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("range", 3, {}));
  if (args.positional.empty()) return absl::InvalidArgumentError("range needs an argument");
  int64_t bounds[3] = {0, 0, 1};  // begin, end, step
  const size_t n = args.positional.size();
  for (size_t i = 0; i < n; ++i) {
    JINJA_ASSIGN(bounds[n == 1 ? 1 : i], IntArg(&args.positional[i], 0, "an argument of range"));
  }
  const auto [begin, end, step] = bounds;
  if (step == 0) return absl::InvalidArgumentError("range with step 0");
  const double count = std::ceil((static_cast<double>(end) - static_cast<double>(begin)) /
                                 static_cast<double>(step));
  if (count > kMaxRange) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a range of more than ", kMaxRange, " numbers"));
  }
  std::vector<Value> items;
  for (int64_t i = 0; i < static_cast<int64_t>(count); ++i) items.emplace_back(begin + i * step);
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(static_cast<int64_t>(items.size())));
  return Value::List(std::move(items));
}

// Keyword arguments and a mapping, or pairs, in front of them.
absl::StatusOr<Dict> DictOf(absl::string_view what, const Args& args) {
  Dict dict;
  if (args.positional.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat(what, " takes at most one positional argument"));
  }
  if (!args.positional.empty()) {
    const Value& source = args.positional[0];
    if (source.is_dict()) {
      dict = source.dict();
    } else {
      JINJA_ASSIGN(const std::vector<Value> pairs, Elements(source));
      for (const Value& pair : pairs) {
        JINJA_ASSIGN(const std::vector<Value> parts, Elements(pair));
        if (parts.size() != 2 || parts[0].is_sequence() || parts[0].is_dict()) {
          return absl::InvalidArgumentError(absl::StrCat(what, " needs pairs of key and value"));
        }
        dict.Set(parts[0], parts[1]);
      }
    }
  }
  for (const auto& [name, value] : args.keywords) dict.Set(Value(absl::string_view(name)), value);
  return dict;
}

absl::StatusOr<Value> MakeNamespace(Interpreter& interpreter, const Args& args) {
  JINJA_ASSIGN(Dict attributes, DictOf("namespace", args));
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(8 + attributes.weight));
  return Value(interpreter.NewNamespace(std::move(attributes)));
}

absl::StatusOr<Value> MakeDict(Interpreter& interpreter, const Args& args) {
  JINJA_ASSIGN(Dict dict, DictOf("dict", args));
  JINJA_RETURN_IF_ERROR(interpreter.budget().Charge(dict.weight));
  return Value::Of(std::move(dict));
}

absl::StatusOr<Value> RaiseException(Interpreter&, const Args& args) {
  std::string message;
  for (const Value& value : args.positional) JINJA_RETURN_IF_ERROR(AppendStr(value, &message));
  for (const auto& keyword : args.keywords) {
    JINJA_RETURN_IF_ERROR(AppendStr(keyword.second, &message));
  }
  return absl::InvalidArgumentError(absl::StrCat("the template refuses: ", message));
}

absl::StatusOr<Value> FormatTime(absl::CivilSecond now, const Args& args) {
  JINJA_RETURN_IF_ERROR(args.Check("strftime_now", 1, {"format"}));
  JINJA_ASSIGN(const std::string format,
               StringArg(args.Get(0, "format"), "", "the format of strftime_now"));
  if (format.empty()) return Value(std::string());
  struct tm fields = {};
  fields.tm_year = static_cast<int>(now.year() - 1900);
  fields.tm_mon = now.month() - 1;
  fields.tm_mday = now.day();
  fields.tm_hour = now.hour();
  fields.tm_min = now.minute();
  fields.tm_sec = now.second();
  fields.tm_yday = absl::GetYearDay(absl::CivilDay(now)) - 1;
  fields.tm_wday = (static_cast<int>(absl::GetWeekday(absl::CivilDay(now))) + 1) % 7;
  char buffer[1024];
  // The space tells an empty result from one that does not fit.
  const size_t size = strftime(buffer, sizeof(buffer), absl::StrCat(format, " ").c_str(), &fields);
  if (size == 0) return absl::InvalidArgumentError("the format of strftime_now is too long");
  return Value(absl::string_view(buffer, size - 1));
}

Value Named(const std::string& name,
            std::function<absl::StatusOr<Value>(Interpreter&, const Args&)> call) {
  return Value(std::make_shared<const Function>(Function{name, std::move(call)}));
}

}  // namespace

bool IsTest(absl::string_view name) { return FindTest(name) != nullptr; }

absl::StatusOr<bool> ApplyTest(Interpreter& interpreter, const std::string& name,
                               const Value& value, const Args& args) {
  const NamedTest* named = FindTest(name);
  if (named == nullptr) {
    return absl::UnimplementedError(absl::StrCat("attune has no test '", name, "'"));
  }
  const auto integer = [&](const Value& v) { return v.is_int() || v.is_bool(); };
  switch (named->test) {
    case Test::kBoolean:
      return value.is_bool();
    case Test::kCallable:
      return value.is_function() || value.is_undefined();
    case Test::kDefined:
      return !value.is_undefined();
    case Test::kUndefined:
      return value.is_undefined();
    case Test::kNone:
      return value.is_none();
    case Test::kTrue:
      return value.is_bool() && value.bool_value();
    case Test::kFalse:
      return value.is_bool() && !value.bool_value();
    case Test::kInteger:
      return value.is_int();
    case Test::kFloat:
      return value.is_float();
    case Test::kNumber:
      return value.is_number();
    case Test::kString:
      return value.is_string();
    case Test::kMapping:
      return value.is_dict();
    case Test::kSequence:
    case Test::kIterable:
      // Undefined is an empty sequence, as in jinja2.
      return value.is_string() || value.is_sequence() || value.is_dict() || value.is_undefined();
    case Test::kOdd:
    case Test::kEven:
      if (value.is_undefined()) return value.UndefinedError();
      if (!integer(value)) {
        return absl::InvalidArgumentError(
            absl::StrCat("the test '", name, "' of a ", value.TypeName()));
      }
      return (value.AsInt() % 2 != 0) == (named->test == Test::kOdd);
    case Test::kUpper:
      return IsCased(value, ToUpperUtf8);
    case Test::kLower:
      return IsCased(value, ToLowerUtf8);
    case Test::kFilter:
      return value.is_string() && IsFilter(value.string());
    case Test::kTest:
      return value.is_string() && IsTest(value.string());
    default: {
      JINJA_ASSIGN(const Value other, OneArgument(name, args));
      return CompareTest(interpreter, named->test, value, other);
    }
  }
}

std::vector<std::pair<std::string, Value>> Globals(std::function<absl::CivilSecond()> clock) {
  return {
      {"namespace", Named("namespace", MakeNamespace)},
      {"dict", Named("dict", MakeDict)},
      {"range", Named("range", Range)},
      {"raise_exception", Named("raise_exception", RaiseException)},
      {"strftime_now", Named("strftime_now",
                             [clock = std::move(clock)](Interpreter&, const Args& args) {
                               return FormatTime(clock(), args);
                             })},
  };
}

}  // namespace attune::jinja
