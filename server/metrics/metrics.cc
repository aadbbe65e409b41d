#include "server/metrics/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "proto/metric_names.h"
#include "server/core/job_state.h"
#include "server/rpc/to_grpc.h"

namespace attune {
namespace {

using prometheus::Histogram;
using prometheus::Labels;

const char* Help(const char* name) {
  const metrics::MetricName* metric = metrics::FindMetric(name);
  CHECK(metric != nullptr);
  return metric->help;
}

// Every label of the table, in its order, with these values.
Labels WithValues(const char* name, std::vector<std::string> values) {
  const metrics::MetricName* metric = metrics::FindMetric(name);
  CHECK(metric != nullptr && metric->labels.size() == values.size());
  Labels labels;
  for (size_t i = 0; i < values.size(); ++i) labels[metric->labels[i]] = std::move(values[i]);
  return labels;
}

Histogram::BucketBoundaries WaitBuckets() {
  return {0.1, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600};
}
Histogram::BucketBoundaries CallBuckets() {
  return {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30};
}

const char* TypeLabel(v1::DeviceType type) {
  return type == v1::DEVICE_TYPE_CUDA ? "cuda" : "cpu";
}

}  // namespace

struct Metrics::Families {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  prometheus::Family<prometheus::Gauge>& MakeGauge(const char* name) {
    return prometheus::BuildGauge().Name(name).Help(Help(name)).Register(*registry);
  }
  prometheus::Family<prometheus::Counter>& MakeCounter(const char* name) {
    return prometheus::BuildCounter().Name(name).Help(Help(name)).Register(*registry);
  }
  prometheus::Family<Histogram>& MakeHistogram(const char* name) {
    return prometheus::BuildHistogram().Name(name).Help(Help(name)).Register(*registry);
  }

  prometheus::Family<prometheus::Gauge>& jobs = MakeGauge(metrics::kJobs);
  prometheus::Family<prometheus::Gauge>& devices = MakeGauge(metrics::kDevices);
  prometheus::Family<prometheus::Counter>& failures = MakeCounter(metrics::kJobFailuresTotal);
  prometheus::Family<prometheus::Counter>& restarts = MakeCounter(metrics::kJobRestartsTotal);
  prometheus::Family<prometheus::Counter>& started = MakeCounter(metrics::kGrpcServerStartedTotal);
  prometheus::Family<prometheus::Counter>& handled = MakeCounter(metrics::kGrpcServerHandledTotal);
  prometheus::Family<Histogram>& handling = MakeHistogram(metrics::kGrpcServerHandlingSeconds);
  using GaugeFamily = prometheus::Family<prometheus::Gauge>;
  GaugeFamily& gpu_utilization = MakeGauge(metrics::kGpuUtilizationRatio);
  GaugeFamily& gpu_memory = MakeGauge(metrics::kGpuMemoryUsedBytes);
  GaugeFamily& gpu_power = MakeGauge(metrics::kGpuPowerWatts);
  GaugeFamily& gpu_temperature = MakeGauge(metrics::kGpuTemperatureCelsius);
  GaugeFamily& gpu_ecc = MakeGauge(metrics::kGpuEccErrors);
  GaugeFamily& gpu_xid = MakeGauge(metrics::kGpuXidErrors);
  GaugeFamily& gpu_healthy = MakeGauge(metrics::kGpuHealthy);
  std::vector<std::pair<GaugeFamily*, prometheus::Gauge*>> gpu_gauges;  // that exist now
  Histogram& queue_wait = MakeHistogram(metrics::kJobQueueWaitSeconds).Add({}, WaitBuckets());
  Histogram& commit = MakeHistogram(metrics::kStoreCommitSeconds).Add({}, CallBuckets());
  prometheus::Gauge& tokens_per_s = MakeGauge(metrics::kTokensPerSecond).Add({});
  prometheus::Gauge& sessions = MakeGauge(metrics::kWorkerSessions).Add({});
  prometheus::Counter& trained_tokens = MakeCounter(metrics::kTrainedTokensTotal).Add({});
  prometheus::Counter& steps = MakeCounter(metrics::kStepsTotal).Add({});
  prometheus::Counter& checkpoints = MakeCounter(metrics::kCheckpointsTotal).Add({});
  prometheus::Counter& checkpoint_bytes = MakeCounter(metrics::kCheckpointBytesTotal).Add({});
  prometheus::Family<prometheus::Gauge>& build_info = MakeGauge(metrics::kBuildInfo);
  std::unique_ptr<prometheus::Exposer> exposer;
};

Metrics::Metrics(const std::string& version) : families_(std::make_unique<Families>()) {
  families_->build_info.Add(WithValues(metrics::kBuildInfo, {version})).Set(1);
  // Counters exist from the start, so that rate() sees the first failure.
  for (int cause = 1; cause < v1::FailureCause_ARRAYSIZE; ++cause) {
    const std::string label = CauseLabel(static_cast<v1::FailureCause>(cause));
    families_->failures.Add(WithValues(metrics::kJobFailuresTotal, {label}));
    families_->restarts.Add(WithValues(metrics::kJobRestartsTotal, {label}));
  }
}

Metrics::~Metrics() = default;

absl::StatusOr<int> Metrics::Serve(const std::string& address) {
  try {
    families_->exposer = std::make_unique<prometheus::Exposer>(address, 1);
    families_->exposer->RegisterCollectable(families_->registry);
    const std::vector<int> ports = families_->exposer->GetListeningPorts();
    return ports.empty() ? 0 : ports.front();
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("cannot serve metrics on ", address, ": ", error.what()));
  }
}

void Metrics::QueueWait(double wait_s) {
  families_->queue_wait.Observe(wait_s);
}

void Metrics::Failure(v1::FailureCause cause) {
  families_->failures.Add(WithValues(metrics::kJobFailuresTotal, {CauseLabel(cause)})).Increment();
}

void Metrics::Restart(v1::FailureCause cause) {
  families_->restarts.Add(WithValues(metrics::kJobRestartsTotal, {CauseLabel(cause)})).Increment();
}

void Metrics::Step(int64_t trained_tokens) {
  families_->steps.Increment();
  families_->trained_tokens.Increment(static_cast<double>(trained_tokens));
}

void Metrics::Checkpoint(int64_t bytes) {
  families_->checkpoints.Increment();
  families_->checkpoint_bytes.Increment(static_cast<double>(bytes));
}

void Metrics::Commit(double commit_s) {
  families_->commit.Observe(commit_s);
}

void Metrics::Gauges(const CoordinatorStats& stats) {
  for (const auto& [state, count] : stats.jobs) {
    families_->jobs.Add(WithValues(metrics::kJobs, {StateLabel(state)}))
        .Set(static_cast<double>(count));
  }
  // A use that no device is in any more is 0, not the last value.
  for (v1::DeviceType type : {v1::DEVICE_TYPE_CPU, v1::DEVICE_TYPE_CUDA}) {
    for (const char* use : {"free", "leased", "faulty", "away"}) {
      const auto it = stats.devices.find({type, use});
      families_->devices.Add(WithValues(metrics::kDevices, {TypeLabel(type), use}))
          .Set(it == stats.devices.end() ? 0 : static_cast<double>(it->second));
    }
  }
  Gpus(stats);
  families_->tokens_per_s.Set(stats.tokens_per_s);
  families_->sessions.Set(static_cast<double>(stats.sessions));
}

// A GPU whose worker is away has no series: its last values say nothing.
void Metrics::Gpus(const CoordinatorStats& stats) {
  for (auto& [family, gauge] : families_->gpu_gauges) family->Remove(gauge);
  families_->gpu_gauges.clear();
  const auto set = [&](prometheus::Family<prometheus::Gauge>* family, const char* name,
                       std::vector<std::string> labels, double value) {
    prometheus::Gauge& gauge = family->Add(WithValues(name, std::move(labels)));
    gauge.Set(value);
    families_->gpu_gauges.emplace_back(family, &gauge);
  };
  Families& f = *families_;
  for (const auto& [worker, s] : stats.gpus) {
    const std::vector<std::string> labels = {worker, s.device()};
    set(&f.gpu_utilization, metrics::kGpuUtilizationRatio, labels, s.utilization());
    set(&f.gpu_memory, metrics::kGpuMemoryUsedBytes, labels,
        static_cast<double>(s.memory_used_bytes()));
    set(&f.gpu_power, metrics::kGpuPowerWatts, labels, s.power_w());
    set(&f.gpu_temperature, metrics::kGpuTemperatureCelsius, labels, s.temperature_c());
    set(&f.gpu_xid, metrics::kGpuXidErrors, labels, static_cast<double>(s.xid_errors()));
    set(&f.gpu_healthy, metrics::kGpuHealthy, labels, s.fault().empty() ? 1 : 0);
    set(&f.gpu_ecc, metrics::kGpuEccErrors, {worker, s.device(), "corrected"},
        static_cast<double>(s.ecc_corrected_errors()));
    set(&f.gpu_ecc, metrics::kGpuEccErrors, {worker, s.device(), "uncorrected"},
        static_cast<double>(s.ecc_uncorrected_errors()));
  }
}

void Metrics::Started(const std::string& service, const std::string& method) {
  families_->started.Add(WithValues(metrics::kGrpcServerStartedTotal, {service, method}))
      .Increment();
}

void Metrics::Handled(const std::string& service, const std::string& method, absl::StatusCode code,
                      double handling_s, bool unary) {
  families_->handled
      .Add(WithValues(metrics::kGrpcServerHandledTotal, {service, method, CodeName(code)}))
      .Increment();
  if (!unary) return;
  families_->handling
      .Add(WithValues(metrics::kGrpcServerHandlingSeconds, {service, method}), CallBuckets())
      .Observe(handling_s);
}

}  // namespace attune
