// Files of datasets, models and checkpoints, stored by their content.
//
// Beneath one root, with names that are made here from digests only, so that no path of a client
// ever reaches the file system:
//   manifests/{id}           the serialised Artifact: kind, state, files (path, bytes, sha256)
//   blobs/{sha256}           a whole, checked file; shared by all artifacts that list it
//   uploads/{id}.{index}     an unfinished file of an artifact
//   VERSION                  "1\n"; another content is refused
// {id} is the SHA-256 of the kind and the sorted file list. A file is a blob only after its SHA-256 was
// checked and it was synced and renamed; an artifact is READY only after all its files are. So a
// crash leaves either an upload to go on with, or a whole file.
//
// Thread-safe; calls do disk I/O and may take as long as hashing the files takes (Finalize).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attune/v1/artifact_service.pb.h"
#include "server/artifacts/directory.h"

namespace attune {

class ArtifactStore {
 public:
  static absl::StatusOr<std::unique_ptr<ArtifactStore>> Open(const std::string& root);

  // Idempotent; READY where all content is there already. INVALID_ARGUMENT with field violations
  // for bad paths, digests or sizes.
  absl::StatusOr<v1::Artifact> Create(v1::ArtifactKind kind,
                                      const std::vector<v1::ArtifactFile>& files, absl::Time now);
  absl::StatusOr<v1::Artifact> Get(const std::string& name) const;
  // By name, those after `after`.
  std::vector<v1::Artifact> List(const std::string& after, int limit) const;
  bool IsReady(const std::string& name) const;

  // Bytes of the file that are committed.
  absl::StatusOr<int64_t> CommittedBytes(const std::string& name, const std::string& path) const;
  // Appends a chunk; returns the committed bytes after it. FAILED_PRECONDITION (WRONG_OFFSET,
  // metadata committed_bytes) unless it starts there; DATA_LOSS where the CRC32C is wrong;
  // OUT_OF_RANGE past the declared size; RESOURCE_EXHAUSTED where the disk is full.
  absl::StatusOr<int64_t> Write(const std::string& name, const std::string& path, int64_t offset,
                                const std::string& data, uint32_t crc32c);
  // Checks every file and makes the artifact READY. FAILED_PRECONDITION (INCOMPLETE) where bytes
  // are missing; DATA_LOSS where a digest differs: that file begins again from 0. Idempotent.
  absl::StatusOr<v1::Artifact> Finalize(const std::string& name);

  // A file of a READY artifact, open, and its declared size.
  struct OpenedFile {
    std::shared_ptr<File> file;
    int64_t bytes = 0;
  };
  absl::StatusOr<OpenedFile> OpenFile(const std::string& name, const std::string& path) const;

  // Removes it, and the blobs that no other artifact lists. The caller has made sure that no job
  // and no checkpoint needs it.
  absl::Status Remove(const std::string& name);

  // Removes what was left behind before `before`: uploads not touched since then, and READY
  // checkpoints created before then that `in_use` does not know (their commit never came).
  void CollectGarbage(absl::Time before,
                      const std::function<bool(const std::string&)>& in_use);

 private:
  struct Entry {
    v1::Artifact artifact;
    std::set<int> writing;  // files that a Write or Finalize is working on
  };
  // Marks a file as being worked on, as long as it lives.
  class Claim;

  ArtifactStore() = default;
  absl::Status Load();
  absl::Status CheckFiles(const std::vector<v1::ArtifactFile>& files) const;
  absl::StatusOr<const Entry*> Find(const std::string& name) const;
  absl::StatusOr<int> FileIndex(const v1::Artifact& artifact, const std::string& path) const;
  absl::Status ClaimFile(const std::string& name, int index);
  void ReleaseFile(const std::string& name, int index);
  absl::Status FinalizeFile(const v1::Artifact& artifact, int index);
  absl::Status SaveManifest(const v1::Artifact& artifact);
  bool HasAllBlobs(const v1::Artifact& artifact) const;
  void Reference(const v1::Artifact& artifact, int by);

  std::unique_ptr<Directory> manifests_, blobs_, uploads_;
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;           // by name
  std::map<std::string, int64_t> blob_references_;  // sha256 -> artifacts that list it
};

}  // namespace attune
