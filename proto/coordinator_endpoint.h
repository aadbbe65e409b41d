// Where a coordinator on this host listens: its data directory holds
//   endpoint   JSON {"addresses": ["unix:/...", "127.0.0.1:7233"], "pid": 123, ...}
//   token      one line; sent with every call as `authorization: Bearer <token>`
// Written by attuned; read by agents and clients, anew for every connection, because a coordinator
// that starts again may listen elsewhere.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace attune {

struct CoordinatorEndpoint {
  std::string address;  // as gRPC takes it: "unix:/path" or "host:port"
  std::string token;    // empty: none known
};

// What a person gives: any of these may be empty.
struct EndpointOptions {
  std::string address;         // used as it is; else from data_directory's endpoint file
  std::string data_directory;  // of a coordinator on this host
  std::string token_file;      // else data_directory's
};

// UNAVAILABLE when there is no endpoint file (no coordinator was started there);
// FAILED_PRECONDITION when a file is there and cannot be read or is not as above.
absl::StatusOr<CoordinatorEndpoint> FindCoordinator(const EndpointOptions& options);

// $XDG_DATA_HOME/attune, else $HOME/.local/share/attune, from the values of these variables
// (null: unset). Empty if neither is set.
std::string DefaultDataDirectory(const char* xdg_data_home, const char* home);
// Of what may be lost: $XDG_CACHE_HOME/attune, else $HOME/.cache/attune; likewise.
std::string DefaultCacheDirectory(const char* xdg_cache_home, const char* home);

}  // namespace attune
