// Where the coordinator may listen. Without TLS only where nobody else can hear:
//   unix:{absolute path}     the socket gets mode 0600
//   127.0.0.1:{port}, [::1]:{port}, localhost:{port}   port 0: any free one
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace attune {

struct ListenAddress {
  bool is_unix = false;
  std::string path;  // of a Unix socket
  std::string host;  // as written, brackets included
  int port = 0;
  // As gRPC takes it.
  std::string ToString() const;
};

// INVALID_ARGUMENT for bad syntax; UNIMPLEMENTED for an address that others could reach.
absl::StatusOr<ListenAddress> ParseListenAddress(const std::string& text);

}  // namespace attune
