// Files as the trainer needs them: read whole, written whole or not at all, mapped, hashed.
//
// A file that is written here appears under its name complete and durable (temporary file in the
// same directory, fsync, rename, fsync of the directory) or not at all. Errors carry the path:
//   NOT_FOUND, PERMISSION_DENIED, RESOURCE_EXHAUSTED (disk or quota full, file over a limit),
//   UNAVAILABLE (I/O error), FAILED_PRECONDITION (a directory where a file is expected, ...).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace attune {

constexpr int64_t kReadFileLimitBytes = int64_t{1} << 30;

// The whole file. RESOURCE_EXHAUSTED if it is larger than `limit_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path,
                                     int64_t limit_bytes = kReadFileLimitBytes);

// Replaces or creates `path` with `bytes`, durably. On an error the old content stays.
absl::Status WriteFileAtomic(const std::string& path, absl::string_view bytes, mode_t mode = 0644);

bool FileExists(const std::string& path);

// Makes the names in a directory durable.
absl::Status FsyncDirectory(const std::string& path);

// Creates parent/prefixXXXXXX with mode 0700 and returns its path.
absl::StatusOr<std::string> CreateTempDirectory(const std::string& parent,
                                                absl::string_view prefix);

// Removes a file, a link or a directory with all that is in it; follows no link. A path that is
// not there is OK.
absl::Status RemoveTree(const std::string& path);

// Bytes that this user may still write to the file system of `path`.
absl::StatusOr<int64_t> FreeBytes(const std::string& path);

// The absl::Status of a failed system call: "<what> <path>: <strerror>".
absl::Status FileError(int error, absl::string_view what, absl::string_view path);

// SHA-256 (proto/sha256.h) of a whole file, without holding it in memory.
absl::StatusOr<std::string> Sha256HexOfFile(const std::string& path);

// A file mapped for reading. The bytes live as long as this object. A file that is cut while it
// is mapped raises SIGBUS at the read: models are not changed in place.
class MappedFile {
 public:
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  absl::Span<const uint8_t> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

  // A piece of bytes() into `to`, from any thread, without touching the mapping: as fast, no pages
  // to forget, and a file that has become shorter is DATA_LOSS.
  absl::Status Read(absl::Span<const uint8_t> piece, void* to) const;

 private:
  MappedFile() = default;
  int fd_ = -1;
  const uint8_t* data_ = nullptr;  // null if the file is empty
  size_t size_ = 0;
  std::string path_;
};

// Lets the memory of a piece of a mapped file go; its pages are read again when they are touched.
void ForgetPages(absl::Span<const uint8_t> mapped);

// A file that is written piece by piece and appears under its name at Commit. Without Commit
// the temporary file is removed by the destructor.
class AtomicFileWriter {
 public:
  static absl::StatusOr<AtomicFileWriter> Create(const std::string& path, mode_t mode = 0644);
  AtomicFileWriter(AtomicFileWriter&& other) noexcept;
  AtomicFileWriter& operator=(AtomicFileWriter&& other) noexcept;
  AtomicFileWriter(const AtomicFileWriter&) = delete;
  AtomicFileWriter& operator=(const AtomicFileWriter&) = delete;
  ~AtomicFileWriter();

  // Unbuffered: give it large pieces.
  absl::Status Append(absl::string_view bytes);
  // fsync, rename, fsync of the directory.
  absl::Status Commit();
  int64_t bytes_written() const { return bytes_written_; }

 private:
  AtomicFileWriter() = default;
  void Abandon();
  int fd_ = -1;
  int64_t bytes_written_ = 0;
  std::string path_;
  std::string temporary_path_;
};

}  // namespace attune
