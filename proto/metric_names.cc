#include "proto/metric_names.h"

namespace attune::metrics {

const std::vector<MetricName>& AllMetrics() {
  static const auto* table = new std::vector<MetricName>{
      {kJobs, MetricType::kGauge, {"state"}, "Jobs by state."},
      {kJobQueueWaitSeconds,
       MetricType::kHistogram,
       {},
       "Time from entering the queue to getting devices."},
      {kJobFailuresTotal,
       MetricType::kCounter,
       {"cause"},
       "Jobs that ended in FAILED, by cause."},
      {kJobRestartsTotal,
       MetricType::kCounter,
       {"cause"},
       "Attempts that failed and were started again, by cause."},
      {kDevices, MetricType::kGauge, {"type", "use"}, "Devices of known workers: use is free, "
                                                      "leased or away (worker not connected)."},
      {kTokensPerSecond,
       MetricType::kGauge,
       {},
       "Tokens trained per second, summed over the running jobs."},
      {kTrainedTokensTotal,
       MetricType::kCounter,
       {},
       "Tokens that counted in a loss, repeated steps included."},
      {kStepsTotal, MetricType::kCounter, {}, "Optimiser steps, repeated steps included."},
      {kCheckpointsTotal, MetricType::kCounter, {}, "Checkpoints committed."},
      {kCheckpointBytesTotal, MetricType::kCounter, {}, "Bytes of the checkpoints committed."},
      {kWorkerSessions, MetricType::kGauge, {}, "Connected workers."},
      {kStoreCommitSeconds,
       MetricType::kHistogram,
       {},
       "Time of one durable transaction of the job store."},
      {kGrpcServerStartedTotal,
       MetricType::kCounter,
       {"grpc_service", "grpc_method"},
       "Calls started."},
      {kGrpcServerHandledTotal,
       MetricType::kCounter,
       {"grpc_service", "grpc_method", "grpc_code"},
       "Calls ended, by status code."},
      {kGrpcServerHandlingSeconds,
       MetricType::kHistogram,
       {"grpc_service", "grpc_method"},
       "Time from start to end of unary calls."},
      {kBuildInfo, MetricType::kGauge, {"version"}, "Always 1; labels say what runs."},
  };
  return *table;
}

const MetricName* FindMetric(const std::string& name) {
  for (const MetricName& metric : AllMetrics()) {
    if (name == metric.name) return &metric;
  }
  return nullptr;
}

}  // namespace attune::metrics
