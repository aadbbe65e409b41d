// A directory held open, and files in it by plain name: no path from outside is ever resolved.
// Names are single components without '/' (CHECKed: callers make them from digests and indices),
// links are not followed (O_NOFOLLOW). Errors name the file; ENOSPC and EDQUOT are
// RESOURCE_EXHAUSTED, a missing file NOT_FOUND.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace attune {

// The status of errno `error` after `what` on `path`.
absl::Status ErrnoStatus(int error, const std::string& what, const std::string& path);

// An open file. Reads and writes are positioned and whole.
class File {
 public:
  explicit File(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  absl::StatusOr<int64_t> Size() const;
  absl::Status Write(int64_t offset, const std::string& data);
  // Up to `size` bytes; fewer only at the end.
  absl::StatusOr<std::string> Read(int64_t offset, int64_t size) const;
  absl::Status Truncate(int64_t size);
  // Data and size are on the disk.
  absl::Status Sync();

 private:
  const int fd_;
  const std::string path_;
};

class Directory {
 public:
  // Opens `path`, making it (mode 0700) where it is missing.
  static absl::StatusOr<std::unique_ptr<Directory>> Open(const std::string& path);
  ~Directory();
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;

  enum class Mode { kRead, kWrite };  // kWrite makes the file (mode 0600) where it is missing
  absl::StatusOr<std::unique_ptr<File>> OpenFile(const std::string& name, Mode mode) const;
  bool Exists(const std::string& name) const;
  // Atomic; both directories are synced when it returns.
  absl::Status Rename(const std::string& name, const Directory& to, const std::string& to_name);
  absl::Status Remove(const std::string& name);
  // Whole contents, atomically: written beside, synced, renamed.
  absl::Status WriteWhole(const std::string& name, const std::string& contents);
  struct Entry {
    std::string name;
    int64_t modified_s = 0;  // since 1970
  };
  absl::StatusOr<std::vector<Entry>> List() const;

 private:
  Directory(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  std::string PathOf(const std::string& name) const { return path_ + "/" + name; }
  absl::Status Sync() const;
  const int fd_;
  const std::string path_;
};

}  // namespace attune
