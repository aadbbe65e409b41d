// A coordinator for tests of the agent: the worker and artifact services in memory, over a Unix
// socket, and nothing decided by itself. The test says what to lease and sees what was reported.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "attune/v1/artifact_service.grpc.pb.h"
#include "attune/v1/worker_service.grpc.pb.h"

namespace attune {

// What survives a coordinator's death.
struct FakeStore {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<int64_t, std::vector<v1::Report>> reports;  // by epoch, in order, each once
  int64_t duplicates = 0;                              // reports that had come before
  int64_t gaps = 0;                                    // reports that came too early
  std::vector<v1::Register> registers;
  struct StoredArtifact {
    v1::Artifact artifact;
    std::map<std::string, std::string> content;
  };
  std::map<std::string, StoredArtifact> artifacts;
  int64_t broken_chunks = 0;
};

class FakeCoordinator {
 public:
  FakeCoordinator(const std::string& socket, std::shared_ptr<FakeStore> store);
  // As if killed: streams break, what is in flight is lost.
  ~FakeCoordinator();

  // Epochs named in every Registered.
  void SetRelease(std::vector<int64_t> release);
  // Whether reports are stored and acknowledged; else they are lost.
  void SetDeaf(bool deaf);
  // Waits for a session, then sends.
  bool Send(const v1::CoordinatorMessage& message);
  bool SendLease(const v1::Lease& lease);
  bool SendStop(int64_t epoch, v1::StopMode mode);
  bool WaitForSession(absl::Duration timeout = absl::Seconds(10));

 private:
  class Worker;
  class Artifacts;
  const std::shared_ptr<FakeStore> store_;
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<Artifacts> artifacts_;
  std::unique_ptr<grpc::Server> server_;
};

// Waits until `done` holds, looking after every change. False after the timeout.
bool WaitFor(FakeStore* store, const std::function<bool(const FakeStore&)>& done,
             absl::Duration timeout = absl::Seconds(20));

}  // namespace attune
