#include "worker/io/spill_buffer.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/core/check.h"
#include "worker/io/file.h"

namespace attune {

SpillBuffer::SpillBuffer(std::string directory, size_t memory_bytes)
    : directory_(std::move(directory)), memory_bytes_(memory_bytes) {}

SpillBuffer::SpillBuffer(SpillBuffer&& other) noexcept { *this = std::move(other); }

SpillBuffer& SpillBuffer::operator=(SpillBuffer&& other) noexcept {
  // Short strings move with their bytes, so a finished view into memory is found anew.
  const bool in_memory = other.data_ != nullptr && other.fd_ < 0;
  std::swap(directory_, other.directory_);
  std::swap(memory_bytes_, other.memory_bytes_);
  std::swap(memory_, other.memory_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(data_, other.data_);
  if (in_memory) data_ = memory_.data();
  return *this;
}

SpillBuffer::~SpillBuffer() {
  if (fd_ < 0) return;
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
  close(fd_);
}

absl::Status SpillBuffer::Flush() {
  if (fd_ < 0) {
    fd_ = open(directory_.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd_ < 0) return FileError(errno, "make a temporary file in", directory_);
  }
  for (size_t done = 0; done < memory_.size();) {
    const ssize_t n = write(fd_, memory_.data() + done, memory_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "write a temporary file in", directory_);
    done += static_cast<size_t>(n);
  }
  memory_.clear();
  return absl::OkStatus();
}

absl::Status SpillBuffer::Append(absl::string_view bytes) {
  CHECK(data_ == nullptr);
  memory_.append(bytes.data(), bytes.size());
  size_ += bytes.size();
  return memory_.size() > memory_bytes_ ? Flush() : absl::OkStatus();
}

absl::Status SpillBuffer::Finish() {
  if (fd_ < 0) {
    data_ = memory_.data();
    return absl::OkStatus();
  }
  if (absl::Status s = Flush(); !s.ok()) return s;
  std::string().swap(memory_);
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_, 0);
  if (mapped == MAP_FAILED) return FileError(errno, "map a temporary file in", directory_);
  data_ = static_cast<const char*>(mapped);
  return absl::OkStatus();
}

}  // namespace attune
