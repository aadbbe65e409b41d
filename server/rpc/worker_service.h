// Sessions of agents. Transport only: messages become events of the coordinator.
#pragma once

#include "attune/v1/worker_service.grpc.pb.h"
#include "server/rpc/context.h"

namespace attune {

class WorkerServiceImpl final : public v1::WorkerService::CallbackService {
 public:
  explicit WorkerServiceImpl(const RpcContext& context) : context_(context) {}

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* Session(
      grpc::CallbackServerContext* call) override;

 private:
  const RpcContext& context_;
};

}  // namespace attune
