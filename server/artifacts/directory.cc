#include "server/artifacts/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"

namespace attune {
namespace {

bool IsPlainName(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

}  // namespace

absl::Status ErrnoStatus(int error, const std::string& what, const std::string& path) {
  absl::StatusCode code = absl::StatusCode::kInternal;
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    code = absl::StatusCode::kResourceExhausted;
  } else if (error == ENOENT) {
    code = absl::StatusCode::kNotFound;
  } else if (error == EACCES || error == EPERM || error == EROFS || error == ELOOP) {
    code = absl::StatusCode::kPermissionDenied;
  }
  return absl::Status(code, absl::StrCat("cannot ", what, " ", path, ": ", std::strerror(error)));
}

File::~File() { close(fd_); }

absl::StatusOr<int64_t> File::Size() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) return ErrnoStatus(errno, "stat", path_);
  return static_cast<int64_t>(info.st_size);
}

absl::Status File::Write(int64_t offset, const std::string& data) {
  size_t written = 0;
  while (written < data.size()) {
    const ssize_t n = pwrite(fd_, data.data() + written, data.size() - written,
                             static_cast<off_t>(offset + static_cast<int64_t>(written)));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, "write", path_);
    written += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> File::Read(int64_t offset, int64_t size) const {
  std::string data(static_cast<size_t>(size), '\0');
  size_t got = 0;
  while (got < data.size()) {
    const ssize_t n = pread(fd_, data.data() + got, data.size() - got,
                            static_cast<off_t>(offset + static_cast<int64_t>(got)));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, "read", path_);
    if (n == 0) break;
    got += static_cast<size_t>(n);
  }
  data.resize(got);
  return data;
}

absl::Status File::Truncate(int64_t size) {
  if (ftruncate(fd_, static_cast<off_t>(size)) != 0) return ErrnoStatus(errno, "truncate", path_);
  return absl::OkStatus();
}

absl::Status File::Sync() {
  if (fsync(fd_) != 0) return ErrnoStatus(errno, "sync", path_);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Directory>> Directory::Open(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return ErrnoStatus(errno, "make directory", path);
  }
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, "open directory", path);
  return std::unique_ptr<Directory>(new Directory(fd, path));
}

Directory::~Directory() { close(fd_); }

absl::StatusOr<std::unique_ptr<File>> Directory::OpenFile(const std::string& name,
                                                          Mode mode) const {
  CHECK(IsPlainName(name));
  const int flags = mode == Mode::kRead ? O_RDONLY : O_RDWR | O_CREAT;
  const int fd = openat(fd_, name.c_str(), flags | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd < 0) return ErrnoStatus(errno, "open", PathOf(name));
  return std::make_unique<File>(fd, PathOf(name));
}

bool Directory::Exists(const std::string& name) const {
  CHECK(IsPlainName(name));
  struct stat info;
  return fstatat(fd_, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(info.st_mode);
}

absl::Status Directory::Rename(const std::string& name, const Directory& to,
                               const std::string& to_name) {
  CHECK(IsPlainName(name) && IsPlainName(to_name));
  if (renameat(fd_, name.c_str(), to.fd_, to_name.c_str()) != 0) {
    return ErrnoStatus(errno, "rename", PathOf(name));
  }
  if (absl::Status status = to.Sync(); !status.ok()) return status;
  return &to == this ? absl::OkStatus() : Sync();
}

absl::Status Directory::Remove(const std::string& name) {
  CHECK(IsPlainName(name));
  if (unlinkat(fd_, name.c_str(), 0) != 0) return ErrnoStatus(errno, "remove", PathOf(name));
  return absl::OkStatus();
}

absl::Status Directory::WriteWhole(const std::string& name, const std::string& contents) {
  const std::string beside = name + ".tmp";
  auto file = OpenFile(beside, Mode::kWrite);
  if (!file.ok()) return file.status();
  absl::Status status = (*file)->Truncate(0);
  if (status.ok()) status = (*file)->Write(0, contents);
  if (status.ok()) status = (*file)->Sync();
  if (status.ok()) status = Rename(beside, *this, name);
  if (!status.ok()) (void)Remove(beside);
  return status;
}

absl::Status Directory::Sync() const {
  if (fsync(fd_) != 0) return ErrnoStatus(errno, "sync", path_);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Directory::Entry>> Directory::List() const {
  const int fd = openat(fd_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, "open directory", path_);
  DIR* stream = fdopendir(fd);
  if (stream == nullptr) {
    close(fd);
    return ErrnoStatus(errno, "list", path_);
  }
  std::vector<Entry> entries;
  while (const dirent* entry = readdir(stream)) {
    struct stat info;
    if (!IsPlainName(entry->d_name)) continue;
    if (fstatat(fd_, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0) continue;
    entries.push_back({entry->d_name, static_cast<int64_t>(info.st_mtime)});
  }
  closedir(stream);
  return entries;
}

}  // namespace attune
