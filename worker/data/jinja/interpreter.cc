#include "worker/data/jinja/interpreter.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "worker/data/jinja/lexer.h"
#include "worker/data/jinja/status_macros.h"

namespace attune::jinja {
namespace {

// The variable `loop` in iteration i.
Value LoopVariable(std::shared_ptr<const std::vector<Value>> items, size_t i) {
  const auto call = [](Interpreter&, const Args&) -> absl::StatusOr<Value> {
    return absl::UnimplementedError("a recursive loop");
  };
  const auto attribute = [items = std::move(items), i](absl::string_view name) -> Value {
    const auto number = [](size_t n) { return Value(static_cast<int64_t>(n)); };
    const size_t n = items->size();
    if (name == "index0") return number(i);
    if (name == "index") return number(i + 1);
    if (name == "first") return Value(i == 0);
    if (name == "last") return Value(i + 1 == n);
    if (name == "length") return number(n);
    if (name == "revindex0") return number(n - i - 1);
    if (name == "revindex") return number(n - i);
    if (name == "depth") return number(1);
    if (name == "depth0") return number(0);
    if (name == "previtem") {
      return i > 0 ? (*items)[i - 1] : Value::UndefinedOf("there is no previous item");
    }
    if (name == "nextitem") {
      return i + 1 < n ? (*items)[i + 1] : Value::UndefinedOf("there is no next item");
    }
    if (name == "cycle") {
      return Value(std::make_shared<const Function>(
          Function{"cycle", [i](Interpreter&, const Args& args) -> absl::StatusOr<Value> {
                     if (args.positional.empty()) {
                       return absl::InvalidArgumentError("loop.cycle needs arguments");
                     }
                     return args.positional[i % args.positional.size()];
                   }}));
    }
    return Value::UndefinedOf(absl::StrCat("'loop' has no attribute '", name, "'"));
  };
  return Value(std::make_shared<const Function>(Function{"loop", call, attribute}));
}

}  // namespace

// Counts a level of recursion while it is alive.
class Interpreter::DepthGuard {
 public:
  explicit DepthGuard(int* depth) : depth_(depth) { ++*depth_; }
  ~DepthGuard() { --*depth_; }
  absl::Status Check() const {
    if (*depth_ <= kMaxRecursion) return absl::OkStatus();
    return absl::ResourceExhaustedError("the template recurses too deeply");
  }

 private:
  int* depth_;
};

void Interpreter::Scope::Set(int symbol, Value value) {
  for (auto& variable : variables) {
    if (variable.first == symbol) {
      variable.second = std::move(value);
      return;
    }
  }
  variables.emplace_back(symbol, std::move(value));
}

// A scope for one block. It is kept to the end of the run if a macro was defined in it.
class Interpreter::ScopeGuard {
 public:
  ScopeGuard(Interpreter* interpreter, Scope* parent)
      : interpreter_(interpreter), scope_(std::make_unique<Scope>()) {
    scope_->parent = parent;
  }
  ~ScopeGuard() { Retire(); }
  Scope* get() { return scope_.get(); }

  // Makes it a fresh scope with the same parent.
  void Reset() {
    Scope* parent = scope_->parent;
    if (!scope_->captured) {
      scope_->variables.clear();
      return;
    }
    Retire();
    scope_ = std::make_unique<Scope>();
    scope_->parent = parent;
  }

 private:
  void Retire() {
    if (!scope_->captured) return;
    // A macro looks names up through all the scopes around it.
    for (Scope* outer = scope_->parent; outer != nullptr; outer = outer->parent) {
      outer->captured = true;
    }
    interpreter_->kept_scopes_.push_back(std::move(scope_));
  }

  Interpreter* interpreter_;
  std::unique_ptr<Scope> scope_;
};

Interpreter::Interpreter(const Template* program, const RenderLimits& limits)
    : program_(program), limits_(limits), budget_(limits.work) {
  for (size_t i = 0; i < program->symbols.size(); ++i) {
    if (program->symbols[i] == "loop") loop_symbol_ = static_cast<int>(i);
  }
}

Interpreter::~Interpreter() = default;

void Interpreter::SetVariable(const std::string& name, Value value) {
  for (size_t i = 0; i < program_->symbols.size(); ++i) {
    if (program_->symbols[i] == name) root_.Set(static_cast<int>(i), std::move(value));
  }
}

Namespace* Interpreter::NewNamespace(Dict attributes) {
  namespaces_.push_back(Namespace{std::move(attributes)});
  return &namespaces_.back();
}

absl::Status Interpreter::Run(std::string* text, std::vector<ByteSpan>* generation) {
  output_ = text;
  generation_ = generation;
  absl::StatusOr<Flow> flow = Execute(program_->body, &root_, text);
  if (!flow.ok()) return AtLine(line_, flow.status());
  return absl::OkStatus();
}

absl::Status Interpreter::CheckOutput(const std::string& out) const {
  if (static_cast<int64_t>(out.size()) <= limits_.output_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the text is longer than ", limits_.output_bytes, " bytes"));
}

absl::StatusOr<Interpreter::Flow> Interpreter::Execute(const Block& block, Scope* scope,
                                                       std::string* out) {
  const DepthGuard depth(&depth_);
  JINJA_RETURN_IF_ERROR(depth.Check());
  for (const auto& stmt : block) {
    JINJA_RETURN_IF_ERROR(budget_.Charge(1));
    JINJA_ASSIGN(const Flow flow, ExecuteStmt(*stmt, scope, out));
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

absl::StatusOr<Interpreter::Flow> Interpreter::ExecuteStmt(const Stmt& stmt, Scope* scope,
                                                           std::string* out) {
  line_ = stmt.line;
  switch (stmt.kind) {
    case StmtKind::kText:
      JINJA_RETURN_IF_ERROR(budget_.Charge(static_cast<int64_t>(stmt.text.size() / 16)));
      out->append(stmt.text);
      JINJA_RETURN_IF_ERROR(CheckOutput(*out));
      return Flow::kNext;
    case StmtKind::kPrint: {
      JINJA_ASSIGN(const Value value, Eval(*stmt.expr, scope));
      JINJA_RETURN_IF_ERROR(budget_.Charge(value.weight()));
      JINJA_RETURN_IF_ERROR(AppendStr(value, out));
      JINJA_RETURN_IF_ERROR(CheckOutput(*out));
      return Flow::kNext;
    }
    case StmtKind::kIf:
      for (const auto& [condition, body] : stmt.branches) {
        if (condition != nullptr) {
          JINJA_ASSIGN(const Value value, Eval(*condition, scope));
          if (!value.Truth()) continue;
        }
        return Execute(body, scope, out);
      }
      return Flow::kNext;
    case StmtKind::kFor:
      return ExecuteFor(stmt, scope, out);
    case StmtKind::kSet: {
      JINJA_ASSIGN(Value value, Eval(*stmt.expr, scope));
      JINJA_RETURN_IF_ERROR(Assign(stmt.target, std::move(value), scope));
      return Flow::kNext;
    }
    case StmtKind::kSetBlock:
      JINJA_RETURN_IF_ERROR(ExecuteSetBlock(stmt, scope));
      return Flow::kNext;
    case StmtKind::kMacro:
      scope->Set(stmt.target.symbol, MakeMacro(stmt, scope));
      return Flow::kNext;
    case StmtKind::kGeneration:
      JINJA_RETURN_IF_ERROR(ExecuteGeneration(stmt, scope, out));
      return Flow::kNext;
    case StmtKind::kBreak:
      return Flow::kBreak;
    case StmtKind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

absl::Status Interpreter::ExecuteSetBlock(const Stmt& stmt, Scope* scope) {
  std::string text;
  {
    ScopeGuard inner(this, scope);
    JINJA_ASSIGN([[maybe_unused]] const Flow flow, Execute(stmt.body, inner.get(), &text));
  }
  Value value(std::move(text));
  JINJA_RETURN_IF_ERROR(budget_.Charge(value.weight()));
  if (stmt.expr != nullptr) {
    block_text_ = std::move(value);
    JINJA_ASSIGN(value, Eval(*stmt.expr, scope));
  }
  return Assign(stmt.target, std::move(value), scope);
}

absl::Status Interpreter::ExecuteGeneration(const Stmt& stmt, Scope* scope, std::string* out) {
  if (out != output_) {
    return absl::UnimplementedError(
        "{% generation %} inside a macro or a {% set %} block: its place in the text is not known");
  }
  if (in_generation_) return absl::InvalidArgumentError("{% generation %} inside itself");
  in_generation_ = true;
  const int64_t begin = static_cast<int64_t>(out->size());
  ScopeGuard inner(this, scope);
  JINJA_ASSIGN([[maybe_unused]] const Flow flow, Execute(stmt.body, inner.get(), out));
  generation_->push_back({begin, static_cast<int64_t>(out->size())});
  in_generation_ = false;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Value>> Interpreter::LoopItems(const Stmt& stmt, Scope* scope) {
  JINJA_ASSIGN(const Value iterable, Eval(*stmt.expr, scope));
  JINJA_RETURN_IF_ERROR(budget_.Charge(iterable.weight()));
  JINJA_ASSIGN(std::vector<Value> items, Elements(iterable));
  if (stmt.condition == nullptr) return items;
  std::vector<Value> kept;
  ScopeGuard inner(this, scope);
  for (Value& item : items) {
    inner.Reset();
    JINJA_RETURN_IF_ERROR(Assign(stmt.target, item, inner.get()));
    JINJA_ASSIGN(const Value keep, Eval(*stmt.condition, inner.get()));
    if (keep.Truth()) kept.push_back(std::move(item));
  }
  return kept;
}

absl::StatusOr<Interpreter::Flow> Interpreter::ExecuteFor(const Stmt& stmt, Scope* scope,
                                                          std::string* out) {
  JINJA_ASSIGN(std::vector<Value> list, LoopItems(stmt, scope));
  const auto items = std::make_shared<const std::vector<Value>>(std::move(list));
  ScopeGuard inner(this, scope);
  for (size_t i = 0; i < items->size(); ++i) {
    inner.Reset();
    if (loop_symbol_ >= 0) inner.get()->Set(loop_symbol_, LoopVariable(items, i));
    JINJA_RETURN_IF_ERROR(Assign(stmt.target, (*items)[i], inner.get()));
    JINJA_ASSIGN(const Flow flow, Execute(stmt.body, inner.get(), out));
    if (flow == Flow::kBreak) break;
  }
  if (items->empty()) return Execute(stmt.else_body, scope, out);
  return Flow::kNext;
}

absl::Status Interpreter::Assign(const Target& target, Value value, Scope* scope) {
  if (!target.attribute.empty()) {
    const Value space = Lookup(target.symbol, scope);
    if (!space.is_namespace()) {
      return absl::InvalidArgumentError(
          absl::StrCat("cannot assign to '", program_->symbols[target.symbol], ".",
                       target.attribute, "': it is no namespace"));
    }
    JINJA_RETURN_IF_ERROR(budget_.Charge(1));
    space.space()->attributes.Set(Value(absl::string_view(target.attribute)), std::move(value));
    return absl::OkStatus();
  }
  if (target.parts.empty()) {
    scope->Set(target.symbol, std::move(value));
    return absl::OkStatus();
  }
  if (value.is_undefined()) return value.UndefinedError();
  JINJA_ASSIGN(std::vector<Value> parts, Elements(value));
  if (parts.size() != target.parts.size()) {
    return absl::InvalidArgumentError(absl::StrCat("cannot unpack ", parts.size(), " values into ",
                                                   target.parts.size(), " names"));
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    JINJA_RETURN_IF_ERROR(Assign(target.parts[i], std::move(parts[i]), scope));
  }
  return absl::OkStatus();
}

Value Interpreter::MakeMacro(const Stmt& stmt, Scope* scope) {
  scope->captured = true;
  return Value(std::make_shared<const Function>(Function{
      stmt.text, [&stmt, scope](Interpreter& interpreter, const Args& args) {
        return interpreter.CallMacro(stmt, scope, args);
      }}));
}

absl::StatusOr<Value> Interpreter::CallMacro(const Stmt& stmt, Scope* definition,
                                             const Args& args) {
  if (args.positional.size() > stmt.parameters.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("macro '", stmt.text, "' takes not more than ", stmt.parameters.size(),
                     " argument(s)"));
  }
  ScopeGuard inner(this, definition);
  std::vector<bool> given(stmt.parameters.size());
  for (size_t i = 0; i < args.positional.size(); ++i) {
    inner.get()->Set(stmt.parameters[i].symbol, args.positional[i]);
    given[i] = true;
  }
  for (const auto& [name, value] : args.keywords) {
    const auto it = std::find_if(
        stmt.parameters.begin(), stmt.parameters.end(),
        [&, n = &name](const Stmt::Parameter& p) { return program_->symbols[p.symbol] == *n; });
    const size_t i = static_cast<size_t>(it - stmt.parameters.begin());
    if (it == stmt.parameters.end() || given[i]) {
      return absl::InvalidArgumentError(
          absl::StrCat("macro '", stmt.text, "' ",
                       it == stmt.parameters.end() ? "takes no keyword argument '"
                                                   : "got two values for '",
                       name, "'"));
    }
    inner.get()->Set(it->symbol, value);
    given[i] = true;
  }
  for (size_t i = 0; i < stmt.parameters.size(); ++i) {
    if (given[i]) continue;
    const Stmt::Parameter& parameter = stmt.parameters[i];
    Value value = Value::UndefinedOf(absl::StrCat("parameter '", program_->symbols[parameter.symbol],
                                                  "' was not provided"));
    if (parameter.default_value != nullptr) {
      JINJA_ASSIGN(value, Eval(*parameter.default_value, inner.get()));
    }
    inner.get()->Set(parameter.symbol, std::move(value));
  }
  std::string text;
  const int line = line_;
  JINJA_ASSIGN([[maybe_unused]] const Flow flow, Execute(stmt.body, inner.get(), &text));
  line_ = line;
  Value value(std::move(text));
  JINJA_RETURN_IF_ERROR(budget_.Charge(value.weight()));
  return value;
}

absl::StatusOr<Value> Interpreter::Call(const Value& function, const Args& args) {
  if (function.is_undefined()) return function.UndefinedError();
  if (!function.is_function() || function.function().call == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("a ", function.TypeName(), " is not callable"));
  }
  const DepthGuard depth(&depth_);
  JINJA_RETURN_IF_ERROR(depth.Check());
  return function.function().call(*this, args);
}

Value Interpreter::Lookup(int symbol, const Scope* scope) const {
  for (; scope != nullptr; scope = scope->parent) {
    for (const auto& variable : scope->variables) {
      if (variable.first == symbol) return variable.second;
    }
  }
  return Value::UndefinedOf(absl::StrCat("'", program_->symbols[symbol], "' is undefined"));
}

}  // namespace attune::jinja
