#include "worker/agent/source_roots.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace attune {
namespace {

constexpr int kMaxDepth = 4;

bool Beneath(const std::string& path, const std::string& root) {
  return path == root || root == "/" || absl::StartsWith(path, root + "/");
}

std::string RealPath(const std::string& path) {
  char buffer[PATH_MAX];
  return realpath(path.c_str(), buffer) == nullptr ? "" : buffer;
}

// For kernels and sandboxes without openat2: resolve, then compare.
int OpenBeneathByName(const std::string& root, const std::string& relative) {
  const std::string real = RealPath(absl::StrCat(root, "/", relative));
  if (real.empty()) return -1;
  if (!Beneath(real, root)) {
    errno = EXDEV;
    return -1;
  }
  return open(real.c_str(), O_PATH | O_CLOEXEC | O_NOFOLLOW);
}

int OpenBeneath(int root_fd, const std::string& root, const std::string& relative) {
  open_how how = {};
  how.flags = O_PATH | O_CLOEXEC;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  for (;;) {
    const long fd = syscall(SYS_openat2, root_fd, relative.c_str(), &how, sizeof(how));
    if (fd >= 0) return static_cast<int>(fd);
    if (errno == EAGAIN || errno == EINTR) continue;  // A rename raced with "..".
    if (errno == ENOSYS || errno == EPERM) return OpenBeneathByName(root, relative);
    return -1;
  }
}

std::string PathOf(int fd) {
  char buffer[PATH_MAX];
  const std::string link = absl::StrCat("/proc/self/fd/", fd);
  const ssize_t n = readlink(link.c_str(), buffer, sizeof(buffer));
  return n < 0 ? "" : std::string(buffer, n);
}

}  // namespace

absl::StatusOr<SourceRoots> SourceRoots::Open(const std::vector<std::string>& roots) {
  SourceRoots out;
  for (const std::string& given : roots) {
    const std::string real = RealPath(given);
    const int fd =
        real.empty() ? -1 : open(real.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
      return absl::NotFoundError(
          absl::StrCat("root ", given, ": ", std::strerror(errno), ". Make it, or leave it out."));
    }
    out.roots_.push_back({real, std::filesystem::path(given).lexically_normal().string(), fd});
  }
  return out;
}

SourceRoots::SourceRoots(SourceRoots&& other) noexcept : roots_(std::move(other.roots_)) {
  other.roots_.clear();
}

SourceRoots::~SourceRoots() {
  for (const Root& root : roots_) close(root.fd);
}

std::string SourceRoots::Names() const {
  return roots_.empty() ? "none is configured"
                        : absl::StrJoin(roots_, ", ", [](std::string* out, const Root& root) {
                            absl::StrAppend(out, root.given);
                          });
}

absl::StatusOr<std::string> SourceRoots::Resolve(const std::string& path) const {
  if (path.empty() || path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError("a path is empty or has a zero byte");
  }
  absl::Status denied;
  for (const Root& root : roots_) {
    std::string relative = path;
    if (path[0] == '/') {
      const std::string normal = std::filesystem::path(path).lexically_normal().string();
      const std::string* base = Beneath(normal, root.given)  ? &root.given
                                : Beneath(normal, root.path) ? &root.path
                                                             : nullptr;
      if (base == nullptr) continue;
      relative = std::filesystem::path(normal).lexically_relative(*base).string();
    }
    absl::StatusOr<std::string> real = ResolveIn(root, relative);
    if (real.ok()) return real;
    if (!absl::IsNotFound(real.status()) && denied.ok()) denied = real.status();
  }
  if (!denied.ok()) return denied;
  return absl::NotFoundError(
      absl::StrCat(path, " is not beneath a root of this worker (roots: ", Names(),
                   "). Put it there, start the worker with another --root, or give `file`, which "
                   "is uploaded."));
}

absl::StatusOr<std::string> SourceRoots::ResolveIn(const Root& root,
                                                   const std::string& relative) const {
  const int fd = OpenBeneath(root.fd, root.path, relative);
  if (fd < 0) {
    const int error = errno;
    const std::string message =
        absl::StrCat(relative, " beneath ", root.given, ": ", std::strerror(error));
    if (error == EXDEV) {
      return absl::PermissionDeniedError(
          absl::StrCat(relative, " leads out of the root ", root.given,
                       " (through a link or ..). Name a path that stays inside."));
    }
    if (error == EACCES || error == ELOOP) return absl::PermissionDeniedError(message);
    return absl::NotFoundError(message);
  }
  const std::string real = PathOf(fd);
  struct stat info;
  const bool known = fstat(fd, &info) == 0;
  close(fd);
  if (!known || real.empty()) return absl::NotFoundError(relative);
  if (S_ISDIR(info.st_mode)) {
    if (absl::Status s = CheckEntries(root, real, 0); !s.ok()) return s;
  } else if (!S_ISREG(info.st_mode)) {
    return absl::PermissionDeniedError(
        absl::StrCat(relative, " is neither a file nor a directory"));
  }
  return real;
}

absl::Status SourceRoots::CheckEntries(const Root& root, const std::string& real,
                                       int depth) const {
  if (depth == kMaxDepth) return absl::OkStatus();
  namespace fs = std::filesystem;
  std::error_code error;
  for (fs::directory_iterator it(real, error); !error && it != fs::directory_iterator();
       it.increment(error)) {
    const std::string relative = it->path().lexically_relative(root.path).string();
    if (it->is_symlink(error)) {
      const int fd = OpenBeneath(root.fd, root.path, relative);
      // A link to nothing harms nobody.
      if (fd < 0 && errno != ENOENT) {
        return absl::PermissionDeniedError(
            absl::StrCat(relative, " is a link out of the root ", root.given));
      }
      if (fd >= 0) close(fd);
    } else if (it->is_directory(error)) {
      if (absl::Status s = CheckEntries(root, it->path().string(), depth + 1); !s.ok()) return s;
    }
  }
  if (error) return absl::PermissionDeniedError(absl::StrCat(real, ": ", error.message()));
  return absl::OkStatus();
}

}  // namespace attune
