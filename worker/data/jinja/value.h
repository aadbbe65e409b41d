// Values of the template language: Python's, as far as chat templates use them.
//
// Immutable but for namespaces, so values share what they hold. Namespaces and macros belong to
// the interpreter that made them (a namespace may hold itself) and die with it. Nesting and weight
// are bounded, so that recursion over a value is safe and walking it ends: values share parts, and
// a list that holds one list twice, and so on, is small in memory but not to a walker.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/io/json.h"

namespace attune::jinja {

constexpr int kMaxNesting = 200;
constexpr int64_t kMaxWeight = 16 << 20;

class Value;
struct Function;

struct Undefined {
  std::shared_ptr<const std::string> what;  // for errors: "'x' is undefined"; may be null
};
struct None {};

struct Sequence {
  std::vector<Value> items;
  bool tuple = false;
  int nesting = 1;
  int64_t weight = 1;
};

// Keeps insertion order. Keys are strings, numbers, booleans, None, or tuples of these.
struct Dict {
  std::vector<std::pair<Value, Value>> items;
  int nesting = 1;
  int64_t weight = 1;

  const Value* Find(const Value& key) const;
  const Value* Find(absl::string_view key) const;
  // Replaces the value of an equal key, else appends.
  void Set(Value key, Value value);

 private:
  size_t IndexOf(const Value& key) const;
  absl::flat_hash_map<std::string, size_t> string_keys_;
};

struct Namespace;

class Value {
 public:
  Value() : data_(None{}) {}
  Value(None) : data_(None{}) {}
  Value(Undefined undefined) : data_(std::move(undefined)) {}
  explicit Value(bool value) : data_(value) {}
  explicit Value(int64_t value) : data_(value) {}
  explicit Value(double value) : data_(value) {}
  explicit Value(std::string value)
      : data_(std::make_shared<const std::string>(std::move(value))) {}
  explicit Value(absl::string_view value) : Value(std::string(value)) {}
  explicit Value(const char*) = delete;  // would be a bool
  explicit Value(std::shared_ptr<const Function> function) : data_(std::move(function)) {}
  explicit Value(Namespace* space) : data_(space) {}

  // RESOURCE_EXHAUSTED beyond kMaxNesting or kMaxWeight.
  static absl::StatusOr<Value> List(std::vector<Value> items);
  static absl::StatusOr<Value> Tuple(std::vector<Value> items);
  static absl::StatusOr<Value> Of(Dict dict);
  static Value UndefinedOf(std::string what);
  static absl::StatusOr<Value> FromJson(const OrderedJson& json);

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_string() const { return std::holds_alternative<StringPtr>(data_); }
  bool is_sequence() const { return std::holds_alternative<SequencePtr>(data_); }
  bool is_list() const { return is_sequence() && !sequence().tuple; }
  bool is_tuple() const { return is_sequence() && sequence().tuple; }
  bool is_dict() const { return std::holds_alternative<DictPtr>(data_); }
  bool is_namespace() const { return std::holds_alternative<Namespace*>(data_); }
  bool is_function() const { return std::holds_alternative<FunctionPtr>(data_); }

  bool bool_value() const { return std::get<bool>(data_); }
  int64_t int_value() const { return std::get<int64_t>(data_); }
  double float_value() const { return std::get<double>(data_); }
  const std::string& string() const { return *std::get<StringPtr>(data_); }
  const Sequence& sequence() const { return *std::get<SequencePtr>(data_); }
  const Dict& dict() const { return *std::get<DictPtr>(data_); }
  Namespace* space() const { return std::get<Namespace*>(data_); }
  const Function& function() const { return *std::get<FunctionPtr>(data_); }
  // The error of using an undefined value.
  absl::Status UndefinedError() const;

  // bool or int as an integer; CHECKs is_bool() || is_int().
  int64_t AsInt() const { return is_bool() ? bool_value() : int_value(); }
  // Any number.
  double AsDouble() const { return is_float() ? float_value() : static_cast<double>(AsInt()); }

  // Python's name of the type, for errors.
  absl::string_view TypeName() const;
  bool Truth() const;
  int nesting() const;
  // What a walk over the value meets: one per value and per 16 bytes of text.
  int64_t weight() const;

 private:
  static absl::StatusOr<Value> OfSequence(std::vector<Value> items, bool tuple);
  using StringPtr = std::shared_ptr<const std::string>;
  using SequencePtr = std::shared_ptr<const Sequence>;
  using DictPtr = std::shared_ptr<const Dict>;
  using FunctionPtr = std::shared_ptr<const Function>;
  using Data = std::variant<None, Undefined, bool, int64_t, double, StringPtr, SequencePtr, DictPtr,
                            Namespace*, FunctionPtr>;
  Data data_;
};

struct Namespace {
  Dict attributes;
};

// a == b; of different types false, numbers by value.
bool Equal(const Value& a, const Value& b);
// a < b. INVALID_ARGUMENT for values without an order between them.
absl::StatusOr<bool> Less(const Value& a, const Value& b);

// Python's str() and repr(). `out` grows by the text. Namespaces and functions are
// INVALID_ARGUMENT: no template prints them on purpose.
absl::Status AppendStr(const Value& value, std::string* out);
absl::Status AppendRepr(const Value& value, std::string* out);
absl::StatusOr<std::string> Str(const Value& value);
std::string FloatRepr(double value);

struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  bool multi_line = false;        // an indent was given
  std::string indent;             // of one level
  std::string item_separator = ", ";
  std::string key_separator = ": ";
};
// Python's json.dumps. INVALID_ARGUMENT for what JSON cannot hold.
absl::Status AppendJson(const Value& value, const JsonStyle& style, int level, std::string* out);

// Code points of a string.
int64_t CountCodePoints(absl::string_view text);
// Python's str.isspace of one code point.
bool IsPythonSpace(char32_t c);

// Elements as a for loop sees them: of sequences, keys of dicts, characters of strings; none of
// undefined. INVALID_ARGUMENT for the rest.
absl::StatusOr<std::vector<Value>> Elements(const Value& value);

}  // namespace attune::jinja
