// Checkpoints of jobs. Transport only.
#pragma once

#include "attune/v1/checkpoint_service.grpc.pb.h"
#include "server/rpc/context.h"

namespace attune {

class CheckpointServiceImpl final : public v1::CheckpointService::CallbackService {
 public:
  explicit CheckpointServiceImpl(const RpcContext& context) : context_(context) {}

  grpc::ServerUnaryReactor* ListCheckpoints(grpc::CallbackServerContext* call,
                                            const v1::ListCheckpointsRequest* request,
                                            v1::ListCheckpointsResponse* response) override;
  grpc::ServerUnaryReactor* GetCheckpoint(grpc::CallbackServerContext* call,
                                          const v1::GetCheckpointRequest* request,
                                          v1::Checkpoint* response) override;
  grpc::ServerUnaryReactor* DeleteCheckpoint(grpc::CallbackServerContext* call,
                                             const v1::DeleteCheckpointRequest* request,
                                             google::protobuf::Empty* response) override;

 private:
  const RpcContext& context_;
};

}  // namespace attune
