// absl::Time and google.protobuf.Timestamp, to the microsecond (what the store keeps).
#pragma once

#include "absl/time/time.h"
#include "google/protobuf/timestamp.pb.h"

namespace attune {

inline google::protobuf::Timestamp ToProto(absl::Time time) {
  const int64_t us = absl::ToUnixMicros(time);
  google::protobuf::Timestamp timestamp;
  timestamp.set_seconds(us / 1000000);
  timestamp.set_nanos(static_cast<int32_t>(us % 1000000) * 1000);
  return timestamp;
}

inline absl::Time FromProto(const google::protobuf::Timestamp& timestamp) {
  return absl::FromUnixSeconds(timestamp.seconds()) + absl::Nanoseconds(timestamp.nanos());
}

}  // namespace attune
