// Streams of events, metrics and logs. Transport only: pages come from the watch hub.
#pragma once

#include "attune/v1/watch_service.grpc.pb.h"
#include "server/rpc/context.h"

namespace attune {

class WatchServiceImpl final : public v1::WatchService::CallbackService {
 public:
  explicit WatchServiceImpl(const RpcContext& context) : context_(context) {}

  grpc::ServerWriteReactor<v1::WatchEventsResponse>* WatchEvents(
      grpc::CallbackServerContext* call, const v1::WatchRequest* request) override;
  grpc::ServerWriteReactor<v1::WatchMetricsResponse>* WatchMetrics(
      grpc::CallbackServerContext* call, const v1::WatchRequest* request) override;
  grpc::ServerWriteReactor<v1::WatchLogsResponse>* WatchLogs(
      grpc::CallbackServerContext* call, const v1::WatchRequest* request) override;

 private:
  const RpcContext& context_;
};

}  // namespace attune
