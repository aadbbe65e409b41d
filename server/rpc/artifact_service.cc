#include "server/rpc/artifact_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/crc32c.h"
#include "server/core/errors.h"
#include "server/core/names.h"

namespace attune {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;
constexpr char kListFilter[] = "artifacts";

std::string ArtifactMethod(const char* name) {
  return absl::StrCat("attune.v1.ArtifactService/", name);
}

template <typename T>
absl::Status Answer(absl::StatusOr<T> result, T* response) {
  if (result.ok()) *response = *std::move(result);
  return result.status();
}

// Appends chunks as they come: one read, one write to disk, the next read.
class WriteFileReactor final : public grpc::ServerReadReactor<v1::WriteFileRequest> {
 public:
  WriteFileReactor(const RpcContext& context, grpc::CallbackServerContext* call,
                   v1::WriteFileResponse* response)
      : context_(context),
        guard_(context, *call, ArtifactMethod("WriteFile"), /*unary=*/false),
        response_(response) {
    if (guard_.admission().ok()) {
      StartRead(&request_);
    } else {
      Finish(guard_.End(guard_.admission()));
    }
  }

  void OnReadDone(bool ok) override {
    if (!ok) {  // the client has sent all, or is gone
      const bool empty = artifact_.empty();
      Finish(
          guard_.End(empty ? absl::InvalidArgumentError("no chunk was sent") : absl::OkStatus()));
      return;
    }
    context_.io->Post([this] { WriteChunk(); });
  }
  void OnDone() override { delete this; }

 private:
  void WriteChunk() {
    if (artifact_.empty()) {
      artifact_ = request_.artifact();
      path_ = request_.path();
    }
    const absl::StatusOr<int64_t> committed = context_.artifacts->Write(
        artifact_, path_, request_.offset(), request_.data(), request_.crc32c());
    if (!committed.ok()) {
      Finish(guard_.End(committed.status()));
      return;
    }
    response_->set_committed_bytes(*committed);
    StartRead(&request_);
  }

  const RpcContext& context_;
  CallGuard guard_;
  v1::WriteFileResponse* const response_;
  v1::WriteFileRequest request_;
  std::string artifact_, path_;
};

// Sends a file chunk by chunk: one read from disk, one write to the stream, the next read.
class ReadFileReactor final : public grpc::ServerWriteReactor<v1::ReadFileResponse> {
 public:
  ReadFileReactor(const RpcContext& context, grpc::CallbackServerContext* call,
                  const v1::ReadFileRequest& request)
      : context_(context), guard_(context, *call, ArtifactMethod("ReadFile"), /*unary=*/false) {
    if (!guard_.admission().ok()) {
      Finish(guard_.End(guard_.admission()));
      return;
    }
    context_.io->Post([this, request] { Open(request); });
  }

  void OnWriteDone(bool ok) override {
    if (ok) {
      context_.io->Post([this] { SendChunk(); });
    } else {
      Finish(guard_.End(absl::CancelledError("the reader is gone")));
    }
  }
  void OnDone() override { delete this; }

 private:
  void Open(const v1::ReadFileRequest& request) {
    absl::StatusOr<ArtifactStore::OpenedFile> opened =
        context_.artifacts->OpenFile(request.artifact(), request.path());
    if (!opened.ok()) {
      Finish(guard_.End(opened.status()));
      return;
    }
    if (request.offset() < 0 || request.limit() < 0 || request.offset() > opened->bytes) {
      Finish(guard_.End(absl::OutOfRangeError(
          absl::StrCat("offset ", request.offset(), " and limit ", request.limit(),
                       " do not fit a file of ", opened->bytes, " bytes"))));
      return;
    }
    file_ = opened->file;
    offset_ = request.offset();
    end_ = request.limit() == 0 ? opened->bytes
                                : offset_ + std::min(request.limit(), opened->bytes - offset_);
    SendChunk();
  }

  void SendChunk() {
    if (offset_ == end_) {
      Finish(guard_.End(absl::OkStatus()));
      return;
    }
    const int64_t size = std::min(kChunkBytes, end_ - offset_);
    absl::StatusOr<std::string> data = file_->Read(offset_, size);
    if (data.ok() && static_cast<int64_t>(data->size()) != size) {
      data = absl::DataLossError("a stored file is shorter than it was when it was checked");
    }
    if (!data.ok()) {
      Finish(guard_.End(data.status()));
      return;
    }
    response_.set_offset(offset_);
    response_.set_crc32c(Crc32c(*data));
    response_.set_data(*std::move(data));
    offset_ += size;
    StartWrite(&response_);
  }

  const RpcContext& context_;
  CallGuard guard_;
  std::shared_ptr<File> file_;
  int64_t offset_ = 0;
  int64_t end_ = 0;
  v1::ReadFileResponse response_;
};

}  // namespace

grpc::ServerUnaryReactor* ArtifactServiceImpl::CreateArtifact(
    grpc::CallbackServerContext* call, const v1::CreateArtifactRequest* request,
    v1::Artifact* response) {
  return UnaryIo(context_, call, ArtifactMethod("CreateArtifact"), [this, request, response] {
    const std::vector<v1::ArtifactFile> files(request->files().begin(), request->files().end());
    return Answer(context_.artifacts->Create(request->kind(), files, absl::Now()), response);
  });
}

grpc::ServerUnaryReactor* ArtifactServiceImpl::GetArtifact(grpc::CallbackServerContext* call,
                                                           const v1::GetArtifactRequest* request,
                                                           v1::Artifact* response) {
  return UnaryIo(context_, call, ArtifactMethod("GetArtifact"), [this, request, response] {
    return Answer(context_.artifacts->Get(request->name()), response);
  });
}

grpc::ServerUnaryReactor* ArtifactServiceImpl::ListArtifacts(
    grpc::CallbackServerContext* call, const v1::ListArtifactsRequest* request,
    v1::ListArtifactsResponse* response) {
  return UnaryIo(
      context_, call, ArtifactMethod("ListArtifacts"), [this, request, response]() -> absl::Status {
        const absl::StatusOr<int> size = PageSize(request->page_size(), kPageDefault, kPageMax);
        if (!size.ok()) return size.status();
        absl::StatusOr<std::string> after = std::string();
        if (!request->page_token().empty())
          after = ParsePageToken(request->page_token(), kListFilter);
        if (!after.ok()) return after.status();
        std::vector<v1::Artifact> artifacts = context_.artifacts->List(*after, *size + 1);
        const bool more = static_cast<int>(artifacts.size()) > *size;
        if (more) artifacts.pop_back();
        if (more)
          response->set_next_page_token(MakePageToken(artifacts.back().name(), kListFilter));
        for (v1::Artifact& artifact : artifacts) *response->add_artifacts() = std::move(artifact);
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* ArtifactServiceImpl::DeleteArtifact(
    grpc::CallbackServerContext* call, const v1::DeleteArtifactRequest* request,
    google::protobuf::Empty* response) {
  return Unary(context_, call, ArtifactMethod("DeleteArtifact"), [&](Done done) {
    context_.runner->Call(
        DeleteArtifactEvent{0, request->name()},
        [done = std::move(done)](absl::Status status, v1::Job) { done(std::move(status)); });
  });
}

grpc::ServerReadReactor<v1::WriteFileRequest>* ArtifactServiceImpl::WriteFile(
    grpc::CallbackServerContext* call, v1::WriteFileResponse* response) {
  return new WriteFileReactor(context_, call, response);
}

grpc::ServerUnaryReactor* ArtifactServiceImpl::GetWriteStatus(
    grpc::CallbackServerContext* call, const v1::GetWriteStatusRequest* request,
    v1::WriteFileResponse* response) {
  return UnaryIo(context_, call, ArtifactMethod("GetWriteStatus"), [this, request, response] {
    const absl::StatusOr<int64_t> committed =
        context_.artifacts->CommittedBytes(request->artifact(), request->path());
    if (committed.ok()) response->set_committed_bytes(*committed);
    return committed.status();
  });
}

grpc::ServerUnaryReactor* ArtifactServiceImpl::FinalizeArtifact(
    grpc::CallbackServerContext* call, const v1::FinalizeArtifactRequest* request,
    v1::Artifact* response) {
  return UnaryIo(context_, call, ArtifactMethod("FinalizeArtifact"), [this, request, response] {
    return Answer(context_.artifacts->Finalize(request->name()), response);
  });
}

grpc::ServerWriteReactor<v1::ReadFileResponse>* ArtifactServiceImpl::ReadFile(
    grpc::CallbackServerContext* call, const v1::ReadFileRequest* request) {
  return new ReadFileReactor(context_, call, *request);
}

}  // namespace attune
