#include "server/auth/token.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/artifacts/directory.h"

namespace attune {
namespace {

constexpr size_t kTokenBytes = 32;

absl::StatusOr<std::string> CreateToken(const std::string& directory, const std::string& name) {
  unsigned char bytes[kTokenBytes];
  if (RAND_bytes(bytes, sizeof(bytes)) != 1) {
    return absl::InternalError("no random bytes for the token");
  }
  const std::string token = absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(bytes), sizeof(bytes)));
  auto opened = Directory::Open(directory);
  if (!opened.ok()) return opened.status();
  if (absl::Status status = (*opened)->WriteWhole(name, token + "\n"); !status.ok()) return status;
  return token;
}

}  // namespace

absl::StatusOr<std::string> LoadOrCreateToken(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash);
  const std::string name = path.substr(slash == std::string::npos ? 0 : slash + 1);
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0 && errno == ENOENT) return CreateToken(directory, name);
  if (fd < 0) return ErrnoStatus(errno, "open", path);
  const File file(fd, path);
  struct stat info;
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "stat", path);
  if ((info.st_mode & 077) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat(path, " can be read by others: run chmod 600 on it, or remove it to get a new "
                     "token"));
  }
  absl::StatusOr<std::string> text = file.Read(0, 4096);
  if (!text.ok()) return text.status();
  while (!text->empty() && (text->back() == '\n' || text->back() == ' ')) text->pop_back();
  if (text->size() < kTokenBytes) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " holds no token; remove it to get a new one"));
  }
  return text;
}

bool IsAuthorized(const std::string& authorization, const std::string& token) {
  const std::string expected = absl::StrCat("Bearer ", token);
  return authorization.size() == expected.size() &&
         CRYPTO_memcmp(authorization.data(), expected.data(), expected.size()) == 0;
}

}  // namespace attune
