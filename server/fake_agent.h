// An agent for tests: holds a real session, answers leases as a worker would, without processes.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "attune/v1/worker_service.grpc.pb.h"

namespace attune {

// Metadata that carries the token.
void AddToken(const std::string& token, grpc::ClientContext* context);

class FakeAgent {
 public:
  // Dials, registers `devices` CPU devices and receives until Stop.
  FakeAgent(std::shared_ptr<grpc::Channel> channel, const std::string& token,
            const v1::Register& registration);
  ~FakeAgent();

  // The next message that `matches`; those before it are dropped. Fails the test after 10 s.
  v1::CoordinatorMessage Next(
      const std::function<bool(const v1::CoordinatorMessage&)>& matches);
  v1::Lease NextLease(v1::LeaseKind kind);

  void Send(const v1::WorkerMessage& message);
  // The next report under `epoch`, numbered from 1.
  void Report(int64_t epoch, v1::Report report);
  // Waits until everything reported under `epoch` is acknowledged.
  void WaitForAck(int64_t epoch);

  // Ends the session; returns its status.
  grpc::Status Stop();

 private:
  void Receive();
  grpc::ClientContext context_;
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>> stream_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<v1::CoordinatorMessage> messages_;
  bool over_ = false;
  std::map<int64_t, int64_t> sequences_;
  std::thread receiver_;
};

// A registration with `cpus` CPU devices.
v1::Register MakeRegister(const std::string& worker, int cpus);

}  // namespace attune
