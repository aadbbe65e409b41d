// Files up and down. Transport only; disk work runs on the I/O pool.
#pragma once

#include "attune/v1/artifact_service.grpc.pb.h"
#include "server/rpc/context.h"

namespace attune {

class ArtifactServiceImpl final : public v1::ArtifactService::CallbackService {
 public:
  explicit ArtifactServiceImpl(const RpcContext& context) : context_(context) {}

  grpc::ServerUnaryReactor* CreateArtifact(grpc::CallbackServerContext* call,
                                           const v1::CreateArtifactRequest* request,
                                           v1::Artifact* response) override;
  grpc::ServerUnaryReactor* GetArtifact(grpc::CallbackServerContext* call,
                                        const v1::GetArtifactRequest* request,
                                        v1::Artifact* response) override;
  grpc::ServerUnaryReactor* ListArtifacts(grpc::CallbackServerContext* call,
                                          const v1::ListArtifactsRequest* request,
                                          v1::ListArtifactsResponse* response) override;
  grpc::ServerUnaryReactor* DeleteArtifact(grpc::CallbackServerContext* call,
                                           const v1::DeleteArtifactRequest* request,
                                           google::protobuf::Empty* response) override;
  grpc::ServerReadReactor<v1::WriteFileRequest>* WriteFile(
      grpc::CallbackServerContext* call, v1::WriteFileResponse* response) override;
  grpc::ServerUnaryReactor* GetWriteStatus(grpc::CallbackServerContext* call,
                                           const v1::GetWriteStatusRequest* request,
                                           v1::WriteFileResponse* response) override;
  grpc::ServerUnaryReactor* FinalizeArtifact(grpc::CallbackServerContext* call,
                                             const v1::FinalizeArtifactRequest* request,
                                             v1::Artifact* response) override;
  grpc::ServerWriteReactor<v1::ReadFileResponse>* ReadFile(
      grpc::CallbackServerContext* call, const v1::ReadFileRequest* request) override;

 private:
  const RpcContext& context_;
};

}  // namespace attune
