#include "proto/log.h"

#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace attune {
namespace {

// The path from the repository's top: __FILE__ is absolute under some generators.
const char* ShortPath(const char* file) {
  for (const char* top : {"/server/", "/worker/", "/client/", "/proto/", "/kernels/"}) {
    if (const char* found = std::strstr(file, top)) return found + 1;
  }
  return file;
}

}  // namespace

LogMessage::LogMessage(LogSeverity severity, const char* file, int line) : severity_(severity) {
  timeval now;
  gettimeofday(&now, nullptr);
  tm utc;
  gmtime_r(&now.tv_sec, &utc);
  char prefix[64];
  std::snprintf(prefix, sizeof(prefix), "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ %c ",
                utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min,
                utc.tm_sec, static_cast<long>(now.tv_usec / 1000), static_cast<char>(severity));
  stream_ << prefix << ShortPath(file) << ':' << line << ' ';
}

LogMessage::~LogMessage() {
  stream_ << '\n';
  const std::string text = stream_.str();
  // A short or failed write to standard error has nowhere to be reported.
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
  if (severity_ == LogSeverity::kFatal) std::abort();
}

}  // namespace attune
