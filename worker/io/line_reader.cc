#include "worker/io/line_reader.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

constexpr size_t kReadBytes = 1 << 20;

}  // namespace

absl::StatusOr<LineReader> LineReader::Open(const std::string& path, int64_t max_line_bytes) {
  absl::StatusOr<std::unique_ptr<InputStream>> stream = InputStream::Open(path);
  if (!stream.ok()) return stream.status();
  return LineReader(path, *std::move(stream), max_line_bytes);
}

absl::StatusOr<bool> LineReader::Fill() {
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (buffer_.size() < end_ + kReadBytes) buffer_.resize(end_ + kReadBytes);
  absl::StatusOr<size_t> n = stream_->Read(buffer_.data() + end_, kReadBytes);
  if (!n.ok()) return n.status();
  end_ += *n;
  return *n > 0;
}

absl::StatusOr<bool> LineReader::Next(absl::string_view* line) {
  size_t searched = begin_;
  while (true) {
    const void* newline =
        end_ > searched ? std::memchr(buffer_.data() + searched, '\n', end_ - searched) : nullptr;
    const bool last = newline == nullptr && at_end_;
    const size_t stop =
        newline != nullptr ? static_cast<size_t>(static_cast<const char*>(newline) - buffer_.data())
                           : end_;
    if (static_cast<int64_t>(stop - begin_) > max_line_bytes_) {
      return absl::ResourceExhaustedError(absl::StrCat(
          path_, ":", line_number_ + 1, ": the line is longer than ", max_line_bytes_, " bytes"));
    }
    if (newline != nullptr || (last && begin_ < end_)) {
      *line = absl::string_view(buffer_.data() + begin_, stop - begin_);
      if (!line->empty() && line->back() == '\r') line->remove_suffix(1);
      begin_ = newline != nullptr ? stop + 1 : end_;
      ++line_number_;
      return true;
    }
    if (last) return false;
    const size_t unsearched = end_ - begin_;
    absl::StatusOr<bool> more = Fill();
    if (!more.ok()) return more.status();
    at_end_ = !*more;
    searched = begin_ + unsearched;
  }
}

}  // namespace attune
