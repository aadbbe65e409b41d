// What templates can call: operators, filters, tests, methods of values, global functions.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/civil_time.h"
#include "worker/data/jinja/value.h"

namespace attune::jinja {

class Interpreter;

// Arguments of a call.
struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keywords;

  // Argument i or the keyword; null if neither is there.
  const Value* Get(size_t i, absl::string_view keyword) const;
  // INVALID_ARGUMENT if there are more positional arguments, or keywords outside the list.
  absl::Status Check(absl::string_view function, size_t max_positional,
                     std::initializer_list<absl::string_view> keywords) const;
};

// Typed arguments with a default; INVALID_ARGUMENT for another type.
absl::StatusOr<int64_t> IntArg(const Value* value, int64_t fallback, absl::string_view what);
absl::StatusOr<std::string> StringArg(const Value* value, absl::string_view fallback,
                                      absl::string_view what);
bool TruthArg(const Value* value, bool fallback);

struct Function {
  std::string name;
  std::function<absl::StatusOr<Value>(Interpreter&, const Args&)> call;
  // Attributes, for the variable `loop`; may be empty.
  std::function<Value(absl::string_view)> attribute = nullptr;
};

// Bounds the work of one Render. Everything that makes or walks values pays for it.
class Budget {
 public:
  explicit Budget(int64_t work) : left_(work) {}
  // RESOURCE_EXHAUSTED when nothing is left.
  absl::Status Charge(int64_t work) {
    left_ -= work;
    if (left_ >= 0) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        "the template does not come to an end: it passed the limit of work for a conversation of "
        "this size");
  }

 private:
  int64_t left_;
};

// a op b for + - * / // % ** ~
absl::StatusOr<Value> Binary(absl::string_view op, const Value& a, const Value& b, Budget* budget);
// == != < <= > >= in, and "not in"
absl::StatusOr<bool> Compare(absl::string_view op, const Value& a, const Value& b, Budget* budget);
absl::StatusOr<bool> Contains(const Value& container, const Value& item);

// value.name: methods come before keys. value[key]: keys come before methods. Undefined if there is
// neither.
absl::StatusOr<Value> Attribute(const Value& value, const std::string& name);
absl::StatusOr<Value> Index(const Value& value, const Value& key);
// value[begin:end:step]; None where left out.
absl::StatusOr<Value> Slice(const Value& value, const Value& begin, const Value& end,
                            const Value& step, Budget* budget);

// The method `name` of a string, dict or list; null if the type has no such method.
std::shared_ptr<const Function> FindMethod(const Value& self, const std::string& name);

bool IsFilter(absl::string_view name);
bool IsTest(absl::string_view name);
absl::StatusOr<Value> ApplyFilter(Interpreter& interpreter, const std::string& name,
                                  const Value& value, const Args& args);
absl::StatusOr<bool> ApplyTest(Interpreter& interpreter, const std::string& name,
                               const Value& value, const Args& args);

// namespace, dict, range, raise_exception, strftime_now.
std::vector<std::pair<std::string, Value>> Globals(std::function<absl::CivilSecond()> clock);

// Python's string methods that filters share.
std::string StripChars(absl::string_view text, const std::string* chars, bool left, bool right);
std::string Capitalize(absl::string_view text);
std::string TitleWords(absl::string_view text);   // str.title
std::string TitleFilter(absl::string_view text);  // the filter, which splits at spaces, -, ( ...
std::string ReplaceAll(absl::string_view text, absl::string_view from, absl::string_view to,
                       int64_t count);

}  // namespace attune::jinja
