#include "worker/agent/log_lines.h"

#include <algorithm>

namespace attune {
namespace {

// Length of the well-formed UTF-8 character at the start of `text`, or 0 (Unicode, table 3-7).
size_t CharacterLength(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return 0;
  const size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  if (text.size() < length) return 0;
  const unsigned char low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return 0;
  for (size_t i = 2; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  return length;
}

}  // namespace

std::string ToUtf8(absl::string_view text, size_t max_bytes) {
  std::string out;
  while (!text.empty()) {
    const size_t length = CharacterLength(text);
    if (out.size() + (length == 0 ? 3 : length) > max_bytes) break;
    if (length == 0) {
      out += "\xEF\xBF\xBD";
    } else {
      out.append(text.data(), length);
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

std::string ToLogLine(absl::string_view text) {
  std::string line = ToUtf8(text, kMaxLineBytes);
  for (char& c : line) {
    const bool control = static_cast<unsigned char>(c) < ' ' || c == 0x7F;
    if (control && c != '\t') c = ' ';
  }
  return line;
}

std::vector<std::string> LineSplitter::Add(absl::string_view bytes) {
  std::vector<std::string> lines;
  const auto flush = [&] {
    if (!rest_.empty()) lines.push_back(ToLogLine(rest_));
    rest_.clear();
  };
  for (const char c : bytes) {
    if (c == '\n' || c == '\r') {
      flush();
      continue;
    }
    rest_ += c;
    if (rest_.size() == kMaxLineBytes) flush();
  }
  return lines;
}

std::string LineSplitter::TakeRest() {
  std::string line = ToLogLine(rest_);
  rest_.clear();
  return line;
}

void LogLimiter::Refill(absl::Time now) {
  if (last_ != absl::InfinitePast() && now > last_) {
    tokens_ = std::min(burst_, tokens_ + lines_per_s_ * absl::ToDoubleSeconds(now - last_));
  }
  last_ = std::max(last_, now);
}

bool LogLimiter::Admit(absl::Time now) {
  Refill(now);
  // While lines are missing, the count of them comes first.
  if (tokens_ < 1 || dropped_ > 0) {
    ++dropped_;
    return false;
  }
  tokens_ -= 1;
  return true;
}

int64_t LogLimiter::TakeDropped(absl::Time now) {
  Refill(now);
  if (dropped_ == 0 || tokens_ < std::min(burst_, lines_per_s_)) return 0;
  tokens_ -= 1;
  const int64_t dropped = dropped_;
  dropped_ = 0;
  return dropped;
}

}  // namespace attune
