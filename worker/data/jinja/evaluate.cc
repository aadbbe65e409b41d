// Expressions of the interpreter.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "worker/data/jinja/interpreter.h"
#include "worker/data/jinja/status_macros.h"

namespace attune::jinja {
namespace {

bool Hashable(const Value& value) {
  if (value.is_tuple()) {
    const auto& items = value.sequence().items;
    return std::all_of(items.begin(), items.end(), Hashable);
  }
  return !value.is_list() && !value.is_dict();
}

}  // namespace

absl::StatusOr<Value> Interpreter::Eval(const Expr& expr, Scope* scope) {
  JINJA_RETURN_IF_ERROR(budget_.Charge(1));
  if (expr.kind == ExprKind::kConst) return expr.value;
  if (expr.kind == ExprKind::kName) return Lookup(expr.symbol, scope);
  line_ = expr.line;
  if (++depth_ > kMaxRecursion) {
    return absl::ResourceExhaustedError("the template recurses too deeply");
  }
  absl::StatusOr<Value> value = EvalCompound(expr, scope);
  --depth_;
  return value;
}

absl::StatusOr<Value> Interpreter::EvalCompound(const Expr& expr, Scope* scope) {
  switch (expr.kind) {
    case ExprKind::kList:
    case ExprKind::kTuple: {
      std::vector<Value> items;
      items.reserve(expr.args.size());
      for (const ExprPtr& arg : expr.args) {
        JINJA_ASSIGN(Value item, Eval(*arg, scope));
        items.push_back(std::move(item));
      }
      return expr.kind == ExprKind::kList ? Value::List(std::move(items))
                                          : Value::Tuple(std::move(items));
    }
    case ExprKind::kDict:
      return EvalDict(expr, scope);
    case ExprKind::kAttribute: {
      JINJA_ASSIGN(const Value object, Eval(*expr.args[0], scope));
      return Attribute(object, expr.text);
    }
    case ExprKind::kIndex: {
      JINJA_ASSIGN(const Value object, Eval(*expr.args[0], scope));
      JINJA_ASSIGN(const Value key, Eval(*expr.args[1], scope));
      if (object.is_string()) JINJA_RETURN_IF_ERROR(budget_.Charge(object.weight()));
      return Index(object, key);
    }
    case ExprKind::kSlice:
      return EvalSlice(expr, scope);
    case ExprKind::kCall: {
      JINJA_ASSIGN(const Value function, Eval(*expr.args[0], scope));
      JINJA_ASSIGN(const Args args, EvalArgs(expr, scope));
      line_ = expr.line;
      return Call(function, args);
    }
    case ExprKind::kFilter: {
      // The first filter of a {% set %} block has the block's text before it.
      Value value = block_text_;
      if (expr.args[0] != nullptr) {
        JINJA_ASSIGN(value, Eval(*expr.args[0], scope));
      }
      JINJA_ASSIGN(const Args args, EvalArgs(expr, scope));
      line_ = expr.line;
      JINJA_RETURN_IF_ERROR(budget_.Charge(value.weight()));
      return ApplyFilter(*this, expr.text, value, args);
    }
    case ExprKind::kTest: {
      JINJA_ASSIGN(const Value value, Eval(*expr.args[0], scope));
      JINJA_ASSIGN(const Args args, EvalArgs(expr, scope));
      JINJA_ASSIGN(const bool result, ApplyTest(*this, expr.text, value, args));
      return Value(result);
    }
    case ExprKind::kUnary:
      return EvalUnary(expr, scope);
    case ExprKind::kBinary: {
      JINJA_ASSIGN(const Value a, Eval(*expr.args[0], scope));
      JINJA_ASSIGN(const Value b, Eval(*expr.args[1], scope));
      return Binary(expr.text, a, b, &budget_);
    }
    case ExprKind::kCompare:
      return EvalCompare(expr, scope);
    case ExprKind::kAnd:
    case ExprKind::kOr: {
      JINJA_ASSIGN(Value left, Eval(*expr.args[0], scope));
      if (left.Truth() == (expr.kind == ExprKind::kOr)) return left;
      return Eval(*expr.args[1], scope);
    }
    case ExprKind::kCondition: {
      JINJA_ASSIGN(const Value condition, Eval(*expr.args[1], scope));
      if (condition.Truth()) return Eval(*expr.args[0], scope);
      if (expr.args[2] != nullptr) return Eval(*expr.args[2], scope);
      return Value::UndefinedOf(
          "the inline if-expression evaluated to false and no else section was defined");
    }
    default:
      return absl::InternalError("an expression of unknown kind");
  }
}

absl::StatusOr<Value> Interpreter::EvalDict(const Expr& expr, Scope* scope) {
  Dict dict;
  for (size_t i = 0; i < expr.args.size(); i += 2) {
    JINJA_ASSIGN(Value key, Eval(*expr.args[i], scope));
    JINJA_ASSIGN(Value value, Eval(*expr.args[i + 1], scope));
    if (!Hashable(key)) {
      return absl::InvalidArgumentError(absl::StrCat("a ", key.TypeName(), " cannot be a key"));
    }
    dict.Set(std::move(key), std::move(value));
  }
  return Value::Of(std::move(dict));
}

absl::StatusOr<Value> Interpreter::EvalSlice(const Expr& expr, Scope* scope) {
  JINJA_ASSIGN(const Value object, Eval(*expr.args[0], scope));
  Value bounds[3];
  for (int i = 0; i < 3; ++i) {
    if (expr.args[i + 1] == nullptr) continue;
    JINJA_ASSIGN(bounds[i], Eval(*expr.args[i + 1], scope));
  }
  return Slice(object, bounds[0], bounds[1], bounds[2], &budget_);
}

absl::StatusOr<Value> Interpreter::EvalUnary(const Expr& expr, Scope* scope) {
  JINJA_ASSIGN(const Value value, Eval(*expr.args[0], scope));
  if (expr.text == "not") return Value(!value.Truth());
  if (value.is_undefined()) return value.UndefinedError();
  if (!value.is_number()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a ", value.TypeName(), " has no sign ", expr.text));
  }
  if (value.is_float()) {
    return Value(expr.text == "-" ? -value.float_value() : value.float_value());
  }
  int64_t result = value.AsInt();
  if (expr.text == "-" && __builtin_sub_overflow(int64_t{0}, result, &result)) {
    return absl::InvalidArgumentError("an integer overflows");
  }
  return Value(result);
}

absl::StatusOr<Value> Interpreter::EvalCompare(const Expr& expr, Scope* scope) {
  JINJA_ASSIGN(Value left, Eval(*expr.args[0], scope));
  for (size_t i = 0; i < expr.operators.size(); ++i) {
    JINJA_ASSIGN(Value right, Eval(*expr.args[i + 1], scope));
    JINJA_ASSIGN(const bool holds, Compare(expr.operators[i], left, right, &budget_));
    if (!holds) return Value(false);
    left = std::move(right);
  }
  return Value(true);
}

absl::StatusOr<Args> Interpreter::EvalArgs(const Expr& expr, Scope* scope) {
  Args args;
  for (size_t i = 1; i < expr.args.size(); ++i) {
    JINJA_ASSIGN(Value value, Eval(*expr.args[i], scope));
    args.positional.push_back(std::move(value));
  }
  if (expr.star_args != nullptr) {
    JINJA_ASSIGN(const Value value, Eval(*expr.star_args, scope));
    JINJA_RETURN_IF_ERROR(budget_.Charge(value.weight()));
    JINJA_ASSIGN(const std::vector<Value> items, Elements(value));
    args.positional.insert(args.positional.end(), items.begin(), items.end());
  }
  for (const auto& [name, keyword] : expr.keywords) {
    JINJA_ASSIGN(Value value, Eval(*keyword, scope));
    args.keywords.emplace_back(name, std::move(value));
  }
  if (expr.star_kwargs != nullptr) {
    JINJA_ASSIGN(const Value value, Eval(*expr.star_kwargs, scope));
    if (!value.is_dict()) {
      return absl::InvalidArgumentError(absl::StrCat("** of a ", value.TypeName()));
    }
    JINJA_RETURN_IF_ERROR(budget_.Charge(value.weight()));
    for (const auto& [key, item] : value.dict().items) {
      if (!key.is_string()) return absl::InvalidArgumentError("** needs keys that are strings");
      args.keywords.emplace_back(key.string(), item);
    }
  }
  return args;
}

}  // namespace attune::jinja
