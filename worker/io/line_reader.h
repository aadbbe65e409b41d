// Lines of a text file, plain or compressed, one at a time: memory is bounded by the longest line
// that is allowed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/io/input_stream.h"

namespace attune {

class LineReader {
 public:
  // RESOURCE_EXHAUSTED from Next for a line longer than `max_line_bytes`.
  static absl::StatusOr<LineReader> Open(const std::string& path, int64_t max_line_bytes);

  // The next line without its end (\n or \r\n), valid until the next call; false at the end.
  absl::StatusOr<bool> Next(absl::string_view* line);
  // Of the line that Next gave last, from 1.
  int64_t line_number() const { return line_number_; }

 private:
  LineReader(std::string path, std::unique_ptr<InputStream> stream, int64_t max_line_bytes)
      : path_(std::move(path)), stream_(std::move(stream)), max_line_bytes_(max_line_bytes) {}
  absl::StatusOr<bool> Fill();

  std::string path_;
  std::unique_ptr<InputStream> stream_;
  int64_t max_line_bytes_;
  std::vector<char> buffer_;
  size_t begin_ = 0;  // of what was not given out yet
  size_t end_ = 0;
  bool at_end_ = false;
  int64_t line_number_ = 0;
};

}  // namespace attune
