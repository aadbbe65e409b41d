// LOG(INFO|WARNING|ERROR|FATAL) << ...: one line on standard error,
//   2026-11-24T10:00:00.123Z I server/main.cc:42 text
// written with a single write(2), so that lines of several threads and processes do not mix.
// FATAL aborts. For people and journald; programs read events and metrics.
#pragma once

#include <sstream>

namespace attune {

enum class LogSeverity : char { kInfo = 'I', kWarning = 'W', kError = 'E', kFatal = 'F' };

class LogMessage {
 public:
  LogMessage(LogSeverity severity, const char* file, int line);
  ~LogMessage();
  LogMessage(const LogMessage&) = delete;
  LogMessage& operator=(const LogMessage&) = delete;
  std::ostream& stream() { return stream_; }

 private:
  const LogSeverity severity_;
  std::ostringstream stream_;
};

}  // namespace attune

#define ATTUNE_LOG_INFO ::attune::LogSeverity::kInfo
#define ATTUNE_LOG_WARNING ::attune::LogSeverity::kWarning
#define ATTUNE_LOG_ERROR ::attune::LogSeverity::kError
#define ATTUNE_LOG_FATAL ::attune::LogSeverity::kFatal
#define LOG(severity) ::attune::LogMessage(ATTUNE_LOG_##severity, __FILE__, __LINE__).stream()
