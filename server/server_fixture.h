// What server tests share: a server on a Unix socket, its stubs, and the way of a job.
#pragma once

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>

#include "attune/v1/artifact_service.grpc.pb.h"
#include "attune/v1/checkpoint_service.grpc.pb.h"
#include "attune/v1/fine_tuning_service.grpc.pb.h"
#include "attune/v1/watch_service.grpc.pb.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"
#include "proto/crc32c.h"
#include "proto/sha256.h"
#include "server/fake_agent.h"
#include "server/server.h"

namespace attune {

// The reason in a status's ErrorInfo, or "".
inline std::string ReasonOf(const grpc::Status& status) {
  google::rpc::Status details;
  details.ParseFromString(status.error_details());
  for (const auto& any : details.details()) {
    google::rpc::ErrorInfo info;
    if (any.UnpackTo(&info)) return info.reason();
  }
  return "";
}

class ServerTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/attune_server_test_XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    data_dir_ = path;
    StartAgain();
  }

  void TearDown() override {
    server_.reset();
    std::system(("rm -rf " + data_dir_).c_str());
  }

  void StartAgain() {
    server_.reset();
    ServerOptions options;
    options.data_dir = data_dir_;
    options.metrics_address = metrics_address_;
    auto server = StartServer(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = grpc::CreateChannel(server_->addresses()[0], grpc::InsecureChannelCredentials());
    jobs_ = v1::FineTuningService::NewStub(channel_);
    artifacts_ = v1::ArtifactService::NewStub(channel_);
    checkpoints_ = v1::CheckpointService::NewStub(channel_);
    watch_ = v1::WatchService::NewStub(channel_);
  }

  // Calls `method` of `stub` with the token.
  template <typename Stub, typename Request, typename Response>
  grpc::Status Call(Stub* stub,
                    grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    AddToken(server_->token(), &context);
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    return (stub->*method)(&context, request, response);
  }

  v1::CreateJobRequest MakeRequest(const std::string& request_id = "") {
    v1::CreateJobRequest request;
    v1::JobSpec* spec = request.mutable_spec();
    spec->set_name("tune");
    spec->mutable_model()->mutable_source()->set_path("models/tiny");
    spec->add_datasets()->mutable_source()->set_path("data/chat.jsonl");
    request.set_request_id(request_id);
    return request;
  }

  v1::Job Create(const v1::CreateJobRequest& request) {
    v1::Job job;
    const grpc::Status status =
        Call(jobs_.get(), &v1::FineTuningService::Stub::CreateJob, request, &job);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return job;
  }

  v1::Job Get(const std::string& name) {
    v1::GetJobRequest request;
    request.set_name(name);
    v1::Job job;
    const grpc::Status status =
        Call(jobs_.get(), &v1::FineTuningService::Stub::GetJob, request, &job);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return job;
  }

  v1::Job Wait(const std::string& name, double timeout_s) {
    v1::WaitJobRequest request;
    request.set_name(name);
    request.set_timeout_s(timeout_s);
    v1::Job job;
    const grpc::Status status =
        Call(jobs_.get(), &v1::FineTuningService::Stub::WaitJob, request, &job);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return job;
  }

  // Uploads one file as an artifact and makes it READY.
  std::string Upload(v1::ArtifactKind kind, const std::string& path, const std::string& data) {
    v1::CreateArtifactRequest create;
    create.set_kind(kind);
    v1::ArtifactFile* file = create.add_files();
    file->set_path(path);
    file->set_bytes(static_cast<int64_t>(data.size()));
    file->set_sha256(Sha256Hex(data));
    v1::Artifact artifact;
    EXPECT_TRUE(
        Call(artifacts_.get(), &v1::ArtifactService::Stub::CreateArtifact, create, &artifact).ok());
    EXPECT_TRUE(Write(artifact.name(), path, 0, data).ok());
    v1::FinalizeArtifactRequest finalize;
    finalize.set_name(artifact.name());
    const grpc::Status status =
        Call(artifacts_.get(), &v1::ArtifactService::Stub::FinalizeArtifact, finalize, &artifact);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(artifact.state(), v1::ARTIFACT_STATE_READY);
    return artifact.name();
  }

  // Sends data from `offset` in chunks of 1000 bytes; `damage` breaks the CRC of the last.
  grpc::Status Write(const std::string& artifact, const std::string& path, int64_t offset,
                     const std::string& data, bool damage = false) {
    grpc::ClientContext context;
    AddToken(server_->token(), &context);
    v1::WriteFileResponse response;
    auto writer = artifacts_->WriteFile(&context, &response);
    for (size_t at = 0; at < data.size(); at += 1000) {
      v1::WriteFileRequest chunk;
      chunk.set_artifact(at == 0 ? artifact : "");
      chunk.set_path(at == 0 ? path : "");
      chunk.set_offset(offset + static_cast<int64_t>(at));
      chunk.set_data(data.substr(at, 1000));
      const bool last = at + 1000 >= data.size();
      chunk.set_crc32c(Crc32c(chunk.data()) + (damage && last ? 1 : 0));
      if (!writer->Write(chunk)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }

  // Drives a job that was just created to RUNNING on the agent; returns the train lease.
  v1::Lease RunOn(FakeAgent* agent) {
    const v1::Lease validate = agent->NextLease(v1::LEASE_KIND_VALIDATE);
    v1::Report report;
    report.mutable_validation()->set_model_digest("digest");
    report.mutable_validation()->set_precision(v1::PRECISION_F32);
    report.mutable_validation()->set_total_steps(3);
    agent->Report(validate.epoch(), report);
    report.Clear();
    report.mutable_ended()->set_outcome(v1::LEASE_OUTCOME_COMPLETED);
    agent->Report(validate.epoch(), report);
    const v1::Lease train = agent->NextLease(v1::LEASE_KIND_TRAIN);
    report.Clear();
    report.mutable_running()->set_total_steps(3);
    agent->Report(train.epoch(), report);
    return train;
  }

  void ReportStep(FakeAgent* agent, int64_t epoch, int64_t step) {
    v1::Report report;
    report.mutable_step()->set_step(step);
    report.mutable_step()->set_total_steps(3);
    report.mutable_step()->set_loss(3.0 / static_cast<double>(step));
    report.mutable_step()->set_trained_tokens(100);
    report.mutable_step()->set_tokens_per_s(50);
    report.mutable_step()->set_step_s(2);
    agent->Report(epoch, report);
    report.Clear();
    report.mutable_log()->set_text("step " + std::to_string(step));
    agent->Report(epoch, report);
  }

  void Complete(FakeAgent* agent, int64_t epoch) {
    v1::Report report;
    report.mutable_checkpoint()->set_step(3);
    report.mutable_checkpoint()->set_artifact(
        Upload(v1::ARTIFACT_KIND_CHECKPOINT, "adapter/adapter_model.safetensors", "weights"));
    report.mutable_checkpoint()->set_final(true);
    agent->Report(epoch, report);
    report.Clear();
    report.mutable_ended()->set_outcome(v1::LEASE_OUTCOME_COMPLETED);
    agent->Report(epoch, report);
    agent->WaitForAck(epoch);
  }

  std::string data_dir_;
  std::string metrics_address_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::FineTuningService::Stub> jobs_;
  std::unique_ptr<v1::ArtifactService::Stub> artifacts_;
  std::unique_ptr<v1::CheckpointService::Stub> checkpoints_;
  std::unique_ptr<v1::WatchService::Stub> watch_;
};

}  // namespace attune
