// Tokens to a syntax tree; the grammar and precedence of jinja2.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/data/jinja/ast.h"

namespace attune::jinja {

// INVALID_ARGUMENT "line N: what" for what is no template; UNIMPLEMENTED for statements, filters and
// tests outside the subset (include, extends, call, ...).
absl::StatusOr<std::unique_ptr<const Template>> ParseTemplate(absl::string_view source);

}  // namespace attune::jinja
