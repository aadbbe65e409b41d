// What every RPC handler shares, and the one way in: Guard checks the token and counts the call.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/artifacts/artifact_store.h"
#include "server/core/runner.h"
#include "server/core/watch_hub.h"
#include "server/rpc/io_pool.h"

namespace attune {

// Counts calls. Thread-safe.
class RpcObserver {
 public:
  virtual ~RpcObserver() = default;
  virtual void Started(const std::string& service, const std::string& method) = 0;
  virtual void Handled(const std::string& service, const std::string& method,
                       absl::StatusCode code, double handling_s, bool unary) = 0;
};

// Outlives every call. Nothing in it is owned.
struct RpcContext {
  Runner* runner = nullptr;
  WatchHub* watch_hub = nullptr;
  ArtifactStore* artifacts = nullptr;
  IoPool* io = nullptr;
  RpcObserver* observer = nullptr;  // may be null
  std::string token;
};

// One call from its start to its end: who calls, and how long it took.
class CallGuard {
 public:
  // `method` is "attune.v1.Service/Method".
  CallGuard(const RpcContext& context, const grpc::CallbackServerContext& call,
            const std::string& method, bool unary);
  // UNAUTHENTICATED without the right token.
  const absl::Status& admission() const { return admission_; }
  // Counts the end; returns what goes to the client. Call once.
  grpc::Status End(const absl::Status& status);

 private:
  const RpcContext& context_;
  std::string service_;
  std::string method_;
  const bool unary_;
  const absl::Time start_;
  absl::Status admission_;
};

using Done = std::function<void(absl::Status)>;

// Runs a unary call: `handler` gets a Done that it calls once, from any thread. Handlers must
// not block.
grpc::ServerUnaryReactor* Unary(const RpcContext& context, grpc::CallbackServerContext* call,
                                const std::string& method,
                                const std::function<void(Done)>& handler);

// Like Unary, for a handler that does disk I/O and returns its status.
grpc::ServerUnaryReactor* UnaryIo(const RpcContext& context, grpc::CallbackServerContext* call,
                                  const std::string& method,
                                  std::function<absl::Status()> handler);

}  // namespace attune
