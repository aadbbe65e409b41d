// The one translation of absl::Status to gRPC: code and message unchanged, payloads as
// google.rpc.Status details (AIP-193), so that clients read ErrorInfo and BadRequest.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace attune {

grpc::Status ToGrpc(const absl::Status& status);

// "OK", "NOT_FOUND", ...: the label of grpc_code.
const char* CodeName(absl::StatusCode code);

}  // namespace attune
