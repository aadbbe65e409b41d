// The agent of one host: offers its devices to a coordinator, carries out leases, and never stops
// a healthy trainer because the coordinator is away.
//
// One thread, the loop, owns all state. The session, the trainers' threads and the leases' workers
// post functions to it. State directory:
//   lock              held while an agent runs
//   id                this worker's id
//   cache/            artifact_cache.h
//   leases/<epoch>/   lease_runner.h
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/coordinator_endpoint.h"
#include "worker/agent/device_fence.h"
#include "worker/agent/devices.h"
#include "worker/agent/lease_runner.h"
#include "worker/agent/session.h"

namespace attune {

struct AgentOptions {
  EndpointOptions coordinator;
  std::string state_directory;
  std::string digest_cache;  // of models (worker/io/digest_cache.h) [STATE-DIRECTORY/digests.json]
  std::string trainer_program;
  std::vector<std::string> roots;
  DeviceOptions devices;
  int64_t cache_bytes = int64_t{50} << 30;
  // On which trainers of other hosts reach those of this one; for jobs that span hosts.
  std::string bind_address = "127.0.0.1";
  // For the trainers, "NAME=value"; CleanEnvironment makes it from the agent's own.
  std::vector<std::string> environment;
};

// Of an environment what trainers need: paths, locale, temporary directory, and the variables of
// the GPU and communication libraries. Nothing that may hold a secret of the agent's user.
std::vector<std::string> CleanEnvironment(const char* const* environment);

// Adds a directory to the list of ATTUNE_CUDA_LIBRARY_DIRS, where trainers look for libraries.
void AddLibraryDirectory(const std::string& directory, std::vector<std::string>* environment);

class Agent {
 public:
  // Makes sure that no process of an earlier agent is left, then runs. FAILED_PRECONDITION if
  // another agent has the state directory, or something configured is not there.
  static absl::StatusOr<std::unique_ptr<Agent>> Start(AgentOptions options);

  // Kills every trainer, reports that, waits at most 5 s for the coordinator to have it, and ends.
  ~Agent();
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

  // "workers/{id}"
  const std::string& name() const { return name_; }
  const std::vector<v1::Device>& devices() const { return context_.devices; }
  // Whether there is a session now.
  bool connected() const;

 private:
  struct Held {
    std::unique_ptr<LeaseRunner> runner;
    int64_t sent = 0;     // reports up to this sequence were sent over this stream
    absl::Time last_ack;  // or the last time that nothing was waiting for one
  };

  explicit Agent(AgentOptions options);
  absl::Status Open();
  absl::Status Recover();
  void StartThreads();
  void Loop();
  void WatchGpus();
  void Post(std::function<void()> function);
  // Runs it in the loop and waits for it.
  void Call(const std::function<void()>& function);

  v1::Register MakeRegister();
  void OnRegistered(int64_t stream, const v1::Registered& registered);
  void OnMessage(int64_t stream, const v1::CoordinatorMessage& message);
  void OnLease(const v1::Lease& lease);
  void OnAck(const v1::ReportAck& ack);
  void OnStale(int64_t epoch);
  void Hold(std::unique_ptr<LeaseRunner> runner);
  void Forget(int64_t epoch);
  // What follows from what has happened: devices change hands, reports go out.
  void Advance(absl::Time now);
  void SendReports(absl::Time now, Held* held);
  LeaseRunner* Find(int64_t epoch);

  const AgentOptions options_;
  std::string name_;
  int lock_fd_ = -1;
  std::unique_ptr<SourceRoots> roots_;
  std::unique_ptr<ArtifactCache> cache_;
  std::unique_ptr<DeviceFence> fence_;
  std::unique_ptr<GpuMonitor> gpus_;  // null where none is offered; of its thread
  LeaseContext context_;

  // The loop's alone.
  std::map<int64_t, Held> held_;
  std::vector<std::unique_ptr<LeaseRunner>> retired_;  // until their worker has finished
  int64_t stream_ = 0;                                 // 0: none

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable gpu_watcher_stopped_;
  std::deque<std::function<void()>> posted_;
  bool stopping_ = false;
  bool connected_ = false;
  std::vector<v1::DeviceStatus> statuses_;  // of the GPUs
  std::thread loop_;
  std::thread gpu_watcher_;
  std::unique_ptr<Session> session_;
};

}  // namespace attune
