// JSON files and lines: parsing with errors that name file, line and column, and typed access
// whose errors name the key.
//
//   ParseJson("{\"a\": [1, }", "config.json")  ->  config.json:1:11: unexpected '}' ...
//   JsonField(root, "config.json").Get("rope_scaling").Get("factor").Double()
//     ->  config.json: rope_scaling.factor is a string ("x"), but a number is needed
//
// Json keeps its keys sorted: for large files. OrderedJson keeps the order of the file and looks
// keys up linearly: for small objects that are shown to a template.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/io/file.h"

namespace attune {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

// A second value under one key: take it, as Python does, or refuse the text.
enum class DuplicateKeys : uint8_t { kLastWins, kReject };

struct JsonOptions {
  DuplicateKeys duplicate_keys = DuplicateKeys::kLastWins;
  int max_depth = 128;
  int64_t first_line = 1;      // number of the text's first line in the errors
  int64_t max_keys = 1 << 24;  // in one object
};

// `source` names the text in errors ("model/config.json"). Invalid UTF-8, anything after the
// value, and nesting beyond max_depth are INVALID_ARGUMENT.
absl::StatusOr<Json> ParseJson(absl::string_view text, absl::string_view source,
                               const JsonOptions& options = {});
absl::StatusOr<OrderedJson> ParseOrderedJson(absl::string_view text, absl::string_view source,
                                             const JsonOptions& options = {});

absl::StatusOr<Json> ReadJsonFile(const std::string& path,
                                  int64_t limit_bytes = kReadFileLimitBytes);

// A place in a parsed value, or the lack of one. Cheap; valid as long as the value.
class JsonField {
 public:
  JsonField(const Json& root, absl::string_view source) : value_(&root), source_(source) {}

  // A member. Of something that is not there, or that is no object: not there.
  JsonField Get(absl::string_view key) const;
  // Element i of an array.
  JsonField At(size_t i) const;

  // False for a key that is missing or null.
  bool has_value() const { return value_ != nullptr && !value_->is_null(); }
  const Json* json() const { return value_; }
  const std::string& path() const { return path_; }

  // INVALID_ARGUMENT if missing, or of another type. Int takes integers (and doubles without a
  // fraction) that fit int64.
  absl::StatusOr<bool> Bool() const;
  absl::StatusOr<int64_t> Int() const;
  absl::StatusOr<double> Double() const;
  absl::StatusOr<std::string> String() const;
  absl::StatusOr<const Json*> Array() const;
  absl::StatusOr<const Json*> Object() const;
  absl::StatusOr<std::vector<int64_t>> IntArray() const;

  // The same with a default for what is missing or null; another type stays an error.
  absl::StatusOr<bool> BoolOr(bool fallback) const;
  absl::StatusOr<int64_t> IntOr(int64_t fallback) const;
  absl::StatusOr<double> DoubleOr(double fallback) const;
  absl::StatusOr<std::string> StringOr(absl::string_view fallback) const;

  // INVALID_ARGUMENT at this place: "<source>: <path> <what>".
  absl::Status Error(absl::string_view what) const;

 private:
  JsonField(const Json* value, std::string source, std::string path)
      : value_(value), source_(std::move(source)), path_(std::move(path)) {}
  absl::Status TypeError(absl::string_view needed) const;

  const Json* value_;
  std::string source_;
  std::string path_;
};

}  // namespace attune
