// Runs a template over variables.
//
// The sandbox: a template reaches its variables, the functions of builtins.h and nothing else. It
// cannot change what it was given. Work, recursion and output are bounded.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/data/jinja/ast.h"
#include "worker/data/jinja/builtins.h"
#include "worker/data/jinja/value.h"
#include "worker/data/tokenizer.h"

namespace attune::jinja {

struct RenderLimits {
  int64_t work = 20'000'000;
  int64_t output_bytes = 256 << 20;
};

class Interpreter {
 public:
  // The template must outlive the interpreter.
  Interpreter(const Template* program, const RenderLimits& limits);
  ~Interpreter();

  void SetVariable(const std::string& name, Value value);

  // Appends the text and the spans of `generation` blocks in it. Errors say the line.
  absl::Status Run(std::string* text, std::vector<ByteSpan>* generation);

  // For builtins.
  absl::StatusOr<Value> Call(const Value& function, const Args& args);
  Namespace* NewNamespace(Dict attributes);
  Budget& budget() { return budget_; }

 private:
  // Variables of a block, the inner ones before those of `parent`.
  struct Scope {
    Scope* parent = nullptr;
    std::vector<std::pair<int, Value>> variables;
    bool captured = false;  // a macro was defined here, and may outlive the block
    void Set(int symbol, Value value);
  };
  class ScopeGuard;
  class DepthGuard;
  // Levels of Eval and Execute; a macro that calls itself uses about ten a call.
  static constexpr int kMaxRecursion = 700;
  enum class Flow : uint8_t { kNext, kBreak, kContinue };

  absl::StatusOr<Flow> Execute(const Block& block, Scope* scope, std::string* out);
  absl::StatusOr<Flow> ExecuteStmt(const Stmt& stmt, Scope* scope, std::string* out);
  absl::StatusOr<Flow> ExecuteFor(const Stmt& stmt, Scope* scope, std::string* out);
  absl::Status ExecuteGeneration(const Stmt& stmt, Scope* scope, std::string* out);
  absl::Status ExecuteSetBlock(const Stmt& stmt, Scope* scope);
  absl::StatusOr<std::vector<Value>> LoopItems(const Stmt& stmt, Scope* scope);
  absl::Status Assign(const Target& target, Value value, Scope* scope);
  Value MakeMacro(const Stmt& stmt, Scope* scope);
  absl::StatusOr<Value> CallMacro(const Stmt& stmt, Scope* definition, const Args& args);

  absl::StatusOr<Value> Eval(const Expr& expr, Scope* scope);
  absl::StatusOr<Value> EvalCompound(const Expr& expr, Scope* scope);
  absl::StatusOr<Value> EvalDict(const Expr& expr, Scope* scope);
  absl::StatusOr<Value> EvalSlice(const Expr& expr, Scope* scope);
  absl::StatusOr<Value> EvalUnary(const Expr& expr, Scope* scope);
  absl::StatusOr<Value> EvalCompare(const Expr& expr, Scope* scope);
  absl::StatusOr<Args> EvalArgs(const Expr& expr, Scope* scope);
  Value Lookup(int symbol, const Scope* scope) const;
  absl::Status CheckOutput(const std::string& out) const;

  const Template* program_;
  RenderLimits limits_;
  Budget budget_;
  int line_ = 0;   // of what runs now, for errors
  int depth_ = 0;  // of the recursion of Eval and Execute
  int loop_symbol_ = -1;
  Scope root_;
  std::deque<Namespace> namespaces_;
  std::vector<std::unique_ptr<Scope>> kept_scopes_;  // captured ones, until the end
  std::string* output_ = nullptr;
  std::vector<ByteSpan>* generation_ = nullptr;
  bool in_generation_ = false;
  Value block_text_;  // of the {% set %} block whose filters run now
};

}  // namespace attune::jinja
