#include "proto/coordinator_endpoint.h"

#include <errno.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace attune {
namespace {

absl::StatusOr<std::string> ReadSmallFile(const std::string& path) {
  std::ifstream in(path);
  if (!in) {
    const int error = errno;
    const std::string message = absl::StrCat(path, ": ", std::strerror(error));
    return error == ENOENT ? absl::NotFoundError(message) : absl::FailedPreconditionError(message);
  }
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

absl::StatusOr<std::string> AddressFromFile(const std::string& data_directory) {
  const std::string path = data_directory + "/endpoint";
  absl::StatusOr<std::string> text = ReadSmallFile(path);
  if (absl::IsNotFound(text.status())) {
    return absl::UnavailableError(
        absl::StrCat("no coordinator has been started here (there is no ", path,
                     "). Start attuned, or give its address or its data directory."));
  }
  if (!text.ok()) return text.status();
  const nlohmann::json json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  const bool good = json.is_object() && json.contains("addresses") &&
                    json["addresses"].is_array() && !json["addresses"].empty() &&
                    json["addresses"][0].is_string();
  if (!good) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": not an endpoint file. Start attuned again to have it rewritten."));
  }
  // A Unix socket checks the user by file mode as well: prefer it.
  for (const auto& address : json["addresses"]) {
    if (address.is_string() && absl::StartsWith(address.get<std::string>(), "unix:")) {
      return address.get<std::string>();
    }
  }
  return json["addresses"][0].get<std::string>();
}

std::string OfUser(const char* xdg, const char* home, const char* beneath_home) {
  if (xdg != nullptr && xdg[0] == '/') return absl::StrCat(xdg, "/attune");
  if (home != nullptr && home[0] == '/') return absl::StrCat(home, beneath_home, "/attune");
  return "";
}

}  // namespace

absl::StatusOr<CoordinatorEndpoint> FindCoordinator(const EndpointOptions& options) {
  CoordinatorEndpoint endpoint;
  endpoint.address = options.address;
  if (endpoint.address.empty()) {
    absl::StatusOr<std::string> address = AddressFromFile(options.data_directory);
    if (!address.ok()) return address.status();
    endpoint.address = *address;
  }
  const bool given = !options.token_file.empty();
  if (!given && options.data_directory.empty()) return endpoint;
  absl::StatusOr<std::string> token =
      ReadSmallFile(given ? options.token_file : options.data_directory + "/token");
  if (token.ok()) {
    endpoint.token = std::string(absl::StripAsciiWhitespace(*token));
  } else if (given || !absl::IsNotFound(token.status())) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot read the token: ", token.status().message()));
  }
  return endpoint;
}

std::string DefaultDataDirectory(const char* xdg_data_home, const char* home) {
  return OfUser(xdg_data_home, home, "/.local/share");
}

std::string DefaultCacheDirectory(const char* xdg_cache_home, const char* home) {
  return OfUser(xdg_cache_home, home, "/.cache");
}

}  // namespace attune
