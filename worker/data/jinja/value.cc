#include "worker/data/jinja/value.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

constexpr size_t kNotFound = static_cast<size_t>(-1);
constexpr size_t kLinearItems = 8;  // dicts up to this size are searched linearly

absl::Status CheckSize(int nesting, int64_t weight) {
  if (nesting > kMaxNesting) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a value is nested more than ", kMaxNesting, " deep"));
  }
  if (weight > kMaxWeight) return absl::ResourceExhaustedError("a value is too large");
  return absl::OkStatus();
}

// Integers and floats compare exactly, as in Python; in doubles 2^53 + 1 would equal 2^53.
int CompareNumbers(const Value& a, const Value& b) {
  if (!a.is_float() && !b.is_float()) {
    return (a.AsInt() > b.AsInt()) - (a.AsInt() < b.AsInt());
  }
  const long double x = a.is_float() ? a.float_value() : static_cast<long double>(a.AsInt());
  const long double y = b.is_float() ? b.float_value() : static_cast<long double>(b.AsInt());
  if (std::isnan(x) || std::isnan(y)) return 2;  // neither
  return (x > y) - (x < y);
}

}  // namespace

size_t Dict::IndexOf(const Value& key) const {
  if (key.is_string() && items.size() > kLinearItems) {
    const auto it = string_keys_.find(key.string());
    return it == string_keys_.end() ? kNotFound : it->second;
  }
  for (size_t i = 0; i < items.size(); ++i) {
    if (Equal(items[i].first, key)) return i;
  }
  return kNotFound;
}

const Value* Dict::Find(const Value& key) const {
  const size_t i = IndexOf(key);
  return i == kNotFound ? nullptr : &items[i].second;
}

const Value* Dict::Find(absl::string_view key) const {
  if (items.size() > kLinearItems) {
    const auto it = string_keys_.find(key);
    return it == string_keys_.end() ? nullptr : &items[it->second].second;
  }
  for (const auto& [k, v] : items) {
    if (k.is_string() && k.string() == key) return &v;
  }
  return nullptr;
}

void Dict::Set(Value key, Value value) {
  nesting = std::max({nesting, key.nesting() + 1, value.nesting() + 1});
  weight += key.weight() + value.weight();
  if (const size_t i = IndexOf(key); i != kNotFound) {
    items[i].second = std::move(value);
    return;
  }
  if (key.is_string()) string_keys_.emplace(key.string(), items.size());
  items.emplace_back(std::move(key), std::move(value));
}

absl::StatusOr<Value> Value::OfSequence(std::vector<Value> items, bool tuple) {
  Sequence sequence{.items = std::move(items), .tuple = tuple};
  for (const Value& item : sequence.items) {
    sequence.nesting = std::max(sequence.nesting, item.nesting() + 1);
    sequence.weight += item.weight();
  }
  JINJA_RETURN_IF_ERROR(CheckSize(sequence.nesting, sequence.weight));
  Value value;
  value.data_ = std::make_shared<const Sequence>(std::move(sequence));
  return value;
}

absl::StatusOr<Value> Value::List(std::vector<Value> items) {
  return OfSequence(std::move(items), /*tuple=*/false);
}

absl::StatusOr<Value> Value::Tuple(std::vector<Value> items) {
  return OfSequence(std::move(items), /*tuple=*/true);
}

absl::StatusOr<Value> Value::Of(Dict dict) {
  JINJA_RETURN_IF_ERROR(CheckSize(dict.nesting, dict.weight));
  Value value;
  value.data_ = std::make_shared<const Dict>(std::move(dict));
  return value;
}

Value Value::UndefinedOf(std::string what) {
  return Value(Undefined{std::make_shared<const std::string>(std::move(what))});
}

absl::StatusOr<Value> Value::FromJson(const OrderedJson& json) {
  switch (json.type()) {
    case OrderedJson::value_t::boolean:
      return Value(json.get<bool>());
    case OrderedJson::value_t::number_integer:
      return Value(json.get<int64_t>());
    case OrderedJson::value_t::number_unsigned: {
      const uint64_t number = json.get<uint64_t>();
      if (number > static_cast<uint64_t>(INT64_MAX)) {
        return absl::InvalidArgumentError(
            absl::StrCat("the number ", number, " is beyond 2^63 - 1"));
      }
      return Value(static_cast<int64_t>(number));
    }
    case OrderedJson::value_t::number_float:
      return Value(json.get<double>());
    case OrderedJson::value_t::string:
      return Value(json.get_ref<const std::string&>());
    case OrderedJson::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const OrderedJson& element : json) {
        JINJA_ASSIGN(Value item, FromJson(element));
        items.push_back(std::move(item));
      }
      return List(std::move(items));
    }
    case OrderedJson::value_t::object: {
      Dict dict;
      dict.items.reserve(json.size());
      for (const auto& element : json.items()) {
        JINJA_ASSIGN(Value item, FromJson(element.value()));
        dict.Set(Value(element.key()), std::move(item));
      }
      return Of(std::move(dict));
    }
    default:
      return Value();
  }
}

absl::Status Value::UndefinedError() const {
  const auto& what = std::get<Undefined>(data_).what;
  return absl::InvalidArgumentError(what == nullptr ? "a value is undefined" : *what);
}

absl::string_view Value::TypeName() const {
  if (is_undefined()) return "Undefined";
  if (is_none()) return "NoneType";
  if (is_bool()) return "bool";
  if (is_int()) return "int";
  if (is_float()) return "float";
  if (is_string()) return "str";
  if (is_tuple()) return "tuple";
  if (is_sequence()) return "list";
  if (is_dict()) return "dict";
  if (is_namespace()) return "Namespace";
  return "function";
}

bool Value::Truth() const {
  if (is_undefined() || is_none()) return false;
  if (is_bool()) return bool_value();
  if (is_int()) return int_value() != 0;
  if (is_float()) return float_value() != 0;
  if (is_string()) return !string().empty();
  if (is_sequence()) return !sequence().items.empty();
  if (is_dict()) return !dict().items.empty();
  return true;
}

int Value::nesting() const {
  if (is_sequence()) return sequence().nesting;
  if (is_dict()) return dict().nesting;
  return 0;
}

int64_t Value::weight() const {
  if (is_sequence()) return sequence().weight;
  if (is_dict()) return dict().weight;
  if (is_string()) return 1 + static_cast<int64_t>(string().size() / 16);
  return 1;
}

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return CompareNumbers(a, b) == 0;
  if (a.is_string() && b.is_string()) return a.string() == b.string();
  if (a.is_sequence() && b.is_sequence()) {
    const auto& x = a.sequence();
    const auto& y = b.sequence();
    return x.tuple == y.tuple && x.items.size() == y.items.size() &&
           std::equal(x.items.begin(), x.items.end(), y.items.begin(), Equal);
  }
  if (a.is_dict() && b.is_dict()) {
    if (a.dict().items.size() != b.dict().items.size()) return false;
    for (const auto& [key, value] : a.dict().items) {
      const Value* other = b.dict().Find(key);
      if (other == nullptr || !Equal(value, *other)) return false;
    }
    return true;
  }
  if (a.is_namespace() && b.is_namespace()) return a.space() == b.space();
  if (a.is_function() && b.is_function()) return &a.function() == &b.function();
  return (a.is_none() && b.is_none()) || (a.is_undefined() && b.is_undefined());
}

absl::StatusOr<bool> Less(const Value& a, const Value& b) {
  if (a.is_undefined()) return a.UndefinedError();
  if (b.is_undefined()) return b.UndefinedError();
  if (a.is_number() && b.is_number()) return CompareNumbers(a, b) == -1;
  // The order of UTF-8 bytes is that of code points.
  if (a.is_string() && b.is_string()) return a.string() < b.string();
  if (a.is_sequence() && b.is_sequence() && a.sequence().tuple == b.sequence().tuple) {
    const auto& x = a.sequence().items;
    const auto& y = b.sequence().items;
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      if (!Equal(x[i], y[i])) return Less(x[i], y[i]);
    }
    return x.size() < y.size();
  }
  return absl::InvalidArgumentError(absl::StrCat("'<' is not supported between ", a.TypeName(),
                                                 " and ", b.TypeName()));
}

int64_t CountCodePoints(absl::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return !IsUtf8Continuation(c); });
}

bool IsPythonSpace(char32_t c) { return (c >= 0x1C && c <= 0x1F) || IsWhiteSpace(c); }

absl::StatusOr<std::vector<Value>> Elements(const Value& value) {
  std::vector<Value> elements;
  if (value.is_sequence()) return value.sequence().items;
  if (value.is_dict()) {
    elements.reserve(value.dict().items.size());
    for (const auto& item : value.dict().items) elements.push_back(item.first);
    return elements;
  }
  if (value.is_string()) {
    const absl::string_view text = value.string();
    for (size_t i = 0; i < text.size();) {
      const size_t begin = i;
      NextCodePoint(text, &i);
      elements.emplace_back(text.substr(begin, i - begin));
    }
    return elements;
  }
  if (value.is_undefined()) return elements;
  return absl::InvalidArgumentError(absl::StrCat("a ", value.TypeName(), " is not iterable"));
}

}  // namespace attune::jinja
