// Early returns for code in which nearly every expression can fail.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define JINJA_RETURN_IF_ERROR(expression)                                             \
  do {                                                                                \
    if (absl::Status jinja_status = (expression); !jinja_status.ok()) return jinja_status; \
  } while (false)

#define JINJA_CONCAT_INNER_(a, b) a##b
#define JINJA_CONCAT_(a, b) JINJA_CONCAT_INNER_(a, b)

// JINJA_ASSIGN(const Value x, Eval(node)): declares x, or returns the status.
#define JINJA_ASSIGN(declaration, expression) \
  JINJA_ASSIGN_(JINJA_CONCAT_(jinja_result_, __LINE__), declaration, expression)
#define JINJA_ASSIGN_(result, declaration, expression) \
  auto result = (expression);                          \
  if (!result.ok()) return result.status();            \
  declaration = *std::move(result)
