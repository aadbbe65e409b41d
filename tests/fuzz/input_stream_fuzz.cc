// A file of any bytes, read as lines: gzip and Zstandard that are damaged end with an error, and
// what is read stays within what was asked for.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "worker/io/line_reader.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr int64_t kMaxLineBytes = 1 << 16;
  constexpr int64_t kMaxLines = 100'000;  // a few bytes may decompress to very many lines
  const int fd = memfd_create("input", MFD_CLOEXEC);
  if (fd < 0 || write(fd, data, size) != static_cast<ssize_t>(size)) abort();
  {
    auto reader =
        attune::LineReader::Open("/proc/self/fd/" + std::to_string(fd), kMaxLineBytes);
    absl::string_view line;
    while (reader.ok() && reader->line_number() < kMaxLines) {
      const absl::StatusOr<bool> more = reader->Next(&line);
      if (!more.ok() && more.status().message().empty()) abort();
      if (!more.ok() || !*more) break;
      if (static_cast<int64_t>(line.size()) > kMaxLineBytes) abort();
    }
  }
  close(fd);
  return 0;
}
