// From the bytes that a trainer prints to log lines: split at line ends, valid UTF-8, at most
// 4096 bytes each, and no more per second than the coordinator should keep.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace attune {

constexpr size_t kMaxLineBytes = 4096;

// The text with every byte that is no part of a UTF-8 character replaced by U+FFFD, cut at a
// character's start to at most `max_bytes`. Protobuf strings must be such text.
std::string ToUtf8(absl::string_view text, size_t max_bytes);

// The text as one line of valid UTF-8: every byte that is no part of a character becomes U+FFFD,
// control characters but tab become spaces; cut at a character's start to fit kMaxLineBytes.
std::string ToLogLine(absl::string_view text);

// Splits at "\n" and "\r" ("\r\n" is one end); empty lines are left out, longer lines are cut
// into pieces. Never holds more than kMaxLineBytes.
class LineSplitter {
 public:
  std::vector<std::string> Add(absl::string_view bytes);
  // What came after the last line end; empty if nothing.
  std::string TakeRest();

 private:
  std::string rest_;
};

// A token bucket that counts what it turned away.
class LogLimiter {
 public:
  LogLimiter(double lines_per_s, double burst)
      : lines_per_s_(lines_per_s), burst_(burst), tokens_(burst) {}

  bool Admit(absl::Time now);
  // Lines turned away since the last call, if one more line may say so now; else 0.
  int64_t TakeDropped(absl::Time now);

 private:
  void Refill(absl::Time now);

  const double lines_per_s_;
  const double burst_;
  double tokens_;
  absl::Time last_ = absl::InfinitePast();
  int64_t dropped_ = 0;
};

}  // namespace attune
