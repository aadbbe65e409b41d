#include "proto/artifact_client.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "proto/crc32c.h"
#include "proto/sha256.h"

namespace attune {
namespace {

constexpr size_t kChunkBytes = 1 << 20;
// Attempts that failed on content, not on the connection: more of them would fail as well.
constexpr int kMaxAborted = 8;

class File {
 public:
  File(const std::string& path, int flags) : fd_(open(path.c_str(), flags | O_CLOEXEC, 0644)) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

absl::Status FileError(absl::string_view what, const std::string& path) {
  const int error = errno;
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(error));
  if (error == ENOENT) return absl::NotFoundError(message);
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(message);
  return absl::FailedPreconditionError(message);
}

bool MayPass(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsAborted(status);
}

absl::StatusOr<int64_t> SizeOf(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return FileError("cannot read", path);
  return static_cast<int64_t>(info.st_size);
}

bool GoodPath(const std::string& path) {
  if (path.empty() || path[0] == '/' || path.find('\0') != std::string::npos) return false;
  for (const auto& part : std::filesystem::path(path)) {
    if (part == "." || part == ".." || part.empty()) return false;
  }
  return true;
}

}  // namespace

std::shared_ptr<grpc::Channel> NewCoordinatorChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetMaxReceiveMessageSize(64 << 20);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

void AddToken(const std::string& token, grpc::ClientContext* context) {
  if (!token.empty()) context->AddMetadata("authorization", absl::StrCat("Bearer ", token));
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void Cancellation::Cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  for (grpc::ClientContext* call : calls_) call->TryCancel();
}

bool Cancellation::cancelled() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return cancelled_;
}

CancellableCall::CancellableCall(Cancellation* cancellation, grpc::ClientContext* context)
    : cancellation_(cancellation), context_(context) {
  if (cancellation_ == nullptr) return;
  std::lock_guard<std::mutex> lock(cancellation_->mutex_);
  if (cancellation_->cancelled_) context_->TryCancel();
  cancellation_->calls_.push_back(context_);
}

CancellableCall::~CancellableCall() {
  if (cancellation_ == nullptr) return;
  std::lock_guard<std::mutex> lock(cancellation_->mutex_);
  auto& calls = cancellation_->calls_;
  calls.erase(std::find(calls.begin(), calls.end(), context_));
}

absl::StatusOr<std::vector<LocalFile>> ListFiles(const std::string& directory) {
  namespace fs = std::filesystem;
  std::vector<LocalFile> files;
  std::error_code error;
  fs::recursive_directory_iterator it(directory, error);
  for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    if (!it->is_regular_file(error)) continue;
    files.push_back(
        {it->path().lexically_relative(directory).generic_string(), it->path().string()});
  }
  if (error) {
    return absl::NotFoundError(absl::StrCat("cannot read ", directory, ": ", error.message()));
  }
  std::sort(files.begin(), files.end(),
            [](const LocalFile& a, const LocalFile& b) { return a.path < b.path; });
  return files;
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  File file(path, O_RDONLY);
  if (file.fd() < 0) return FileError("cannot read", path);
  Sha256 sha;
  std::string buffer(kChunkBytes, '\0');
  for (;;) {
    const ssize_t n = read(file.fd(), buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError("cannot read", path);
    if (n == 0) break;
    sha.Update(absl::string_view(buffer.data(), n));
  }
  return sha.HexDigest();
}

// What one Upload or Download carries along.
struct ArtifactClient::Transfer {
  const TransferOptions& options;
  int64_t done = 0;
  int64_t total = 0;
  absl::Time last_success = absl::Now();

  void Advance(int64_t bytes) {
    done += bytes;
    last_success = absl::Now();
    if (options.progress) options.progress(done, total);
  }
  bool cancelled() const {
    return options.cancellation != nullptr && options.cancellation->cancelled();
  }
};

ArtifactClient::ArtifactClient(Find find) : find_(std::move(find)) {}
ArtifactClient::~ArtifactClient() = default;

absl::StatusOr<v1::ArtifactService::Stub*> ArtifactClient::Connect() {
  absl::StatusOr<CoordinatorEndpoint> endpoint = find_();
  if (!endpoint.ok()) return endpoint.status();
  if (stub_ == nullptr || endpoint->address != address_) {
    address_ = endpoint->address;
    stub_ = v1::ArtifactService::NewStub(NewCoordinatorChannel(address_));
  }
  token_ = endpoint->token;
  return stub_.get();
}

absl::Status ArtifactClient::Persist(Transfer* transfer,
                                     const std::function<absl::Status()>& attempt) {
  absl::Duration wait = absl::Milliseconds(100);
  for (int aborted = 0;;) {
    if (transfer->cancelled()) return absl::CancelledError("the transfer was cancelled");
    const absl::Time before = transfer->last_success;
    const absl::Status status = attempt();
    if (status.ok()) {
      transfer->last_success = absl::Now();
      return status;
    }
    if (transfer->cancelled()) return absl::CancelledError("the transfer was cancelled");
    if (!MayPass(status)) return status;
    if (absl::IsAborted(status) && ++aborted == kMaxAborted) {
      return absl::DataLossError(status.message());
    }
    if (transfer->last_success != before) wait = absl::Milliseconds(100);
    if (absl::Now() - transfer->last_success > transfer->options.patience) return status;
    absl::SleepFor(wait);
    wait = std::min(wait * 2, absl::Seconds(2));
  }
}

absl::StatusOr<v1::Artifact> ArtifactClient::Get(const std::string& name,
                                                 const TransferOptions& options) {
  Transfer transfer{options};
  v1::GetArtifactRequest request;
  request.set_name(name);
  v1::Artifact artifact;
  const absl::Status status = Persist(&transfer, [&]() -> absl::Status {
    absl::StatusOr<v1::ArtifactService::Stub*> stub = Connect();
    if (!stub.ok()) return stub.status();
    grpc::ClientContext context;
    AddToken(token_, &context);
    CancellableCall call(options.cancellation, &context);
    return FromGrpc((*stub)->GetArtifact(&context, request, &artifact));
  });
  if (!status.ok()) return status;
  return artifact;
}

absl::StatusOr<v1::Artifact> ArtifactClient::Upload(v1::ArtifactKind kind,
                                                    const std::vector<LocalFile>& files,
                                                    const TransferOptions& options) {
  Transfer transfer{options};
  v1::CreateArtifactRequest create;
  create.set_kind(kind);
  for (const LocalFile& file : files) {
    absl::StatusOr<int64_t> bytes = SizeOf(file.local);
    if (!bytes.ok()) return bytes.status();
    absl::StatusOr<std::string> sha256 = Sha256OfFile(file.local);
    if (!sha256.ok()) return sha256.status();
    if (transfer.cancelled()) return absl::CancelledError("the transfer was cancelled");
    v1::ArtifactFile* entry = create.add_files();
    entry->set_path(file.path);
    entry->set_bytes(*bytes);
    entry->set_sha256(*sha256);
    transfer.total += *bytes;
  }
  v1::Artifact artifact;
  const auto call = [&](const std::function<grpc::Status(v1::ArtifactService::Stub*,
                                                         grpc::ClientContext*)>& rpc) {
    return Persist(&transfer, [&]() -> absl::Status {
      absl::StatusOr<v1::ArtifactService::Stub*> stub = Connect();
      if (!stub.ok()) return stub.status();
      grpc::ClientContext context;
      AddToken(token_, &context);
      CancellableCall cancellable(options.cancellation, &context);
      return FromGrpc(rpc(*stub, &context));
    });
  };
  absl::Status status = call([&](v1::ArtifactService::Stub* stub, grpc::ClientContext* context) {
    return stub->CreateArtifact(context, create, &artifact);
  });
  if (!status.ok()) return status;
  if (artifact.state() == v1::ARTIFACT_STATE_READY) {
    transfer.Advance(transfer.total);
    return artifact;
  }
  for (size_t i = 0; i < files.size(); ++i) {
    status = UploadFile(artifact.name(), files[i], create.files(i).bytes(), &transfer);
    if (!status.ok()) return status;
  }
  v1::FinalizeArtifactRequest finalize;
  finalize.set_name(artifact.name());
  status = call([&](v1::ArtifactService::Stub* stub, grpc::ClientContext* context) {
    return stub->FinalizeArtifact(context, finalize, &artifact);
  });
  if (!status.ok()) return status;
  return artifact;
}

absl::Status ArtifactClient::UploadFile(const std::string& artifact, const LocalFile& file,
                                        int64_t bytes, Transfer* transfer) {
  const int64_t before = transfer->done;
  const absl::Status status = Persist(transfer, [&]() -> absl::Status {
    transfer->done = before;
    return SendFrom(artifact, file, bytes, transfer);
  });
  if (!status.ok()) {
    return absl::Status(status.code(), absl::StrCat(file.local, ": ", status.message()));
  }
  return absl::OkStatus();
}

absl::Status ArtifactClient::SendFrom(const std::string& artifact, const LocalFile& file,
                                      int64_t bytes, Transfer* transfer) {
  absl::StatusOr<v1::ArtifactService::Stub*> stub = Connect();
  if (!stub.ok()) return stub.status();
  v1::WriteFileResponse response;
  {
    grpc::ClientContext context;
    AddToken(token_, &context);
    CancellableCall call(transfer->options.cancellation, &context);
    v1::GetWriteStatusRequest request;
    request.set_artifact(artifact);
    request.set_path(file.path);
    const grpc::Status status = (*stub)->GetWriteStatus(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
  }
  int64_t offset = response.committed_bytes();
  transfer->Advance(offset);
  if (offset >= bytes) return absl::OkStatus();
  File source(file.local, O_RDONLY);
  if (source.fd() < 0) return FileError("cannot read", file.local);
  grpc::ClientContext context;
  AddToken(token_, &context);
  CancellableCall call(transfer->options.cancellation, &context);
  auto writer = (*stub)->WriteFile(&context, &response);
  std::string buffer(kChunkBytes, '\0');
  for (bool first = true; offset < bytes; first = false) {
    const ssize_t n =
        pread(source.fd(), buffer.data(), std::min<int64_t>(kChunkBytes, bytes - offset), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      context.TryCancel();
      writer->Finish();
      return absl::FailedPreconditionError("the file became shorter while it was uploaded");
    }
    v1::WriteFileRequest chunk;
    if (first) {
      chunk.set_artifact(artifact);
      chunk.set_path(file.path);
    }
    chunk.set_offset(offset);
    chunk.set_data(buffer.data(), n);
    chunk.set_crc32c(Crc32c(buffer.data(), n));
    if (!writer->Write(chunk)) break;
    offset += n;
    transfer->Advance(n);
  }
  writer->WritesDone();
  const absl::Status status = FromGrpc(writer->Finish());
  // A chunk arrived broken, or another upload of the same content moved the offset: ask anew.
  if (absl::IsDataLoss(status) || absl::IsFailedPrecondition(status)) {
    return absl::AbortedError(status.message());
  }
  return status;
}

absl::Status ArtifactClient::Download(const std::string& name, const std::string& prefix,
                                      const std::string& directory,
                                      const TransferOptions& options) {
  absl::StatusOr<v1::Artifact> artifact = Get(name, options);
  if (!artifact.ok()) return artifact.status();
  if (artifact->state() != v1::ARTIFACT_STATE_READY) {
    return absl::FailedPreconditionError(absl::StrCat(name, " is not uploaded completely"));
  }
  Transfer transfer{options};
  std::vector<const v1::ArtifactFile*> files;
  for (const v1::ArtifactFile& file : artifact->files()) {
    if (!absl::StartsWith(file.path(), prefix)) continue;
    if (!GoodPath(file.path()) || !GoodPath(file.path().substr(prefix.size()))) {
      return absl::DataLossError(
          absl::StrCat(name, " has a file with the bad path ", absl::CEscape(file.path())));
    }
    files.push_back(&file);
    transfer.total += file.bytes();
  }
  for (const v1::ArtifactFile* file : files) {
    const std::string to = absl::StrCat(directory, "/", file->path().substr(prefix.size()));
    std::error_code error;
    std::filesystem::create_directories(std::filesystem::path(to).parent_path(), error);
    if (error) {
      return absl::FailedPreconditionError(
          absl::StrCat("cannot make the directory of ", to, ": ", error.message()));
    }
    if (absl::Status s = DownloadFile(name, *file, to, &transfer); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status ArtifactClient::DownloadFile(const std::string& artifact, const v1::ArtifactFile& file,
                                          const std::string& to, Transfer* transfer) {
  struct stat info;
  if (stat(to.c_str(), &info) == 0 && info.st_size == file.bytes()) {
    absl::StatusOr<std::string> there = Sha256OfFile(to);
    if (there.ok() && *there == file.sha256()) {
      transfer->Advance(file.bytes());
      return absl::OkStatus();
    }
  }
  const std::string part = to + ".part";
  const int64_t before = transfer->done;
  // A partial file of other content is noticed by its digest: then once more from the start.
  for (bool again : {true, false}) {
    File target(part, O_RDWR | O_CREAT);
    if (target.fd() < 0) return FileError("cannot write", part);
    const absl::Status status = Persist(transfer, [&] {
      transfer->done = before;
      return ReceiveInto(artifact, file, target.fd(), transfer);
    });
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat(to, ": ", status.message()));
    }
    absl::StatusOr<std::string> sha256 = Sha256OfFile(part);
    if (!sha256.ok()) return sha256.status();
    if (*sha256 == file.sha256()) {
      if (fsync(target.fd()) != 0 || rename(part.c_str(), to.c_str()) != 0) {
        return FileError("cannot write", to);
      }
      return absl::OkStatus();
    }
    if (!again || ftruncate(target.fd(), 0) != 0) break;
  }
  unlink(part.c_str());
  return absl::DataLossError(absl::StrCat(to, ": what arrived is not what ", artifact,
                                          " declares (SHA-256 differs). Download it again."));
}

absl::Status ArtifactClient::ReceiveInto(const std::string& artifact, const v1::ArtifactFile& file,
                                         int fd, Transfer* transfer) {
  struct stat info;
  if (fstat(fd, &info) != 0) return FileError("cannot read", file.path());
  int64_t offset = info.st_size;
  if (offset > file.bytes()) {
    if (ftruncate(fd, 0) != 0) return FileError("cannot write", file.path());
    offset = 0;
  }
  transfer->Advance(offset);
  if (offset == file.bytes()) return absl::OkStatus();
  absl::StatusOr<v1::ArtifactService::Stub*> stub = Connect();
  if (!stub.ok()) return stub.status();
  grpc::ClientContext context;
  AddToken(token_, &context);
  CancellableCall call(transfer->options.cancellation, &context);
  v1::ReadFileRequest request;
  request.set_artifact(artifact);
  request.set_path(file.path());
  request.set_offset(offset);
  auto reader = (*stub)->ReadFile(&context, request);
  v1::ReadFileResponse chunk;
  absl::Status local;
  while (local.ok() && reader->Read(&chunk)) {
    if (chunk.offset() != offset || Crc32c(chunk.data()) != chunk.crc32c()) {
      local = absl::AbortedError("a chunk arrived broken");
    } else if (pwrite(fd, chunk.data().data(), chunk.data().size(), offset) !=
               static_cast<ssize_t>(chunk.data().size())) {
      local = FileError("cannot write", file.path());
    } else {
      offset += chunk.data().size();
      transfer->Advance(chunk.data().size());
    }
  }
  if (!local.ok()) context.TryCancel();
  const grpc::Status status = reader->Finish();
  if (!local.ok()) return local;
  if (!status.ok()) return FromGrpc(status);
  if (offset != file.bytes()) return absl::UnavailableError("the stream ended early");
  return absl::OkStatus();
}

}  // namespace attune
