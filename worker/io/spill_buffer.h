// Bytes that only grow, and are read once all are there: in memory up to a limit, beyond it in a
// file without a name that is mapped, so that the kernel may drop and reread its pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace attune {

class SpillBuffer {
 public:
  // `directory` is touched only if more than `memory_bytes` come.
  explicit SpillBuffer(std::string directory = "/var/tmp",
                       size_t memory_bytes = size_t{64} << 20);
  SpillBuffer(SpillBuffer&& other) noexcept;
  SpillBuffer& operator=(SpillBuffer&& other) noexcept;
  ~SpillBuffer();

  // RESOURCE_EXHAUSTED if the disk is full.
  absl::Status Append(absl::string_view bytes);
  template <typename T>
  absl::Status Append(absl::Span<const T> values) {
    return Append(absl::string_view(reinterpret_cast<const char*>(values.data()),
                                    values.size() * sizeof(T)));
  }
  // Nothing may be appended after it; only then may it be read.
  absl::Status Finish();

  size_t size() const { return size_; }  // bytes
  bool spilled() const { return fd_ >= 0; }
  template <typename T>
  absl::Span<const T> View() const {
    return absl::MakeConstSpan(reinterpret_cast<const T*>(data_), size_ / sizeof(T));
  }

 private:
  absl::Status Flush();

  std::string directory_;
  size_t memory_bytes_;
  std::string memory_;  // all bytes, or those that were not written yet
  int fd_ = -1;
  size_t size_ = 0;
  const char* data_ = nullptr;  // once finished
};

}  // namespace attune
