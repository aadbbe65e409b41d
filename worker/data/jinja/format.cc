// Values as text: Python's str, repr and json.dumps.
#include <unicode/uchar.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "worker/data/jinja/status_macros.h"
#include "worker/data/jinja/value.h"
#include "worker/data/unicode.h"

namespace attune::jinja {
namespace {

// str.isprintable: all but separators (the space is printable), controls and unassigned.
bool IsPrintable(char32_t c) {
  if (c == ' ') return true;
  constexpr uint32_t kHidden = U_GC_C_MASK | U_GC_Z_MASK;
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & kHidden) == 0;
}

void AppendStringRepr(absl::string_view text, std::string* out) {
  const bool has_single = text.find('\'') != absl::string_view::npos;
  const bool has_double = text.find('"') != absl::string_view::npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  out->push_back(quote);
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = NextCodePoint(text, &i);
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      out->push_back('\\');
      out->push_back(static_cast<char>(c));
    } else if (c == '\n') {
      out->append("\\n");
    } else if (c == '\r') {
      out->append("\\r");
    } else if (c == '\t') {
      out->append("\\t");
    } else if (IsPrintable(c)) {
      out->append(text.data() + begin, i - begin);
    } else if (c < 0x100) {
      absl::StrAppendFormat(out, "\\x%02x", static_cast<uint32_t>(c));
    } else if (c < 0x10000) {
      absl::StrAppendFormat(out, "\\u%04x", static_cast<uint32_t>(c));
    } else {
      absl::StrAppendFormat(out, "\\U%08x", static_cast<uint32_t>(c));
    }
  }
  out->push_back(quote);
}

void AppendJsonString(absl::string_view text, bool ensure_ascii, std::string* out) {
  out->push_back('"');
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = NextCodePoint(text, &i);
    switch (c) {
      case '"':
        out->append("\\\"");
        continue;
      case '\\':
        out->append("\\\\");
        continue;
      case '\n':
        out->append("\\n");
        continue;
      case '\r':
        out->append("\\r");
        continue;
      case '\t':
        out->append("\\t");
        continue;
      case '\f':
        out->append("\\f");
        continue;
      case '\b':
        out->append("\\b");
        continue;
      default:
        break;
    }
    if (c < 0x20 || (ensure_ascii && c > 0x7E && c < 0x10000)) {
      absl::StrAppendFormat(out, "\\u%04x", static_cast<uint32_t>(c));
    } else if (ensure_ascii && c >= 0x10000) {
      const uint32_t pair = static_cast<uint32_t>(c) - 0x10000;
      absl::StrAppendFormat(out, "\\u%04x\\u%04x", 0xD800 + (pair >> 10), 0xDC00 + (pair & 0x3FF));
    } else {
      out->append(text.data() + begin, i - begin);
    }
  }
  out->push_back('"');
}

std::string JsonFloat(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return FloatRepr(value);
}

absl::Status AppendJsonKey(const Value& key, bool ensure_ascii, std::string* out) {
  if (key.is_string()) {
    AppendJsonString(key.string(), ensure_ascii, out);
  } else if (key.is_bool()) {
    out->append(key.bool_value() ? "\"true\"" : "\"false\"");
  } else if (key.is_int()) {
    absl::StrAppend(out, "\"", key.int_value(), "\"");
  } else if (key.is_float()) {
    absl::StrAppend(out, "\"", JsonFloat(key.float_value()), "\"");
  } else if (key.is_none()) {
    out->append("\"null\"");
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("tojson: a ", key.TypeName(), " cannot be a key"));
  }
  return absl::OkStatus();
}

void NewLine(const JsonStyle& style, int level, std::string* out) {
  if (!style.multi_line) return;
  out->push_back('\n');
  for (int i = 0; i < level; ++i) out->append(style.indent);
}

absl::Status AppendJsonDict(const Dict& dict, const JsonStyle& style, int level,
                            std::string* out) {
  std::vector<const std::pair<Value, Value>*> items;
  for (const auto& item : dict.items) items.push_back(&item);
  if (style.sort_keys) {
    absl::Status status;
    std::stable_sort(items.begin(), items.end(), [&](const auto* a, const auto* b) {
      const absl::StatusOr<bool> less = Less(a->first, b->first);
      status.Update(less.status());
      return less.ok() && *less;
    });
    JINJA_RETURN_IF_ERROR(status);
  }
  out->push_back('{');
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out->append(style.item_separator);
    NewLine(style, level + 1, out);
    JINJA_RETURN_IF_ERROR(AppendJsonKey(items[i]->first, style.ensure_ascii, out));
    out->append(style.key_separator);
    JINJA_RETURN_IF_ERROR(AppendJson(items[i]->second, style, level + 1, out));
  }
  if (!items.empty()) NewLine(style, level, out);
  out->push_back('}');
  return absl::OkStatus();
}

absl::Status AppendItems(const std::vector<Value>& items, std::string* out) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out->append(", ");
    JINJA_RETURN_IF_ERROR(AppendRepr(items[i], out));
  }
  return absl::OkStatus();
}

}  // namespace

std::string FloatRepr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[32];
  const auto result =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  absl::string_view text(buffer, static_cast<size_t>(result.ptr - buffer));
  // [-]d[.ddd]e±xx, the shortest digits that give the value back.
  std::string sign;
  if (text.front() == '-') {
    sign = "-";
    text.remove_prefix(1);
  }
  const size_t e = text.find('e');
  int exponent = 0;
  if (!absl::SimpleAtoi(text.substr(e + 1), &exponent)) exponent = 0;
  std::string digits(text.substr(0, e));
  digits.erase(std::remove(digits.begin(), digits.end(), '.'), digits.end());
  const int count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    std::string mantissa = digits.substr(0, 1);
    if (count > 1) absl::StrAppend(&mantissa, ".", digits.substr(1));
    return absl::StrFormat("%s%se%c%02d", sign, mantissa, exponent < 0 ? '-' : '+',
                           std::abs(exponent));
  }
  if (exponent < 0) {
    return absl::StrCat(sign, "0.", std::string(static_cast<size_t>(-exponent - 1), '0'), digits);
  }
  if (count <= exponent + 1) {
    digits.append(static_cast<size_t>(exponent + 1 - count), '0');
    return absl::StrCat(sign, digits, ".0");
  }
  return absl::StrCat(sign, digits.substr(0, exponent + 1), ".", digits.substr(exponent + 1));
}

absl::Status AppendRepr(const Value& value, std::string* out) {
  if (value.is_undefined()) {
    out->append("Undefined");
  } else if (value.is_none()) {
    out->append("None");
  } else if (value.is_bool()) {
    out->append(value.bool_value() ? "True" : "False");
  } else if (value.is_int()) {
    absl::StrAppend(out, value.int_value());
  } else if (value.is_float()) {
    out->append(FloatRepr(value.float_value()));
  } else if (value.is_string()) {
    AppendStringRepr(value.string(), out);
  } else if (value.is_sequence()) {
    const Sequence& sequence = value.sequence();
    out->push_back(sequence.tuple ? '(' : '[');
    JINJA_RETURN_IF_ERROR(AppendItems(sequence.items, out));
    if (sequence.tuple && sequence.items.size() == 1) out->push_back(',');
    out->push_back(sequence.tuple ? ')' : ']');
  } else if (value.is_dict()) {
    out->push_back('{');
    bool first = true;
    for (const auto& [key, item] : value.dict().items) {
      if (!first) out->append(", ");
      first = false;
      JINJA_RETURN_IF_ERROR(AppendRepr(key, out));
      out->append(": ");
      JINJA_RETURN_IF_ERROR(AppendRepr(item, out));
    }
    out->push_back('}');
  } else {
    return absl::InvalidArgumentError(absl::StrCat("a ", value.TypeName(), " cannot be printed"));
  }
  return absl::OkStatus();
}

absl::Status AppendStr(const Value& value, std::string* out) {
  if (value.is_string()) {
    out->append(value.string());
    return absl::OkStatus();
  }
  if (value.is_undefined()) return absl::OkStatus();
  return AppendRepr(value, out);
}

absl::StatusOr<std::string> Str(const Value& value) {
  std::string text;
  JINJA_RETURN_IF_ERROR(AppendStr(value, &text));
  return text;
}

absl::Status AppendJson(const Value& value, const JsonStyle& style, int level, std::string* out) {
  if (value.is_none()) {
    out->append("null");
  } else if (value.is_bool()) {
    out->append(value.bool_value() ? "true" : "false");
  } else if (value.is_int()) {
    absl::StrAppend(out, value.int_value());
  } else if (value.is_float()) {
    out->append(JsonFloat(value.float_value()));
  } else if (value.is_string()) {
    AppendJsonString(value.string(), style.ensure_ascii, out);
  } else if (value.is_sequence()) {
    const std::vector<Value>& items = value.sequence().items;
    out->push_back('[');
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out->append(style.item_separator);
      NewLine(style, level + 1, out);
      JINJA_RETURN_IF_ERROR(AppendJson(items[i], style, level + 1, out));
    }
    if (!items.empty()) NewLine(style, level, out);
    out->push_back(']');
  } else if (value.is_dict()) {
    return AppendJsonDict(value.dict(), style, level, out);
  } else if (value.is_undefined()) {
    return value.UndefinedError();
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("tojson: a ", value.TypeName(), " is not serializable"));
  }
  return absl::OkStatus();
}

}  // namespace attune::jinja
