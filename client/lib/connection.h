// Connection to the coordinator: where it is, the token, one stub per service, and errors in words
// that say what to do.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attune/v1/checkpoint_service.grpc.pb.h"
#include "attune/v1/fine_tuning_service.grpc.pb.h"
#include "attune/v1/watch_service.grpc.pb.h"
#include "proto/artifact_client.h"
#include "proto/coordinator_endpoint.h"

namespace attune {

class Connection {
 public:
  // Finds the coordinator; nothing is sent yet.
  static absl::StatusOr<std::unique_ptr<Connection>> Open(const EndpointOptions& options);

  v1::FineTuningService::Stub& jobs() { return *jobs_; }
  v1::CheckpointService::Stub& checkpoints() { return *checkpoints_; }
  v1::WatchService::Stub& watch() { return *watch_; }

  // Carries the token; the call fails after `timeout`.
  std::unique_ptr<grpc::ClientContext> NewContext(
      absl::Duration timeout = absl::Seconds(30)) const;
  // For transfers: looks for the coordinator anew at each connection.
  ArtifactClient NewArtifactClient() const;
  const std::string& address() const { return endpoint_.address; }
  // The same coordinator, found again: it may have come back elsewhere.
  absl::StatusOr<std::unique_ptr<Connection>> Again() const { return Open(options_); }

  // A call's status, with the violations of a wrong request, and what to do when the coordinator
  // cannot be reached or refuses the token.
  absl::Status Explain(const grpc::Status& status) const;

 private:
  Connection(EndpointOptions options, CoordinatorEndpoint endpoint);

  const EndpointOptions options_;
  const CoordinatorEndpoint endpoint_;
  std::unique_ptr<v1::FineTuningService::Stub> jobs_;
  std::unique_ptr<v1::CheckpointService::Stub> checkpoints_;
  std::unique_ptr<v1::WatchService::Stub> watch_;
};

// "jobs/{id}" of "{id}" or "jobs/{id}". INVALID_ARGUMENT for anything else.
absl::StatusOr<std::string> JobName(const std::string& given);

// A random UUID (version 4).
std::string NewRequestId();

}  // namespace attune
