// The one table of Prometheus metrics: names, types, labels, help. The coordinator exports
// exactly these, dashboards and alerts may use only these.
//
// Rules: base units (seconds, bytes), `_total` on counters, no label named `job` (Prometheus
// sets it) and none whose values grow with the number of jobs.
#pragma once

#include <string>
#include <vector>

namespace attune::metrics {

enum class MetricType { kCounter, kGauge, kHistogram };

struct MetricName {
  const char* name;
  MetricType type;
  std::vector<const char*> labels;
  const char* help;
};

inline constexpr char kJobs[] = "attune_jobs";
inline constexpr char kJobQueueWaitSeconds[] = "attune_job_queue_wait_seconds";
inline constexpr char kJobFailuresTotal[] = "attune_job_failures_total";
inline constexpr char kJobRestartsTotal[] = "attune_job_restarts_total";
inline constexpr char kDevices[] = "attune_devices";
inline constexpr char kGpuUtilizationRatio[] = "attune_gpu_utilization_ratio";
inline constexpr char kGpuMemoryUsedBytes[] = "attune_gpu_memory_used_bytes";
inline constexpr char kGpuPowerWatts[] = "attune_gpu_power_watts";
inline constexpr char kGpuTemperatureCelsius[] = "attune_gpu_temperature_celsius";
inline constexpr char kGpuEccErrors[] = "attune_gpu_ecc_errors";
inline constexpr char kGpuXidErrors[] = "attune_gpu_xid_errors";
inline constexpr char kGpuHealthy[] = "attune_gpu_healthy";
inline constexpr char kTokensPerSecond[] = "attune_tokens_per_second";
inline constexpr char kTrainedTokensTotal[] = "attune_trained_tokens_total";
inline constexpr char kStepsTotal[] = "attune_steps_total";
inline constexpr char kCheckpointsTotal[] = "attune_checkpoints_total";
inline constexpr char kCheckpointBytesTotal[] = "attune_checkpoint_bytes_total";
inline constexpr char kWorkerSessions[] = "attune_worker_sessions";
inline constexpr char kStoreCommitSeconds[] = "attune_store_commit_seconds";
inline constexpr char kGrpcServerStartedTotal[] = "grpc_server_started_total";
inline constexpr char kGrpcServerHandledTotal[] = "grpc_server_handled_total";
inline constexpr char kGrpcServerHandlingSeconds[] = "grpc_server_handling_seconds";
inline constexpr char kBuildInfo[] = "attune_build_info";

// Every metric that the coordinator exports, each once.
const std::vector<MetricName>& AllMetrics();

// The entry of `name`, or null.
const MetricName* FindMetric(const std::string& name);

}  // namespace attune::metrics
