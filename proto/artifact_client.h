// ArtifactClient: files up to and down from the coordinator (artifact_service.proto), as agents
// and the CLI need it. Uploads go on where an interrupted one stopped and send nothing that is
// there already; downloads go on in `<file>.part` and take their name when their SHA-256 is right.
//
// Every call blocks and may be ended from another thread through Cancellation.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attune/v1/artifact_service.grpc.pb.h"
#include "proto/coordinator_endpoint.h"

namespace attune {

// A channel without transport security, for Unix sockets and loopback; it retries quickly and
// shares no connection or backoff with other channels.
std::shared_ptr<grpc::Channel> NewCoordinatorChannel(const std::string& address);

// Adds `authorization: Bearer <token>`, if there is a token.
void AddToken(const std::string& token, grpc::ClientContext* context);

// Same codes, same message.
absl::Status FromGrpc(const grpc::Status& status);

// Ends what runs under it: thread-safe, final.
class Cancellation {
 public:
  void Cancel();
  bool cancelled() const;

 private:
  friend class CancellableCall;
  mutable std::mutex mutex_;
  bool cancelled_ = false;
  std::vector<grpc::ClientContext*> calls_;
};

// Makes a call's context cancellable for as long as this object lives.
class CancellableCall {
 public:
  CancellableCall(Cancellation* cancellation, grpc::ClientContext* context);
  ~CancellableCall();
  CancellableCall(const CancellableCall&) = delete;
  CancellableCall& operator=(const CancellableCall&) = delete;

 private:
  Cancellation* const cancellation_;
  grpc::ClientContext* const context_;
};

struct LocalFile {
  std::string path;   // in the artifact
  std::string local;  // on this machine
};

// Every regular file beneath `directory`, by relative path, sorted. Links to files count as files.
absl::StatusOr<std::vector<LocalFile>> ListFiles(const std::string& directory);

// 64 hexadecimal digits.
absl::StatusOr<std::string> Sha256OfFile(const std::string& path);

struct TransferOptions {
  // Called now and then with bytes done and bytes in all.
  std::function<void(int64_t, int64_t)> progress;
  Cancellation* cancellation = nullptr;  // may be null
  // UNAVAILABLE and DEADLINE_EXCEEDED are tried again for so long after the last success.
  absl::Duration patience = absl::Seconds(30);
};

class ArtifactClient {
 public:
  // `find` is asked again for every connection: a coordinator may come back elsewhere.
  using Find = std::function<absl::StatusOr<CoordinatorEndpoint>()>;
  explicit ArtifactClient(Find find);
  ~ArtifactClient();

  // Uploads and finalises. Files must not change meanwhile: FAILED_PRECONDITION.
  absl::StatusOr<v1::Artifact> Upload(v1::ArtifactKind kind, const std::vector<LocalFile>& files,
                                      const TransferOptions& options);

  absl::StatusOr<v1::Artifact> Get(const std::string& name, const TransferOptions& options);

  // Writes the artifact's files whose path starts with `prefix` beneath `directory`, without the
  // prefix. Every file is whole, or not there (but for its `.part`).
  absl::Status Download(const std::string& name, const std::string& prefix,
                        const std::string& directory, const TransferOptions& options);

 private:
  struct Transfer;
  absl::StatusOr<v1::ArtifactService::Stub*> Connect();
  // Runs `attempt` again and again while it fails for a reason that may pass.
  absl::Status Persist(Transfer* transfer, const std::function<absl::Status()>& attempt);
  absl::Status UploadFile(const std::string& artifact, const LocalFile& file, int64_t bytes,
                          Transfer* transfer);
  absl::Status SendFrom(const std::string& artifact, const LocalFile& file, int64_t bytes,
                        Transfer* transfer);
  absl::Status DownloadFile(const std::string& artifact, const v1::ArtifactFile& file,
                            const std::string& to, Transfer* transfer);
  absl::Status ReceiveInto(const std::string& artifact, const v1::ArtifactFile& file, int fd,
                           Transfer* transfer);

  const Find find_;
  std::string token_;
  std::string address_;
  std::unique_ptr<v1::ArtifactService::Stub> stub_;
};

}  // namespace attune
