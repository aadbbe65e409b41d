// The coordinator as an object: attuned runs one, `attune local` embeds one.
//
// Data directory (mode 0700), created where it is missing:
//   token       the secret of the API (auth/token.h)
//   endpoint    JSON {"addresses": [...], "metrics_address": "...", "pid": n}: where the server
//               listens while it runs; the CLI and agents on the machine read it
//   lock        held while a server runs
//   jobs.db     the job store (store/)
//   artifacts/  files (artifacts/)
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace attune {

struct ServerOptions {
  std::string data_dir;
  // Empty: a Unix socket in data_dir (or 127.0.0.1:0 where its path would be too long).
  std::vector<std::string> listen;
  std::string metrics_address;  // "127.0.0.1:9464", port 0: any; empty: none
  absl::Duration lease_timeout = absl::Seconds(15);
  absl::Duration heartbeat_interval = absl::Seconds(3);
  std::string version = "0.1.0";
  // Called once, from another thread, where the store fails: the program should exit non-zero.
  std::function<void(const absl::Status&)> on_fatal;
};

class Server {
 public:
  virtual ~Server() = default;  // as Shutdown
  // As gRPC clients take them, with the ports really bound.
  virtual const std::vector<std::string>& addresses() const = 0;
  virtual const std::string& token() const = 0;
  // "" where none is served.
  virtual const std::string& metrics_address() const = 0;
  // Answers what is under way, ends streams, stores all. Idempotent.
  virtual void Shutdown() = 0;
};

// Starts serving. Errors say what to do: a listen address that others can reach (UNIMPLEMENTED),
// a data directory in use (FAILED_PRECONDITION), a newer or damaged store.
absl::StatusOr<std::unique_ptr<Server>> StartServer(ServerOptions options);

}  // namespace attune
