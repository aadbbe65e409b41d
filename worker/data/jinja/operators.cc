// Arithmetic, comparison, subscripts and attributes; arguments of calls.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "worker/data/jinja/builtins.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

absl::Status Overflow() { return absl::InvalidArgumentError("an integer overflows"); }

absl::Status Unsupported(absl::string_view op, const Value& a, const Value& b) {
  if (a.is_undefined()) return a.UndefinedError();
  if (b.is_undefined()) return b.UndefinedError();
  return absl::InvalidArgumentError(
      absl::StrCat("'", op, "' does not work between ", a.TypeName(), " and ", b.TypeName()));
}

absl::StatusOr<Value> Power(int64_t base, int64_t exponent) {
  if (exponent < 0) return Value(std::pow(static_cast<double>(base), exponent));
  int64_t result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result)) return Overflow();
    if (exponent > 1 && __builtin_mul_overflow(base, base, &base)) return Overflow();
  }
  return Value(result);
}

absl::StatusOr<Value> IntArithmetic(absl::string_view op, int64_t a, int64_t b) {
  int64_t result = 0;
  if (op == "+") return __builtin_add_overflow(a, b, &result) ? Overflow() : absl::StatusOr<Value>(Value(result));
  if (op == "-") return __builtin_sub_overflow(a, b, &result) ? Overflow() : absl::StatusOr<Value>(Value(result));
  if (op == "*") return __builtin_mul_overflow(a, b, &result) ? Overflow() : absl::StatusOr<Value>(Value(result));
  if (op == "**") return Power(a, b);
  if (b == 0) return absl::InvalidArgumentError("division by zero");
  if (op == "/") return Value(static_cast<double>(a) / static_cast<double>(b));
  if (a == INT64_MIN && b == -1) return Overflow();
  // Rounds down, as Python does.
  const int64_t quotient = a / b - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0);
  return Value(op == "//" ? quotient : a - quotient * b);
}

absl::StatusOr<Value> FloatArithmetic(absl::string_view op, double a, double b) {
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") return Value(std::pow(a, b));
  if (b == 0) return absl::InvalidArgumentError("division by zero");
  if (op == "/") return Value(a / b);
  if (op == "//") return Value(std::floor(a / b));
  const double remainder = std::fmod(a, b);
  return Value(remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder);
}

absl::StatusOr<Value> Repeat(const Value& value, int64_t times, Budget* budget) {
  times = std::max<int64_t>(times, 0);
  int64_t work = 0;
  if (__builtin_mul_overflow(value.weight(), times, &work)) work = INT64_MAX / 2;
  JINJA_RETURN_IF_ERROR(budget->Charge(work));
  if (value.is_string()) {
    std::string text;
    text.reserve(value.string().size() * static_cast<size_t>(times));
    for (int64_t i = 0; i < times; ++i) text += value.string();
    return Value(std::move(text));
  }
  const Sequence& sequence = value.sequence();
  std::vector<Value> items;
  for (int64_t i = 0; i < times; ++i) {
    items.insert(items.end(), sequence.items.begin(), sequence.items.end());
  }
  return sequence.tuple ? Value::Tuple(std::move(items)) : Value::List(std::move(items));
}

absl::StatusOr<Value> Concatenate(const Value& a, const Value& b) {
  std::string text;
  JINJA_RETURN_IF_ERROR(AppendStr(a, &text));
  JINJA_RETURN_IF_ERROR(AppendStr(b, &text));
  return Value(std::move(text));
}

// Where code point `index` begins; text.size() if there are fewer.
size_t CodePointOffset(absl::string_view text, int64_t index) {
  size_t i = 0;
  for (; index > 0 && i < text.size(); --index) NextCodePoint(text, &i);
  return i;
}

absl::StatusOr<Value> IndexInto(const Value& value, int64_t index) {
  if (value.is_string()) {
    const absl::string_view text = value.string();
    if (index < 0) index += CountCodePoints(text);
    const size_t begin = index < 0 ? text.size() : CodePointOffset(text, index);
    if (begin < text.size()) {
      size_t end = begin;
      NextCodePoint(text, &end);
      return Value(text.substr(begin, end - begin));
    }
  } else {
    const auto& items = value.sequence().items;
    if (index < 0) index += static_cast<int64_t>(items.size());
    if (index >= 0 && index < static_cast<int64_t>(items.size())) return items[index];
  }
  return Value::UndefinedOf(absl::StrCat("a ", value.TypeName(), " has no element ", index));
}

// A bound of a slice: None, or an integer.
absl::StatusOr<int64_t> Bound(const Value& value, int64_t fallback) {
  if (value.is_none()) return fallback;
  if (value.is_undefined()) return value.UndefinedError();
  if (!value.is_int() && !value.is_bool()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a slice needs integers, not ", value.TypeName()));
  }
  return value.AsInt();
}

}  // namespace

const Value* Args::Get(size_t i, absl::string_view keyword) const {
  if (i < positional.size()) return &positional[i];
  for (const auto& [name, value] : keywords) {
    if (name == keyword) return &value;
  }
  return nullptr;
}

absl::Status Args::Check(absl::string_view function, size_t max_positional,
                         std::initializer_list<absl::string_view> names) const {
  if (positional.size() > max_positional) {
    return absl::InvalidArgumentError(
        absl::StrCat(function, " takes at most ", max_positional, " argument(s)"));
  }
  for (const auto& keyword : keywords) {
    if (std::find(names.begin(), names.end(), keyword.first) == names.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(function, " takes no argument '", keyword.first, "'"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> IntArg(const Value* value, int64_t fallback, absl::string_view what) {
  if (value == nullptr) return fallback;
  if (value->is_undefined()) return value->UndefinedError();
  if (value->is_int() || value->is_bool()) return value->AsInt();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " must be an integer, not ", value->TypeName()));
}

absl::StatusOr<std::string> StringArg(const Value* value, absl::string_view fallback,
                                      absl::string_view what) {
  if (value == nullptr) return std::string(fallback);
  if (value->is_undefined()) return value->UndefinedError();
  if (value->is_string()) return value->string();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " must be a string, not ", value->TypeName()));
}

bool TruthArg(const Value* value, bool fallback) {
  return value == nullptr ? fallback : value->Truth();
}

absl::StatusOr<Value> Binary(absl::string_view op, const Value& a, const Value& b,
                             Budget* budget) {
  if (op == "~") {
    JINJA_RETURN_IF_ERROR(budget->Charge(a.weight() + b.weight()));
    return Concatenate(a, b);
  }
  if (a.is_number() && b.is_number()) {
    if (a.is_float() || b.is_float()) return FloatArithmetic(op, a.AsDouble(), b.AsDouble());
    return IntArithmetic(op, a.AsInt(), b.AsInt());
  }
  const auto integral = [](const Value& v) { return v.is_int() || v.is_bool(); };
  if (op == "+") {
    JINJA_RETURN_IF_ERROR(budget->Charge(a.weight() + b.weight()));
    if (a.is_string() && b.is_string()) return Value(absl::StrCat(a.string(), b.string()));
    if (a.is_sequence() && b.is_sequence() && a.is_tuple() == b.is_tuple()) {
      std::vector<Value> items = a.sequence().items;
      items.insert(items.end(), b.sequence().items.begin(), b.sequence().items.end());
      return a.is_tuple() ? Value::Tuple(std::move(items)) : Value::List(std::move(items));
    }
  } else if (op == "*") {
    if ((a.is_string() || a.is_sequence()) && integral(b)) return Repeat(a, b.AsInt(), budget);
    if ((b.is_string() || b.is_sequence()) && integral(a)) return Repeat(b, a.AsInt(), budget);
  } else if (op == "%" && a.is_string()) {
    return absl::UnimplementedError("% formatting of a string; use ~ to put texts together");
  }
  return Unsupported(op, a, b);
}

absl::StatusOr<bool> Contains(const Value& container, const Value& item) {
  if (container.is_string()) {
    if (item.is_undefined()) return item.UndefinedError();
    if (!item.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat("'in' a string needs a string, not ", item.TypeName()));
    }
    return container.string().find(item.string()) != std::string::npos;
  }
  if (container.is_dict()) {
    if (item.is_list() || item.is_dict()) {
      return absl::InvalidArgumentError(absl::StrCat("a ", item.TypeName(), " cannot be a key"));
    }
    return container.dict().Find(item) != nullptr;
  }
  if (container.is_sequence()) {
    const auto& items = container.sequence().items;
    return std::any_of(items.begin(), items.end(), [&](const Value& v) { return Equal(v, item); });
  }
  if (container.is_undefined()) return false;
  return absl::InvalidArgumentError(
      absl::StrCat("a ", container.TypeName(), " cannot be searched with 'in'"));
}

absl::StatusOr<bool> Compare(absl::string_view op, const Value& a, const Value& b,
                             Budget* budget) {
  JINJA_RETURN_IF_ERROR(budget->Charge((a.weight() + b.weight()) / 4));
  if (op == "==") return Equal(a, b);
  if (op == "!=") return !Equal(a, b);
  if (op == "in") return Contains(b, a);
  if (op == "not in") {
    JINJA_ASSIGN(const bool contains, Contains(b, a));
    return !contains;
  }
  if (op == "<") return Less(a, b);
  if (op == ">") return Less(b, a);
  JINJA_ASSIGN(const bool less, op == "<=" ? Less(a, b) : Less(b, a));
  return less || Equal(a, b);
}

absl::StatusOr<Value> Attribute(const Value& value, const std::string& name) {
  if (value.is_undefined()) return value.UndefinedError();
  if (value.is_namespace()) {
    const Value* attribute = value.space()->attributes.Find(name);
    if (attribute != nullptr) return *attribute;
  } else if (value.is_function()) {
    if (value.function().attribute != nullptr) return value.function().attribute(name);
  } else {
    if (std::shared_ptr<const Function> method = FindMethod(value, name)) {
      return Value(std::move(method));
    }
    if (value.is_dict()) {
      if (const Value* item = value.dict().Find(name)) return *item;
    }
  }
  return Value::UndefinedOf(
      absl::StrCat("'", value.TypeName(), "' object has no attribute '", name, "'"));
}

absl::StatusOr<Value> Index(const Value& value, const Value& key) {
  if (value.is_undefined()) return value.UndefinedError();
  if (value.is_dict()) {
    if (const Value* item = value.dict().Find(key)) return *item;
  } else if ((value.is_string() || value.is_sequence()) && (key.is_int() || key.is_bool())) {
    return IndexInto(value, key.AsInt());
  }
  if (key.is_string()) return Attribute(value, key.string());
  std::string shown;
  if (!AppendRepr(key, &shown).ok()) shown = std::string(key.TypeName());
  return Value::UndefinedOf(
      absl::StrCat("'", value.TypeName(), "' object has no element ", shown.substr(0, 80)));
}

absl::StatusOr<Value> Slice(const Value& value, const Value& begin_value, const Value& end_value,
                            const Value& step_value, Budget* budget) {
  if (value.is_undefined()) return value.UndefinedError();
  if (!value.is_string() && !value.is_sequence()) {
    return Value::UndefinedOf(absl::StrCat("a ", value.TypeName(), " cannot be sliced"));
  }
  JINJA_RETURN_IF_ERROR(budget->Charge(value.weight()));
  JINJA_ASSIGN(const int64_t step, Bound(step_value, 1));
  if (step == 0) return absl::InvalidArgumentError("a slice with step 0");
  std::vector<size_t> offsets;  // of a string's code points, with the end
  const bool ascii = value.is_string() &&
                     CountCodePoints(value.string()) == static_cast<int64_t>(value.string().size());
  if (value.is_string() && !ascii) {
    for (size_t i = 0; i < value.string().size(); NextCodePoint(value.string(), &i)) {
      offsets.push_back(i);
    }
    offsets.push_back(value.string().size());
  }
  const int64_t n = !value.is_string() ? static_cast<int64_t>(value.sequence().items.size())
                    : ascii            ? static_cast<int64_t>(value.string().size())
                                       : static_cast<int64_t>(offsets.size()) - 1;
  // Python's slice.indices.
  const int64_t lowest = step > 0 ? 0 : -1;
  const int64_t highest = step > 0 ? n : n - 1;
  const auto clamp = [&](int64_t bound) {
    if (bound < 0) bound = bound < -n ? -1 : bound + n;
    return std::clamp(bound, lowest, highest);
  };
  JINJA_ASSIGN(int64_t begin, Bound(begin_value, step > 0 ? 0 : n - 1));
  JINJA_ASSIGN(int64_t end, Bound(end_value, n));
  begin = clamp(begin);
  end = end_value.is_none() ? (step > 0 ? n : -1) : clamp(end);
  std::string text;
  std::vector<Value> items;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (ascii) {
      text.push_back(value.string()[i]);
    } else if (value.is_string()) {
      text.append(value.string(), offsets[i], offsets[i + 1] - offsets[i]);
    } else {
      items.push_back(value.sequence().items[i]);
    }
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  if (value.is_string()) return Value(std::move(text));
  return value.is_tuple() ? Value::Tuple(std::move(items)) : Value::List(std::move(items));
}

}  // namespace attune::jinja
