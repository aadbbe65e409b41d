#include "worker/data/jinja/parser.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "worker/data/jinja/builtins.h"
#include "worker/data/jinja/lexer.h"
#include "worker/data/jinja/status_macros.h"

namespace attune::jinja {
namespace {

// Beyond it a template is refused: evaluation recurses over the tree.
constexpr int kMaxDepth = 200;

using ExprOr = absl::StatusOr<ExprPtr>;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens)
      : tokens_(std::move(tokens)), template_(std::make_unique<Template>()) {}

  absl::StatusOr<std::unique_ptr<const Template>> Run() {
    JINJA_ASSIGN(template_->body, ParseBlock({}));
    if (Current().kind != TokenKind::kEnd) return Unexpected("");
    template_->symbols = std::move(symbol_names_);
    return std::unique_ptr<const Template>(std::move(template_));
  }

 private:
  // --- tokens ---

  const Token& Current() const { return tokens_[i_]; }
  const Token& Next() const { return tokens_[std::min(i_ + 1, tokens_.size() - 1)]; }
  void Skip() {
    if (i_ + 1 < tokens_.size()) ++i_;
  }
  bool IsOperator(absl::string_view op) const {
    return Current().kind == TokenKind::kOperator && Current().text == op;
  }
  bool IsName(absl::string_view name) const {
    return Current().kind == TokenKind::kName && Current().text == name;
  }
  bool SkipOperator(absl::string_view op) {
    if (!IsOperator(op)) return false;
    Skip();
    return true;
  }
  bool SkipName(absl::string_view name) {
    if (!IsName(name)) return false;
    Skip();
    return true;
  }
  absl::Status Error(absl::string_view what) const {
    return AtLine(Current().line, absl::InvalidArgumentError(what));
  }
  absl::Status Unexpected(absl::string_view wanted) const {
    std::string found;
    switch (Current().kind) {
      case TokenKind::kEnd:
        found = "the end of the template";
        break;
      case TokenKind::kVariableEnd:
        found = "}}";
        break;
      case TokenKind::kBlockEnd:
        found = "%}";
        break;
      case TokenKind::kData:
        found = "text";
        break;
      default:
        found = absl::StrCat("'", Current().text.substr(0, 40), "'");
    }
    if (wanted.empty()) return Error(absl::StrCat("unexpected ", found));
    return Error(absl::StrCat("expected ", wanted, ", but found ", found));
  }
  absl::Status ExpectOperator(absl::string_view op) {
    if (!SkipOperator(op)) return Unexpected(absl::StrCat("'", op, "'"));
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> ExpectName() {
    if (Current().kind != TokenKind::kName) return Unexpected("a name");
    std::string name = Current().text;
    Skip();
    return name;
  }
  absl::Status ExpectBlockEnd() {
    if (Current().kind != TokenKind::kBlockEnd) return Unexpected("%}");
    Skip();
    return absl::OkStatus();
  }
  int Symbol(const std::string& name) {
    const auto [it, inserted] = symbols_.try_emplace(name, static_cast<int>(symbol_names_.size()));
    if (inserted) symbol_names_.push_back(name);
    return it->second;
  }

  // --- statements ---

  // Statements up to a tag that begins with one of `ends`; the tag's name is then current.
  absl::StatusOr<Block> ParseBlock(const std::vector<absl::string_view>& ends) {
    if (++nesting_ > kMaxDepth) return TooDeep();
    Block block;
    while (Current().kind != TokenKind::kEnd) {
      auto stmt = std::make_unique<Stmt>();
      stmt->line = Current().line;
      if (Current().kind == TokenKind::kData) {
        stmt->kind = StmtKind::kText;
        stmt->text = Current().text;
        Skip();
      } else if (Current().kind == TokenKind::kVariableBegin) {
        Skip();
        stmt->kind = StmtKind::kPrint;
        JINJA_ASSIGN(stmt->expr, ParseTuple(/*with_condition=*/true));
        if (Current().kind != TokenKind::kVariableEnd) return Unexpected("}}");
        Skip();
      } else if (Current().kind == TokenKind::kBlockBegin) {
        Skip();
        if (std::any_of(ends.begin(), ends.end(),
                        [&](absl::string_view end) { return IsName(end); })) {
          --nesting_;
          return block;
        }
        JINJA_RETURN_IF_ERROR(ParseStatement(stmt.get()));
        JINJA_RETURN_IF_ERROR(ExpectBlockEnd());
      } else {
        return Unexpected("");
      }
      block.push_back(std::move(stmt));
    }
    if (!ends.empty()) return Error(absl::StrCat("{% ", ends.back(), " %} is missing"));
    --nesting_;
    return block;
  }

  // A body: from the end of the opening tag; the closing tag's name is skipped.
  absl::StatusOr<Block> ParseBody(absl::string_view end) {
    JINJA_RETURN_IF_ERROR(ExpectBlockEnd());
    JINJA_ASSIGN(Block block, ParseBlock({end}));
    Skip();
    return block;
  }

  absl::Status ParseStatement(Stmt* stmt) {
    JINJA_ASSIGN(const std::string name, ExpectName());
    if (name == "if") return ParseIf(stmt);
    if (name == "for") return ParseFor(stmt);
    if (name == "set") return ParseSet(stmt);
    if (name == "macro") return ParseMacro(stmt);
    if (name == "generation") {
      template_->has_generation = true;
      stmt->kind = StmtKind::kGeneration;
      const int loops = std::exchange(loops_, 0);
      JINJA_ASSIGN(stmt->body, ParseBody("endgeneration"));
      loops_ = loops;
      return absl::OkStatus();
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) return Error(absl::StrCat("{% ", name, " %} outside of a loop"));
      stmt->kind = name == "break" ? StmtKind::kBreak : StmtKind::kContinue;
      return absl::OkStatus();
    }
    for (absl::string_view known : {"block", "extends", "print", "include", "from", "import",
                                    "with", "autoescape", "call", "filter", "do", "trans"}) {
      if (name == known) {
        return AtLine(stmt->line, absl::UnimplementedError(absl::StrCat(
                                      "{% ", name, " %} is not in the subset that attune runs")));
      }
    }
    return AtLine(stmt->line,
                  absl::InvalidArgumentError(absl::StrCat("unknown tag {% ", name, " %}")));
  }

  absl::Status ParseIf(Stmt* stmt) {
    stmt->kind = StmtKind::kIf;
    while (true) {
      JINJA_ASSIGN(ExprPtr condition, ParseTuple(/*with_condition=*/false));
      JINJA_RETURN_IF_ERROR(ExpectBlockEnd());
      JINJA_ASSIGN(Block body, ParseBlock({"elif", "else", "endif"}));
      stmt->branches.emplace_back(std::move(condition), std::move(body));
      if (SkipName("elif")) continue;
      if (SkipName("else")) {
        JINJA_ASSIGN(Block otherwise, ParseBody("endif"));
        stmt->branches.emplace_back(nullptr, std::move(otherwise));
        return absl::OkStatus();
      }
      Skip();  // endif
      return absl::OkStatus();
    }
  }

  absl::Status ParseFor(Stmt* stmt) {
    stmt->kind = StmtKind::kFor;
    JINJA_ASSIGN(stmt->target, ParseTarget(/*with_attribute=*/false));
    if (!SkipName("in")) return Unexpected("'in'");
    JINJA_ASSIGN(stmt->expr, ParseTuple(/*with_condition=*/false));
    if (SkipName("if")) {
      JINJA_ASSIGN(stmt->condition, ParseExpression());
    }
    if (IsName("recursive")) {
      return AtLine(stmt->line, absl::UnimplementedError("a recursive loop"));
    }
    JINJA_RETURN_IF_ERROR(ExpectBlockEnd());
    ++loops_;
    JINJA_ASSIGN(stmt->body, ParseBlock({"else", "endfor"}));
    --loops_;
    if (SkipName("else")) {
      JINJA_ASSIGN(stmt->else_body, ParseBody("endfor"));
    } else {
      Skip();  // endfor
    }
    return absl::OkStatus();
  }

  absl::Status ParseSet(Stmt* stmt) {
    JINJA_ASSIGN(stmt->target, ParseTarget(/*with_attribute=*/true));
    if (SkipOperator("=")) {
      stmt->kind = StmtKind::kSet;
      JINJA_ASSIGN(stmt->expr, ParseTuple(/*with_condition=*/true));
      return absl::OkStatus();
    }
    stmt->kind = StmtKind::kSetBlock;
    while (IsOperator("|")) {
      JINJA_ASSIGN(stmt->expr, ParseFilter(std::move(stmt->expr)));
    }
    const int loops = std::exchange(loops_, 0);
    JINJA_ASSIGN(stmt->body, ParseBody("endset"));
    loops_ = loops;
    return absl::OkStatus();
  }

  absl::Status ParseMacro(Stmt* stmt) {
    stmt->kind = StmtKind::kMacro;
    JINJA_ASSIGN(const std::string name, ExpectName());
    stmt->target.symbol = Symbol(name);
    stmt->text = name;
    JINJA_RETURN_IF_ERROR(ExpectOperator("("));
    while (!SkipOperator(")")) {
      if (!stmt->parameters.empty()) JINJA_RETURN_IF_ERROR(ExpectOperator(","));
      if (SkipOperator(")")) break;
      Stmt::Parameter parameter;
      JINJA_ASSIGN(const std::string parameter_name, ExpectName());
      parameter.symbol = Symbol(parameter_name);
      if (SkipOperator("=")) {
        JINJA_ASSIGN(parameter.default_value, ParseExpression());
      } else if (!stmt->parameters.empty() && stmt->parameters.back().default_value != nullptr) {
        return Error("a parameter without a default after one with a default");
      }
      stmt->parameters.push_back(std::move(parameter));
    }
    const int loops = std::exchange(loops_, 0);
    JINJA_ASSIGN(stmt->body, ParseBody("endmacro"));
    loops_ = loops;
    return absl::OkStatus();
  }

  absl::StatusOr<Target> ParseTarget(bool with_attribute) {
    std::vector<Target> parts;
    bool tuple = false;
    while (true) {
      Target part;
      if (SkipOperator("(")) {
        if (++nesting_ > kMaxDepth) return TooDeep();
        JINJA_ASSIGN(part, ParseTarget(with_attribute));
        --nesting_;
        JINJA_RETURN_IF_ERROR(ExpectOperator(")"));
      } else {
        JINJA_ASSIGN(const std::string name, ExpectName());
        for (absl::string_view reserved : {"true", "false", "none", "True", "False", "None"}) {
          if (name == reserved) return Error(absl::StrCat("cannot assign to '", name, "'"));
        }
        part.symbol = Symbol(name);
        if (with_attribute && SkipOperator(".")) {
          JINJA_ASSIGN(part.attribute, ExpectName());
        }
      }
      parts.push_back(std::move(part));
      if (!SkipOperator(",")) break;
      tuple = true;
      if (Current().kind != TokenKind::kName && !IsOperator("(")) break;
      if (IsName("in")) break;
    }
    if (!tuple) return std::move(parts[0]);
    Target target;
    target.parts = std::move(parts);
    return target;
  }

  // --- expressions ---

  absl::Status TooDeep() const {
    return AtLine(Current().line,
                  absl::ResourceExhaustedError(absl::StrCat(
                      "the template is nested more than ", kMaxDepth, " deep")));
  }

  ExprPtr New(ExprKind kind) const {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = Current().line;
    return expr;
  }

  // Sets the depth from the parts; every compound expression goes through here.
  ExprOr Checked(ExprPtr expr) const {
    int depth = 0;
    for (const ExprPtr& arg : expr->args) {
      if (arg != nullptr) depth = std::max(depth, arg->depth);
    }
    for (const auto& keyword : expr->keywords) depth = std::max(depth, keyword.second->depth);
    if (expr->star_args != nullptr) depth = std::max(depth, expr->star_args->depth);
    if (expr->star_kwargs != nullptr) depth = std::max(depth, expr->star_kwargs->depth);
    expr->depth = depth + 1;
    if (expr->depth > kMaxDepth) return TooDeep();
    return expr;
  }

  ExprOr NewBinary(ExprKind kind, absl::string_view op, ExprPtr left, ExprPtr right) const {
    ExprPtr expr = New(kind);
    expr->line = left->line;
    expr->text = std::string(op);
    expr->args.push_back(std::move(left));
    expr->args.push_back(std::move(right));
    return Checked(std::move(expr));
  }

  // One expression, or several with commas between them: a tuple.
  ExprOr ParseTuple(bool with_condition) {
    ExprPtr tuple = New(ExprKind::kTuple);
    while (true) {
      JINJA_ASSIGN(ExprPtr item, with_condition ? ParseExpression() : ParseOr());
      tuple->args.push_back(std::move(item));
      const bool comma = SkipOperator(",");
      if (!comma && tuple->args.size() == 1) return std::move(tuple->args[0]);
      if (!comma || AtTupleEnd()) return Checked(std::move(tuple));
    }
  }

  bool AtTupleEnd() const {
    return Current().kind == TokenKind::kVariableEnd || Current().kind == TokenKind::kBlockEnd ||
           IsOperator(")");
  }

  ExprOr ParseExpression() {
    if (++nesting_ > kMaxDepth) return TooDeep();
    JINJA_ASSIGN(ExprPtr expr, ParseOr());
    while (SkipName("if")) {
      ExprPtr condition = New(ExprKind::kCondition);
      JINJA_ASSIGN(ExprPtr test, ParseOr());
      ExprPtr otherwise;
      if (SkipName("else")) {
        JINJA_ASSIGN(otherwise, ParseExpression());
      }
      condition->args.push_back(std::move(expr));
      condition->args.push_back(std::move(test));
      condition->args.push_back(std::move(otherwise));
      JINJA_ASSIGN(expr, Checked(std::move(condition)));
    }
    --nesting_;
    return expr;
  }

  ExprOr ParseOr() {
    JINJA_ASSIGN(ExprPtr left, ParseAnd());
    while (SkipName("or")) {
      JINJA_ASSIGN(ExprPtr right, ParseAnd());
      JINJA_ASSIGN(left, NewBinary(ExprKind::kOr, "or", std::move(left), std::move(right)));
    }
    return left;
  }

  ExprOr ParseAnd() {
    JINJA_ASSIGN(ExprPtr left, ParseNot());
    while (SkipName("and")) {
      JINJA_ASSIGN(ExprPtr right, ParseNot());
      JINJA_ASSIGN(left, NewBinary(ExprKind::kAnd, "and", std::move(left), std::move(right)));
    }
    return left;
  }

  ExprOr ParseNot() {
    if (!IsName("not")) return ParseCompare();
    if (++nesting_ > kMaxDepth) return TooDeep();
    ExprPtr expr = New(ExprKind::kUnary);
    Skip();
    expr->text = "not";
    JINJA_ASSIGN(ExprPtr operand, ParseNot());
    expr->args.push_back(std::move(operand));
    --nesting_;
    return Checked(std::move(expr));
  }

  ExprOr ParseCompare() {
    JINJA_ASSIGN(ExprPtr first, ParseSum());
    ExprPtr compare = New(ExprKind::kCompare);
    compare->line = first->line;
    compare->args.push_back(std::move(first));
    while (true) {
      std::string op;
      if (Current().kind == TokenKind::kOperator) {
        for (absl::string_view known : {"==", "!=", "<", "<=", ">", ">="}) {
          if (Current().text == known) op = std::string(known);
        }
        if (op.empty()) break;
        Skip();
      } else if (SkipName("in")) {
        op = "in";
      } else if (IsName("not") && Next().kind == TokenKind::kName && Next().text == "in") {
        Skip();
        Skip();
        op = "not in";
      } else {
        break;
      }
      JINJA_ASSIGN(ExprPtr operand, ParseSum());
      compare->operators.push_back(std::move(op));
      compare->args.push_back(std::move(operand));
    }
    if (compare->operators.empty()) return std::move(compare->args[0]);
    return Checked(std::move(compare));
  }

  ExprOr ParseSum() {
    JINJA_ASSIGN(ExprPtr left, ParseConcat());
    while (IsOperator("+") || IsOperator("-")) {
      const std::string op = Current().text;
      Skip();
      JINJA_ASSIGN(ExprPtr right, ParseConcat());
      JINJA_ASSIGN(left, NewBinary(ExprKind::kBinary, op, std::move(left), std::move(right)));
    }
    return left;
  }

  ExprOr ParseConcat() {
    JINJA_ASSIGN(ExprPtr left, ParseProduct());
    while (SkipOperator("~")) {
      JINJA_ASSIGN(ExprPtr right, ParseProduct());
      JINJA_ASSIGN(left, NewBinary(ExprKind::kBinary, "~", std::move(left), std::move(right)));
    }
    return left;
  }

  ExprOr ParseProduct() {
    JINJA_ASSIGN(ExprPtr left, ParsePower());
    while (IsOperator("*") || IsOperator("/") || IsOperator("//") || IsOperator("%")) {
      const std::string op = Current().text;
      Skip();
      JINJA_ASSIGN(ExprPtr right, ParsePower());
      JINJA_ASSIGN(left, NewBinary(ExprKind::kBinary, op, std::move(left), std::move(right)));
    }
    return left;
  }

  ExprOr ParsePower() {
    JINJA_ASSIGN(ExprPtr left, ParseUnary(/*with_filter=*/true));
    while (SkipOperator("**")) {
      JINJA_ASSIGN(ExprPtr right, ParseUnary(/*with_filter=*/true));
      JINJA_ASSIGN(left, NewBinary(ExprKind::kBinary, "**", std::move(left), std::move(right)));
    }
    return left;
  }

  ExprOr ParseUnary(bool with_filter) {
    if (++nesting_ > kMaxDepth) return TooDeep();
    ExprPtr expr;
    if (IsOperator("-") || IsOperator("+")) {
      ExprPtr unary = New(ExprKind::kUnary);
      unary->text = Current().text;
      Skip();
      JINJA_ASSIGN(ExprPtr operand, ParseUnary(/*with_filter=*/false));
      unary->args.push_back(std::move(operand));
      JINJA_ASSIGN(expr, Checked(std::move(unary)));
    } else {
      JINJA_ASSIGN(expr, ParsePrimary());
    }
    JINJA_ASSIGN(expr, ParsePostfix(std::move(expr)));
    if (with_filter) {
      JINJA_ASSIGN(expr, ParseFiltersAndTests(std::move(expr)));
    }
    --nesting_;
    return expr;
  }

  ExprOr ParsePrimary() {
    const Token& token = Current();
    ExprPtr expr = New(ExprKind::kConst);
    switch (token.kind) {
      case TokenKind::kName:
        if (token.text == "true" || token.text == "True") {
          expr->value = Value(true);
        } else if (token.text == "false" || token.text == "False") {
          expr->value = Value(false);
        } else if (token.text != "none" && token.text != "None") {
          expr->kind = ExprKind::kName;
          expr->symbol = Symbol(token.text);
          expr->text = token.text;
        }
        Skip();
        return expr;
      case TokenKind::kString: {
        std::string text;
        while (Current().kind == TokenKind::kString) {  // neighbours are one string
          text += Current().text;
          Skip();
        }
        expr->value = Value(std::move(text));
        return expr;
      }
      case TokenKind::kInteger:
        expr->value = Value(token.integer);
        Skip();
        return expr;
      case TokenKind::kFloat:
        expr->value = Value(token.number);
        Skip();
        return expr;
      default:
        break;
    }
    if (SkipOperator("(")) return ParseParentheses();
    if (SkipOperator("[")) return ParseList();
    if (SkipOperator("{")) return ParseDict();
    return Unexpected("an expression");
  }

  ExprOr ParseParentheses() {
    if (IsOperator(")")) {
      ExprPtr empty = New(ExprKind::kTuple);
      Skip();
      return empty;
    }
    JINJA_ASSIGN(ExprPtr expr, ParseTuple(/*with_condition=*/true));
    JINJA_RETURN_IF_ERROR(ExpectOperator(")"));
    return expr;
  }

  ExprOr ParseList() {
    ExprPtr list = New(ExprKind::kList);
    while (!SkipOperator("]")) {
      if (!list->args.empty()) JINJA_RETURN_IF_ERROR(ExpectOperator(","));
      if (SkipOperator("]")) break;
      JINJA_ASSIGN(ExprPtr item, ParseExpression());
      list->args.push_back(std::move(item));
    }
    return Checked(std::move(list));
  }

  ExprOr ParseDict() {
    ExprPtr dict = New(ExprKind::kDict);
    while (!SkipOperator("}")) {
      if (!dict->args.empty()) JINJA_RETURN_IF_ERROR(ExpectOperator(","));
      if (SkipOperator("}")) break;
      JINJA_ASSIGN(ExprPtr key, ParseExpression());
      JINJA_RETURN_IF_ERROR(ExpectOperator(":"));
      JINJA_ASSIGN(ExprPtr value, ParseExpression());
      dict->args.push_back(std::move(key));
      dict->args.push_back(std::move(value));
    }
    return Checked(std::move(dict));
  }

  ExprOr ParsePostfix(ExprPtr expr) {
    while (true) {
      if (SkipOperator(".")) {
        JINJA_ASSIGN(expr, ParseDot(std::move(expr)));
      } else if (SkipOperator("[")) {
        JINJA_ASSIGN(expr, ParseSubscript(std::move(expr)));
      } else if (IsOperator("(")) {
        JINJA_ASSIGN(expr, ParseCall(std::move(expr)));
      } else {
        return expr;
      }
    }
  }

  ExprOr ParseDot(ExprPtr object) {
    if (Current().kind == TokenKind::kInteger) {
      ExprPtr key = New(ExprKind::kConst);
      key->value = Value(Current().integer);
      Skip();
      return NewBinary(ExprKind::kIndex, "", std::move(object), std::move(key));
    }
    ExprPtr attribute = New(ExprKind::kAttribute);
    JINJA_ASSIGN(attribute->text, ExpectName());
    attribute->args.push_back(std::move(object));
    return Checked(std::move(attribute));
  }

  ExprOr ParseSubscript(ExprPtr object) {
    ExprPtr slice = New(ExprKind::kSlice);
    slice->args.push_back(std::move(object));
    int colons = 0;
    ExprPtr parts[3];
    while (!IsOperator("]") && !IsOperator(",")) {
      if (SkipOperator(":")) {
        if (++colons > 2) return Unexpected("']'");
        continue;
      }
      if (parts[colons] != nullptr) return Unexpected("']'");
      JINJA_ASSIGN(parts[colons], ParseExpression());
    }
    if (IsOperator(",")) {
      return AtLine(Current().line, absl::UnimplementedError("a subscript with a comma"));
    }
    Skip();
    if (colons == 0) {
      if (parts[0] == nullptr) return Unexpected("an expression");
      return NewBinary(ExprKind::kIndex, "", std::move(slice->args[0]), std::move(parts[0]));
    }
    for (ExprPtr& part : parts) slice->args.push_back(std::move(part));
    return Checked(std::move(slice));
  }

  // Arguments from "(" to ")" into `call`.
  absl::Status ParseArguments(Expr* call) {
    JINJA_RETURN_IF_ERROR(ExpectOperator("("));
    bool first = true;
    while (!SkipOperator(")")) {
      if (!first) JINJA_RETURN_IF_ERROR(ExpectOperator(","));
      first = false;
      if (SkipOperator(")")) break;
      if (SkipOperator("**")) {
        if (call->star_kwargs != nullptr) return Error("two ** arguments");
        JINJA_ASSIGN(call->star_kwargs, ParseExpression());
      } else if (SkipOperator("*")) {
        if (call->star_args != nullptr || call->star_kwargs != nullptr) {
          return Error("a * argument in the wrong place");
        }
        JINJA_ASSIGN(call->star_args, ParseExpression());
      } else if (Current().kind == TokenKind::kName && Next().kind == TokenKind::kOperator &&
                 Next().text == "=") {
        JINJA_ASSIGN(std::string name, ExpectName());
        Skip();  // =
        JINJA_ASSIGN(ExprPtr value, ParseExpression());
        call->keywords.emplace_back(std::move(name), std::move(value));
      } else {
        if (!call->keywords.empty() || call->star_args != nullptr ||
            call->star_kwargs != nullptr) {
          return Error("a positional argument after a keyword argument");
        }
        JINJA_ASSIGN(ExprPtr value, ParseExpression());
        call->args.push_back(std::move(value));
      }
    }
    return absl::OkStatus();
  }

  ExprOr ParseCall(ExprPtr function) {
    ExprPtr call = New(ExprKind::kCall);
    call->args.push_back(std::move(function));
    JINJA_RETURN_IF_ERROR(ParseArguments(call.get()));
    return Checked(std::move(call));
  }

  ExprOr ParseFiltersAndTests(ExprPtr expr) {
    while (true) {
      if (IsOperator("|")) {
        JINJA_ASSIGN(expr, ParseFilter(std::move(expr)));
      } else if (IsName("is")) {
        JINJA_ASSIGN(expr, ParseTest(std::move(expr)));
      } else if (IsOperator("(")) {
        JINJA_ASSIGN(expr, ParseCall(std::move(expr)));
      } else {
        return expr;
      }
    }
  }

  ExprOr ParseFilter(ExprPtr expr) {
    JINJA_RETURN_IF_ERROR(ExpectOperator("|"));
    ExprPtr filter = New(ExprKind::kFilter);
    JINJA_ASSIGN(filter->text, ExpectName());
    if (!IsFilter(filter->text)) {
      return AtLine(filter->line, absl::UnimplementedError(absl::StrCat(
                                      "attune has no filter '", filter->text, "'")));
    }
    filter->args.push_back(std::move(expr));
    if (IsOperator("(")) JINJA_RETURN_IF_ERROR(ParseArguments(filter.get()));
    return Checked(std::move(filter));
  }

  ExprOr ParseTest(ExprPtr expr) {
    Skip();  // is
    const bool negated = SkipName("not");
    ExprPtr test = New(ExprKind::kTest);
    // "x is in [...]" is a test whose name is an operator elsewhere.
    JINJA_ASSIGN(test->text, ExpectName());
    if (!IsTest(test->text)) {
      return AtLine(test->line,
                    absl::UnimplementedError(absl::StrCat("attune has no test '", test->text, "'")));
    }
    test->args.push_back(std::move(expr));
    if (IsOperator("(")) {
      JINJA_RETURN_IF_ERROR(ParseArguments(test.get()));
    } else if (AtTestArgument()) {
      if (IsName("is")) return Error("tests cannot be chained with 'is'");
      JINJA_ASSIGN(ExprPtr argument, ParsePrimary());
      JINJA_ASSIGN(argument, ParsePostfix(std::move(argument)));
      test->args.push_back(std::move(argument));
    }
    JINJA_ASSIGN(test, Checked(std::move(test)));
    if (!negated) return test;
    ExprPtr inverse = New(ExprKind::kUnary);
    inverse->text = "not";
    inverse->args.push_back(std::move(test));
    return Checked(std::move(inverse));
  }

  bool AtTestArgument() const {
    switch (Current().kind) {
      case TokenKind::kName:
        return !IsName("else") && !IsName("or") && !IsName("and");
      case TokenKind::kString:
      case TokenKind::kInteger:
      case TokenKind::kFloat:
        return true;
      case TokenKind::kOperator:
        return IsOperator("[") || IsOperator("{");
      default:
        return false;
    }
  }

  std::vector<Token> tokens_;
  size_t i_ = 0;
  int nesting_ = 0;
  int loops_ = 0;  // loops of this function around the current place
  std::unique_ptr<Template> template_;
  absl::flat_hash_map<std::string, int> symbols_;
  std::vector<std::string> symbol_names_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<const Template>> ParseTemplate(absl::string_view source) {
  JINJA_ASSIGN(std::vector<Token> tokens, Lex(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace attune::jinja
