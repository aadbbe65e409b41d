#include "worker/io/json.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace attune {
namespace {

// Builds a value from nlohmann's SAX events, within limits. The library's own builder looks an
// ordered key up linearly each time, which a hostile object makes quadratic.
template <typename J>
class JsonBuilder : public nlohmann::json_sax<J> {
 public:
  using typename nlohmann::json_sax<J>::number_integer_t;
  using typename nlohmann::json_sax<J>::number_unsigned_t;
  using typename nlohmann::json_sax<J>::number_float_t;
  using typename nlohmann::json_sax<J>::string_t;
  using typename nlohmann::json_sax<J>::binary_t;

  explicit JsonBuilder(const JsonOptions& options) : options_(options) {}

  bool null() override { return Add(J(nullptr)) != nullptr; }
  bool boolean(bool value) override { return Add(J(value)) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(J(value)) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(J(value)) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    return Add(J(value)) != nullptr;
  }
  bool string(string_t& value) override { return Add(J(std::move(value))) != nullptr; }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return Open(J::object()); }
  bool start_array(std::size_t) override { return Open(J::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    Frame& frame = stack_.back();
    auto& object = frame.value->template get_ref<typename J::object_t&>();
    if (static_cast<int64_t>(object.size()) >= options_.max_keys) {
      return Fail("an object has too many keys");
    }
    if constexpr (std::is_same_v<J, OrderedJson>) {
      if (const auto it = frame.places.find(name); it != frame.places.end()) {
        if (options_.duplicate_keys == DuplicateKeys::kReject) return DuplicateKey(name);
        frame.next = &(object.begin() + it->second)->second;
        return true;
      }
      frame.places.emplace(name, object.size());
      // The container beneath appends; ordered_map's own insertion would search first.
      using Pairs = typename J::object_t::Container;
      static_cast<Pairs&>(object).emplace_back(std::move(name), J());
      frame.next = &object.back().second;
    } else {
      const auto [it, inserted] = object.try_emplace(std::move(name));
      if (!inserted && options_.duplicate_keys == DuplicateKeys::kReject) {
        return DuplicateKey(it->first);
      }
      frame.next = &it->second;
    }
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    position_ = position;
    message_ = error.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 5: what we want"
    if (const size_t colon = message_.find(": "); colon != std::string::npos) {
      message_.erase(0, colon + 2);
    }
    return false;
  }

  J& root() { return root_; }
  const std::string& message() const { return message_; }
  std::size_t position() const { return position_; }  // 1-based; 0: not known

 private:
  struct Frame {
    J* value;
    J* next = nullptr;  // where the value of the last key goes
    absl::flat_hash_map<std::string, size_t> places;
  };

  bool Fail(std::string message) {
    message_ = std::move(message);
    return false;
  }
  bool DuplicateKey(const std::string& name) {
    return Fail(absl::StrCat("the key \"", absl::Utf8SafeCEscape(name), "\" is there twice"));
  }

  J* Add(J value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Frame& frame = stack_.back();
    if (frame.value->is_array()) {
      auto& array = frame.value->template get_ref<typename J::array_t&>();
      array.push_back(std::move(value));
      return &array.back();
    }
    *frame.next = std::move(value);
    return frame.next;
  }

  bool Open(J container) {
    if (static_cast<int>(stack_.size()) >= options_.max_depth) {
      return Fail(absl::StrCat("nested more than ", options_.max_depth, " deep"));
    }
    stack_.push_back(Frame{.value = Add(std::move(container))});
    return true;
  }
  bool Close() {
    stack_.pop_back();
    return true;
  }

  const JsonOptions& options_;
  J root_;
  std::vector<Frame> stack_;
  std::string message_;
  std::size_t position_ = 0;
};

// Line and column (both from 1, columns in bytes) of the byte before which `position` bytes lie.
std::string Place(absl::string_view text, std::size_t position, int64_t first_line) {
  position = std::min(position, text.size());
  const absl::string_view before = text.substr(0, position);
  const int64_t line = first_line + std::count(before.begin(), before.end(), '\n');
  const size_t newline = before.rfind('\n');
  const size_t column = newline == absl::string_view::npos ? position : position - newline - 1;
  return absl::StrCat(line, ":", column + 1);
}

template <typename J>
absl::StatusOr<J> Parse(absl::string_view text, absl::string_view source,
                        const JsonOptions& options) {
  JsonBuilder<J> builder(options);
  // A byte order mark is skipped by the library; positions stay those of the text.
  const bool ok = J::sax_parse(text.begin(), text.end(), &builder);
  if (ok) return std::move(builder.root());
  std::string place = absl::StrCat(options.first_line);
  if (builder.position() > 0) place = Place(text, builder.position() - 1, options.first_line);
  // The library quotes the bytes that it read last, which may be no UTF-8.
  return absl::InvalidArgumentError(absl::StrCat(
      source, ":", place, ": not valid JSON: ", absl::Utf8SafeCHexEscape(builder.message())));
}

absl::string_view KindOf(const Json& value) {
  if (value.is_number()) return "number";
  return value.type_name();
}

}  // namespace

absl::StatusOr<Json> ParseJson(absl::string_view text, absl::string_view source,
                               const JsonOptions& options) {
  return Parse<Json>(text, source, options);
}

absl::StatusOr<OrderedJson> ParseOrderedJson(absl::string_view text, absl::string_view source,
                                             const JsonOptions& options) {
  return Parse<OrderedJson>(text, source, options);
}

absl::StatusOr<Json> ReadJsonFile(const std::string& path, int64_t limit_bytes) {
  absl::StatusOr<std::string> text = ReadFile(path, limit_bytes);
  if (!text.ok()) return text.status();
  return ParseJson(*text, path);
}

JsonField JsonField::Get(absl::string_view key) const {
  const Json* member = nullptr;
  if (value_ != nullptr && value_->is_object()) {
    const auto it = value_->find(std::string(key));
    if (it != value_->end()) member = &*it;
  }
  return JsonField(member, source_, absl::StrCat(path_, path_.empty() ? "" : ".", key));
}

JsonField JsonField::At(size_t i) const {
  const Json* element = nullptr;
  if (value_ != nullptr && value_->is_array() && i < value_->size()) element = &(*value_)[i];
  return JsonField(element, source_, absl::StrCat(path_, "[", i, "]"));
}

absl::Status JsonField::Error(absl::string_view what) const {
  return absl::InvalidArgumentError(
      absl::StrCat(source_, ": ", path_.empty() ? "the whole value" : path_, " ", what));
}

absl::Status JsonField::TypeError(absl::string_view needed) const {
  if (value_ == nullptr) return Error(absl::StrCat("is missing: ", needed, " is needed"));
  std::string shown;
  if (value_->is_primitive()) {
    shown = value_->dump(-1, ' ', true, Json::error_handler_t::replace);
    if (shown.size() > 60) shown = absl::StrCat(shown.substr(0, 60), "...");
    shown = absl::StrCat(" (", shown, ")");
  }
  return Error(absl::StrCat("is a ", KindOf(*value_), shown, ", but ", needed, " is needed"));
}

absl::StatusOr<bool> JsonField::Bool() const {
  if (value_ == nullptr || !value_->is_boolean()) return TypeError("true or false");
  return value_->get<bool>();
}

absl::StatusOr<int64_t> JsonField::Int() const {
  if (value_ != nullptr && value_->is_number_unsigned()) {
    const uint64_t value = value_->get<uint64_t>();
    if (value <= static_cast<uint64_t>(INT64_MAX)) return static_cast<int64_t>(value);
  } else if (value_ != nullptr && value_->is_number_integer()) {
    return value_->get<int64_t>();
  } else if (value_ != nullptr && value_->is_number_float()) {
    const double value = value_->get<double>();
    if (value == std::floor(value) && std::abs(value) < 9.0e18) return static_cast<int64_t>(value);
  }
  return TypeError("an integer");
}

absl::StatusOr<double> JsonField::Double() const {
  if (value_ == nullptr || !value_->is_number()) return TypeError("a number");
  return value_->get<double>();
}

absl::StatusOr<std::string> JsonField::String() const {
  if (value_ == nullptr || !value_->is_string()) return TypeError("a string");
  return value_->get<std::string>();
}

absl::StatusOr<const Json*> JsonField::Array() const {
  if (value_ == nullptr || !value_->is_array()) return TypeError("an array");
  return value_;
}

absl::StatusOr<const Json*> JsonField::Object() const {
  if (value_ == nullptr || !value_->is_object()) return TypeError("an object");
  return value_;
}

absl::StatusOr<std::vector<int64_t>> JsonField::IntArray() const {
  absl::StatusOr<const Json*> array = Array();
  if (!array.ok()) return array.status();
  std::vector<int64_t> values;
  values.reserve((*array)->size());
  for (size_t i = 0; i < (*array)->size(); ++i) {
    absl::StatusOr<int64_t> value = At(i).Int();
    if (!value.ok()) return value.status();
    values.push_back(*value);
  }
  return values;
}

absl::StatusOr<bool> JsonField::BoolOr(bool fallback) const {
  if (!has_value()) return fallback;
  return Bool();
}

absl::StatusOr<int64_t> JsonField::IntOr(int64_t fallback) const {
  if (!has_value()) return fallback;
  return Int();
}

absl::StatusOr<double> JsonField::DoubleOr(double fallback) const {
  if (!has_value()) return fallback;
  return Double();
}

absl::StatusOr<std::string> JsonField::StringOr(absl::string_view fallback) const {
  if (!has_value()) return std::string(fallback);
  return String();
}

}  // namespace attune
