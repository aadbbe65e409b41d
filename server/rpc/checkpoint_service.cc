#include "server/rpc/checkpoint_service.h"

#include <memory>
#include <utility>

namespace attune {

grpc::ServerUnaryReactor* CheckpointServiceImpl::ListCheckpoints(
    grpc::CallbackServerContext* call, const v1::ListCheckpointsRequest* request,
    v1::ListCheckpointsResponse* response) {
  return Unary(context_, call, "attune.v1.CheckpointService/ListCheckpoints", [&](Done done) {
    auto status = std::make_shared<absl::Status>();
    context_.runner->Query(
        [request, response, status](const Coordinator& coordinator) {
          auto checkpoints = coordinator.ListCheckpoints(request->job());
          *status = checkpoints.status();
          if (!checkpoints.ok()) return;
          for (v1::Checkpoint& checkpoint : *checkpoints) {
            *response->add_checkpoints() = std::move(checkpoint);
          }
        },
        [status, done = std::move(done)] { done(*status); });
  });
}

grpc::ServerUnaryReactor* CheckpointServiceImpl::GetCheckpoint(
    grpc::CallbackServerContext* call, const v1::GetCheckpointRequest* request,
    v1::Checkpoint* response) {
  return Unary(context_, call, "attune.v1.CheckpointService/GetCheckpoint", [&](Done done) {
    auto status = std::make_shared<absl::Status>();
    context_.runner->Query(
        [request, response, status](const Coordinator& coordinator) {
          auto checkpoint = coordinator.GetCheckpoint(request->name());
          *status = checkpoint.status();
          if (checkpoint.ok()) *response = *std::move(checkpoint);
        },
        [status, done = std::move(done)] { done(*status); });
  });
}

grpc::ServerUnaryReactor* CheckpointServiceImpl::DeleteCheckpoint(
    grpc::CallbackServerContext* call, const v1::DeleteCheckpointRequest* request,
    google::protobuf::Empty* response) {
  return Unary(context_, call, "attune.v1.CheckpointService/DeleteCheckpoint", [&](Done done) {
    context_.runner->Call(
        DeleteCheckpointEvent{0, request->name()},
        [done = std::move(done)](absl::Status status, v1::Job) { done(std::move(status)); });
  });
}

}  // namespace attune
