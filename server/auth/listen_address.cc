#include "server/auth/listen_address.h"

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace attune {
namespace {

constexpr char kUnix[] = "unix:";
// sockaddr_un holds 108 bytes with the final zero.
constexpr size_t kUnixPathBytesMax = 107;

}  // namespace

std::string ListenAddress::ToString() const {
  return is_unix ? absl::StrCat(kUnix, path) : absl::StrCat(host, ":", port);
}

absl::StatusOr<ListenAddress> ParseListenAddress(const std::string& text) {
  ListenAddress address;
  if (absl::StartsWith(text, kUnix)) {
    address.is_unix = true;
    address.path = text.substr(sizeof(kUnix) - 1);
    if (absl::StartsWith(address.path, "//")) address.path = address.path.substr(2);
    if (!absl::StartsWith(address.path, "/") || address.path.size() > kUnixPathBytesMax) {
      return absl::InvalidArgumentError(
          absl::StrCat("listen address '", text, "': a Unix socket needs an absolute path of at ",
                       "most ", kUnixPathBytesMax, " bytes, e.g. unix:/run/attune/socket"));
    }
    return address;
  }
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || !absl::SimpleAtoi(text.substr(colon + 1), &address.port) ||
      address.port < 0 || address.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("listen address '", text, "' is neither unix:/path nor host:port"));
  }
  address.host = text.substr(0, colon);
  if (address.host != "127.0.0.1" && address.host != "[::1]" && address.host != "localhost") {
    return absl::UnimplementedError(absl::StrCat(
        "listen address '", text, "' can be reached from other machines, which needs TLS, and TLS ",
        "is not built yet: use 127.0.0.1, [::1] or unix:/path, and a tunnel from elsewhere"));
  }
  return address;
}

}  // namespace attune
