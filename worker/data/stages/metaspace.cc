#include "worker/data/stages/metaspace.h"

#include "absl/strings/str_cat.h"
#include "worker/data/unicode.h"

namespace attune {

absl::StatusOr<Metaspace> Metaspace::FromJson(const JsonField& field) {
  Metaspace metaspace;
  const JsonField character = field.Get("replacement");
  absl::StatusOr<std::string> replacement = character.StringOr(metaspace.replacement);
  if (!replacement.ok()) return replacement.status();
  size_t end = 0;
  if (!replacement->empty()) NextCodePoint(*replacement, &end);
  if (end == 0 || end != replacement->size()) return character.Error("is not one character");
  metaspace.replacement = *replacement;

  absl::StatusOr<bool> split = field.Get("split").BoolOr(true);
  if (!split.ok()) return split.status();
  metaspace.split = *split;

  // Files of old versions have add_prefix_space instead of the scheme.
  absl::StatusOr<bool> add_space = field.Get("add_prefix_space").BoolOr(true);
  if (!add_space.ok()) return add_space.status();
  absl::StatusOr<std::string> scheme =
      field.Get("prepend_scheme").StringOr(*add_space ? "always" : "never");
  if (!scheme.ok()) return scheme.status();
  if (*scheme == "always") {
    metaspace.scheme = Scheme::kAlways;
  } else if (*scheme == "first") {
    metaspace.scheme = Scheme::kFirst;
  } else if (*scheme == "never") {
    metaspace.scheme = Scheme::kNever;
  } else {
    return field.Get("prepend_scheme")
        .Error(absl::StrCat("is \"", *scheme, "\"; it must be always, first or never"));
  }
  if (!*add_space && metaspace.scheme != Scheme::kNever) {
    return field.Get("add_prefix_space").Error("contradicts prepend_scheme");
  }
  return metaspace;
}

}  // namespace attune
