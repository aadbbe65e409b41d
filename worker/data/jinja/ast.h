// The syntax tree of a template. Names are interned: `symbol` indexes Template::symbols.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "worker/data/jinja/value.h"

namespace attune::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

enum class ExprKind : uint8_t {
  kConst,      // value
  kName,       // symbol
  kList,       // args
  kTuple,      // args
  kDict,       // args: key, value, key, value, ...
  kAttribute,  // args[0].text
  kIndex,      // args[0][args[1]]
  kSlice,      // args[0][args[1]:args[2]:args[3]]; null where left out
  kCall,       // args[0](args[1...], keywords)
  kFilter,     // args[0] | text(args[1...], keywords); args[0] null: the text of a block
  kTest,       // args[0] is text(args[1...], keywords)
  kUnary,      // text args[0]: "-", "+", "not"
  kBinary,     // args[0] text args[1]: arithmetic and "~"
  kCompare,    // args[0] operators[0] args[1] operators[1] args[2] ...
  kAnd,        // args[0] and args[1]
  kOr,
  kCondition,  // args[0] if args[1] else args[2]; args[2] null: undefined
};

struct Expr {
  ExprKind kind = ExprKind::kConst;
  int line = 0;
  int depth = 1;  // of the tree beneath, for the limit on recursion
  int symbol = -1;
  std::string text;
  Value value;
  std::vector<ExprPtr> args;
  std::vector<std::string> operators;
  std::vector<std::pair<std::string, ExprPtr>> keywords;
  ExprPtr star_args;    // *x of a call
  ExprPtr star_kwargs;  // **x of a call
};

struct Stmt;
using Block = std::vector<std::unique_ptr<Stmt>>;

// What is assigned to: a name, ns.attribute, or a tuple of targets.
struct Target {
  int symbol = -1;
  std::string attribute;  // not empty: attribute of the namespace `symbol`
  std::vector<Target> parts;
};

enum class StmtKind : uint8_t {
  kText,        // text
  kPrint,       // expr
  kIf,          // branches: (condition, body); the last one's condition may be null
  kFor,         // target in expr if condition: body; else_body
  kSet,         // target = expr
  kSetBlock,    // target = text of body, through expr if it is there (filters)
  kMacro,       // symbol(parameters): body
  kGeneration,  // body
  kBreak,
  kContinue,
};

struct Stmt {
  struct Parameter {
    int symbol = -1;
    ExprPtr default_value;  // null: none
  };
  StmtKind kind = StmtKind::kText;
  int line = 0;
  std::string text;
  ExprPtr expr;
  ExprPtr condition;
  Target target;
  Block body;
  Block else_body;
  std::vector<std::pair<ExprPtr, Block>> branches;
  std::vector<Parameter> parameters;
};

struct Template {
  Block body;
  std::vector<std::string> symbols;
  bool has_generation = false;
};

}  // namespace attune::jinja
