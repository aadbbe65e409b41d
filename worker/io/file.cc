#include "worker/io/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "proto/sha256.h"

namespace attune {
namespace {

// Closes a descriptor at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

int OpenRetrying(const std::string& path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::string ParentOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Opens for reading and refuses what is no regular file: a FIFO would block, a directory has no
// bytes.
absl::StatusOr<int> OpenRegular(const std::string& path, struct stat* info) {
  const int fd = OpenRetrying(path, O_RDONLY | O_NONBLOCK);
  if (fd < 0) return FileError(errno, "open", path);
  absl::Status status;
  if (fstat(fd, info) != 0) {
    status = FileError(errno, "stat", path);
  } else if (!S_ISREG(info->st_mode)) {
    status = absl::FailedPreconditionError(
        absl::StrCat(path, " is ", S_ISDIR(info->st_mode) ? "a directory" : "a special file",
                     ", but a file is needed"));
  }
  if (!status.ok()) {
    close(fd);
    return status;
  }
  return fd;
}

absl::StatusOr<size_t> ReadSome(int fd, const std::string& path, char* buffer, size_t size) {
  ssize_t n;
  do {
    n = read(fd, buffer, size);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return FileError(errno, "read", path);
  return static_cast<size_t>(n);
}

// Removes what is beneath `name` in the directory `parent_fd`, then the name itself.
absl::Status RemoveAt(int parent_fd, const std::string& name, const std::string& path) {
  if (unlinkat(parent_fd, name.c_str(), 0) == 0 || errno == ENOENT) return absl::OkStatus();
  if (errno != EISDIR && errno != EPERM) return FileError(errno, "remove", path);
  const int fd = openat(parent_fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return FileError(errno, "open", path);
  DIR* directory = fdopendir(fd);
  if (directory == nullptr) {
    close(fd);
    return FileError(errno, "open", path);
  }
  std::vector<std::string> entries;
  while (const dirent* entry = readdir(directory)) {
    if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0) {
      entries.emplace_back(entry->d_name);
    }
  }
  absl::Status status;
  for (const std::string& entry : entries) {
    status.Update(RemoveAt(dirfd(directory), entry, absl::StrCat(path, "/", entry)));
  }
  closedir(directory);
  if (!status.ok()) return status;
  if (unlinkat(parent_fd, name.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT) {
    return FileError(errno, "remove", path);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status FileError(int error, absl::string_view what, absl::string_view path) {
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
      return absl::NotFoundError(message);
    case EEXIST:
      return absl::AlreadyExistsError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
      return absl::ResourceExhaustedError(message);
    case ENOTDIR:
    case EISDIR:
    case ELOOP:
    case ENOTEMPTY:
    case ENAMETOOLONG:
    case EINVAL:
    case ENODEV:
      return absl::FailedPreconditionError(message);
    case EIO:
    case ESTALE:
    case EAGAIN:
      return absl::UnavailableError(message);
    default:
      return absl::UnknownError(message);
  }
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t limit_bytes) {
  struct stat info;
  absl::StatusOr<int> opened = OpenRegular(path, &info);
  if (!opened.ok()) return opened.status();
  const Descriptor fd(*opened);
  const auto too_large = [&] {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, " is larger than ", limit_bytes, " bytes, the limit for such a file"));
  };
  if (info.st_size > limit_bytes) return too_large();
  // One byte more than the size tells whether the file grew; /proc files say size 0.
  std::string content(static_cast<size_t>(info.st_size) + 1, '\0');
  size_t length = 0;
  while (true) {
    absl::StatusOr<size_t> n = ReadSome(fd.get(), path, &content[length], content.size() - length);
    if (!n.ok()) return n.status();
    if (*n == 0) break;
    length += *n;
    if (static_cast<int64_t>(length) > limit_bytes) return too_large();
    if (length == content.size()) content.resize(content.size() * 2);
  }
  content.resize(length);
  return content;
}

absl::Status WriteFileAtomic(const std::string& path, absl::string_view bytes, mode_t mode) {
  absl::StatusOr<AtomicFileWriter> file = AtomicFileWriter::Create(path, mode);
  if (!file.ok()) return file.status();
  if (absl::Status status = file->Append(bytes); !status.ok()) return status;
  return file->Commit();
}

bool FileExists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0;
}

absl::Status FsyncDirectory(const std::string& path) {
  const Descriptor fd(OpenRetrying(path, O_RDONLY | O_DIRECTORY));
  if (fd.get() < 0) return FileError(errno, "open", path);
  if (fsync(fd.get()) != 0) return FileError(errno, "fsync", path);
  return absl::OkStatus();
}

absl::StatusOr<std::string> CreateTempDirectory(const std::string& parent,
                                                absl::string_view prefix) {
  std::string path = absl::StrCat(parent, "/", prefix, "XXXXXX");
  if (mkdtemp(path.data()) == nullptr) return FileError(errno, "create directory", path);
  return path;
}

absl::Status RemoveTree(const std::string& path) {
  std::string name = path;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  return RemoveAt(AT_FDCWD, name, name);
}

absl::StatusOr<int64_t> FreeBytes(const std::string& path) {
  struct statvfs info;
  if (statvfs(path.c_str(), &info) != 0) return FileError(errno, "statvfs", path);
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

absl::StatusOr<std::string> Sha256HexOfFile(const std::string& path) {
  struct stat info;
  absl::StatusOr<int> opened = OpenRegular(path, &info);
  if (!opened.ok()) return opened.status();
  const Descriptor fd(*opened);
  Sha256 sha;
  std::vector<char> buffer(1 << 20);
  while (true) {
    absl::StatusOr<size_t> n = ReadSome(fd.get(), path, buffer.data(), buffer.size());
    if (!n.ok()) return n.status();
    if (*n == 0) return sha.HexDigest();
    sha.Update(absl::string_view(buffer.data(), *n));
  }
}

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  struct stat info;
  absl::StatusOr<int> opened = OpenRegular(path, &info);
  if (!opened.ok()) return opened.status();
  MappedFile file;
  file.fd_ = *opened;
  file.path_ = path;
  file.size_ = static_cast<size_t>(info.st_size);
  if (file.size_ == 0) return file;
  void* data = mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, file.fd_, 0);
  if (data == MAP_FAILED) {
    file.size_ = 0;
    return FileError(errno, "map", path);
  }
  file.data_ = static_cast<const uint8_t*>(data);
  return file;
}

absl::Status MappedFile::Read(absl::Span<const uint8_t> piece, void* to) const {
  const int64_t begin = piece.data() - data_;
  CHECK(begin >= 0 && begin + piece.size() <= size_);
  size_t done = 0;
  while (done < piece.size()) {
    const ssize_t n = pread(fd_, static_cast<char*>(to) + done, piece.size() - done,
                            static_cast<off_t>(begin) + static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "read", path_);
    if (n == 0) {
      return absl::DataLossError(absl::StrCat(
          path_, " had ", size_, " bytes when it was opened and ends after ", begin + done,
          " now: it was changed meanwhile, or cut. Download it again, and start anew."));
    }
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      path_(std::move(other.path_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(path_, other.path_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
  if (fd_ >= 0) close(fd_);
}

void ForgetPages(absl::Span<const uint8_t> mapped) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  // Pages that are shared with a neighbour stay.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(mapped.data()) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(mapped.data() + mapped.size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

absl::StatusOr<AtomicFileWriter> AtomicFileWriter::Create(const std::string& path, mode_t mode) {
  AtomicFileWriter file;
  file.path_ = path;
  std::string temporary = absl::StrCat(path, ".XXXXXX");
  file.fd_ = mkostemp(temporary.data(), O_CLOEXEC);
  if (file.fd_ < 0) return FileError(errno, "create", path);
  file.temporary_path_ = temporary;
  if (fchmod(file.fd_, mode) != 0) return FileError(errno, "chmod", temporary);
  return file;
}

AtomicFileWriter::AtomicFileWriter(AtomicFileWriter&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      bytes_written_(other.bytes_written_),
      path_(std::move(other.path_)),
      temporary_path_(std::move(other.temporary_path_)) {}

AtomicFileWriter& AtomicFileWriter::operator=(AtomicFileWriter&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(bytes_written_, other.bytes_written_);
  std::swap(path_, other.path_);
  std::swap(temporary_path_, other.temporary_path_);
  return *this;
}

AtomicFileWriter::~AtomicFileWriter() {
  Abandon();
}

void AtomicFileWriter::Abandon() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_path_.c_str());
  fd_ = -1;
}

absl::Status AtomicFileWriter::Append(absl::string_view bytes) {
  CHECK(fd_ >= 0);
  while (!bytes.empty()) {
    const ssize_t n = write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "write", path_);
    bytes.remove_prefix(static_cast<size_t>(n));
    bytes_written_ += n;
  }
  return absl::OkStatus();
}

absl::Status AtomicFileWriter::Commit() {
  CHECK(fd_ >= 0);
  if (fsync(fd_) != 0) {
    const int error = errno;
    Abandon();
    return FileError(error, "fsync", path_);
  }
  // Some file systems report a full disk only here.
  const int closed = close(std::exchange(fd_, -1));
  if (closed != 0 || rename(temporary_path_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    unlink(temporary_path_.c_str());
    return FileError(error, closed != 0 ? "close" : "rename to", path_);
  }
  return FsyncDirectory(ParentOf(path_));
}

}  // namespace attune
