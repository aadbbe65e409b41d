#include "proto/metric_names.h"

namespace attune::metrics {

const std::vector<MetricName>& AllMetrics() {
  static const auto* table = new std::vector<MetricName>{
      {kJobs, MetricType::kGauge, {"state"}, "Jobs by state."},
      {kJobQueueWaitSeconds,
       MetricType::kHistogram,
       {},
       "Time from entering the queue to getting devices."},
      {kJobFailuresTotal, MetricType::kCounter, {"cause"}, "Jobs that ended in FAILED, by cause."},
      {kJobRestartsTotal,
       MetricType::kCounter,
       {"cause"},
       "Attempts that failed and were started again, by cause."},
      {kDevices,
       MetricType::kGauge,
       {"type", "use"},
       "Devices of known workers: use is free, "
       "leased, faulty or away (worker not connected)."},
      {kGpuUtilizationRatio,
       MetricType::kGauge,
       {"worker", "device"},
       "Part of the time in which a kernel ran on the GPU, 0 to 1."},
      {kGpuMemoryUsedBytes,
       MetricType::kGauge,
       {"worker", "device"},
       "Device memory that any process uses."},
      {kGpuPowerWatts, MetricType::kGauge, {"worker", "device"}, "Power that the GPU draws."},
      {kGpuTemperatureCelsius, MetricType::kGauge, {"worker", "device"}, "Temperature of the GPU."},
      {kGpuEccErrors,
       MetricType::kGauge,
       {"worker", "device", "kind"},
       "Memory errors since the driver was loaded: kind is corrected or uncorrected."},
      {kGpuXidErrors,
       MetricType::kGauge,
       {"worker", "device"},
       "XID errors that the driver reported since the agent started."},
      {kGpuHealthy,
       MetricType::kGauge,
       {"worker", "device"},
       "1 while the GPU may be leased, 0 after an error."},
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
