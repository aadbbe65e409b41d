// Prometheus metrics of the coordinator. Names, labels and help come from proto/metric_names.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/core/runner.h"
#include "server/rpc/context.h"

namespace attune {

class Metrics final : public Observer, public RpcObserver {
 public:
  explicit Metrics(const std::string& version);
  ~Metrics() override;

  // Serves GET /metrics on "host:port" (loopback; port 0: any free one) until this is destroyed.
  // Returns the port.
  absl::StatusOr<int> Serve(const std::string& address);

  void QueueWait(double wait_s) override;
  void Failure(v1::FailureCause cause) override;
  void Restart(v1::FailureCause cause) override;
  void Step(int64_t trained_tokens) override;
  void Checkpoint(int64_t bytes) override;
  void Commit(double commit_s) override;
  void Gauges(const CoordinatorStats& stats) override;
  void Started(const std::string& service, const std::string& method) override;
  void Handled(const std::string& service, const std::string& method, absl::StatusCode code,
               double handling_s, bool unary) override;

 private:
  struct Families;
  void Gpus(const CoordinatorStats& stats);

  std::unique_ptr<Families> families_;
};

}  // namespace attune
