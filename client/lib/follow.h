// Follows a job's streams (watch_service.proto) over disconnects and restarts of the coordinator:
// each item comes once, in order within its stream.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "attune/v1/watch_service.pb.h"
#include "client/lib/connection.h"

namespace attune {

struct FollowOptions {
  std::string job;  // "jobs/{id}"
  bool from_now = false;
  // End when the job is in a final state or PAUSED, and all was delivered; else never.
  bool until_end = true;
  // End also when nothing came for so long.
  absl::Duration idle_limit = absl::InfiniteDuration();
};

// Streams whose handler is null are not followed. Handlers are called one at a time.
struct FollowHandlers {
  std::function<void(const v1::Event&)> event;
  std::function<void(const v1::StepMetrics&)> metrics;
  std::function<void(const v1::LogLine&)> line;
  // Something for the reader to know: the coordinator is away, it is back, items are missing.
  std::function<void(const std::string&)> notice;
};

// Blocks until the end of every stream. UNAVAILABLE only if there never was a connection; after
// that it waits for the coordinator for ever. CANCELLED when cancelled.
absl::Status Follow(const Connection& connection, const FollowOptions& options,
                    const FollowHandlers& handlers, Cancellation* cancellation);

}  // namespace attune
