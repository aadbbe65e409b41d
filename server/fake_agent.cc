#include "server/fake_agent.h"

#include <chrono>

#include "gtest/gtest.h"

namespace attune {

void AddToken(const std::string& token, grpc::ClientContext* context) {
  context->AddMetadata("authorization", "Bearer " + token);
}

v1::Register MakeRegister(const std::string& worker, int cpus) {
  v1::Register registration;
  registration.set_worker(worker);
  registration.set_hostname("host");
  for (int i = 0; i < cpus; ++i) {
    v1::Device* device = registration.add_devices();
    device->set_id("cpu:" + std::to_string(i));
    device->set_type(v1::DEVICE_TYPE_CPU);
  }
  return registration;
}

FakeAgent::FakeAgent(std::shared_ptr<grpc::Channel> channel, const std::string& token,
                     const v1::Register& registration)
    : stub_(v1::WorkerService::NewStub(channel)) {
  AddToken(token, &context_);
  stream_ = stub_->Session(&context_);
  v1::WorkerMessage message;
  *message.mutable_register_() = registration;
  stream_->Write(message);
  receiver_ = std::thread([this] { Receive(); });
}

FakeAgent::~FakeAgent() {
  if (receiver_.joinable()) Stop();
}

void FakeAgent::Receive() {
  v1::CoordinatorMessage message;
  while (stream_->Read(&message)) {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(message);
    arrived_.notify_all();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  over_ = true;
  arrived_.notify_all();
}

v1::CoordinatorMessage FakeAgent::Next(
    const std::function<bool(const v1::CoordinatorMessage&)>& matches) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    while (!messages_.empty()) {
      const v1::CoordinatorMessage message = messages_.front();
      messages_.erase(messages_.begin());
      if (matches(message)) return message;
    }
    if (over_ || arrived_.wait_until(lock, deadline) == std::cv_status::timeout) {
      ADD_FAILURE() << "the expected message did not come";
      return {};
    }
  }
}

v1::Lease FakeAgent::NextLease(v1::LeaseKind kind) {
  return Next([kind](const v1::CoordinatorMessage& m) {
           return m.has_lease() && m.lease().kind() == kind;
         }).lease();
}

void FakeAgent::Send(const v1::WorkerMessage& message) { stream_->Write(message); }

void FakeAgent::Report(int64_t epoch, v1::Report report) {
  report.set_epoch(epoch);
  report.set_sequence(++sequences_[epoch]);
  v1::WorkerMessage message;
  *message.mutable_report() = std::move(report);
  Send(message);
}

void FakeAgent::WaitForAck(int64_t epoch) {
  const int64_t last = sequences_[epoch];
  Next([=](const v1::CoordinatorMessage& m) {
    return m.has_report_ack() && m.report_ack().epoch() == epoch &&
           m.report_ack().sequence() == last;
  });
}

grpc::Status FakeAgent::Stop() {
  stream_->WritesDone();
  receiver_.join();
  return stream_->Finish();
}

}  // namespace attune
