// Resource names and the opaque tokens of lists and streams.
//
//   jobs/{id}                     id: [a-z0-9-]{1,63}; made by the coordinator
//   jobs/{id}/checkpoints/{step}  step: decimal; in requests also "last", "best", "result"
//   workers/{id}                  id: [A-Za-z0-9._-]{1,63}
//   artifacts/{id}                id: 64 lower-case hexadecimal digits
//   resume token                  {e|m|l}{revision}-{crc32c, 8 hex digits}
//   page token                    p{key}-{crc32c over key and filter, 8 hex digits}
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "server/store/records.h"

namespace attune {

bool IsJobName(const std::string& name);
bool IsWorkerName(const std::string& name);

std::string CheckpointName(const std::string& job, int64_t step);

// Which checkpoint of a job: the newest, the best by evaluation loss, or the one that is the job's
// result (best or last, as its spec says), where it is no step.
constexpr int64_t kLastCheckpoint = -1;
constexpr int64_t kBestCheckpoint = -2;
constexpr int64_t kResultCheckpoint = -3;

struct CheckpointId {
  std::string job;
  int64_t step = 0;  // or one of the above
};
absl::StatusOr<CheckpointId> ParseCheckpointName(const std::string& name);

// Continues a stream of `kind` right after `revision`.
std::string MakeResumeToken(StreamKind kind, int64_t revision);
absl::StatusOr<int64_t> ParseResumeToken(StreamKind kind, const std::string& token);

// Continues a list right after `key`; bound to the filter of the list.
std::string MakePageToken(const std::string& key, const std::string& filter);
absl::StatusOr<std::string> ParsePageToken(const std::string& token, const std::string& filter);

inline constexpr int kPageDefault = 50, kPageMax = 1000;  // items of a list
// 0 becomes `fallback`, more than `most` becomes `most`; negative is INVALID_ARGUMENT.
absl::StatusOr<int> PageSize(int requested, int fallback, int most);

}  // namespace attune
