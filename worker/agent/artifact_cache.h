// Artifacts that leases of this worker have used, whole and checked, beneath one directory:
//   <id>/           a complete artifact; its mtime is its last use
//   <id>.partial/   one that is being fetched; goes on after a restart
// Bounded in bytes: what is used by nobody goes first that was used longest ago.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/artifact_client.h"

namespace attune {

class ArtifactCache {
 public:
  // Makes the directory. Complete artifacts in it are used again.
  ArtifactCache(std::string directory, int64_t max_bytes, ArtifactClient::Find find);

  // The directory with the artifact's files, fetched if need be. It stays until Release. Two
  // callers may want the same one: the second waits. Errors as those of ArtifactClient::Download.
  absl::StatusOr<std::string> Acquire(const std::string& name, Cancellation* cancellation);
  void Release(const std::string& name);

 private:
  absl::Status Fetch(const std::string& name, const std::string& to, Cancellation* cancellation);
  void Evict();

  const std::string directory_;
  const int64_t max_bytes_;
  const ArtifactClient::Find find_;
  std::mutex mutex_;
  std::map<std::string, int> users_;                       // id -> leases
  std::map<std::string, std::unique_ptr<std::mutex>> fetching_;  // id -> held while it is fetched
};

}  // namespace attune
