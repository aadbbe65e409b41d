// The whole server over a Unix socket, with a fake agent: what clients and agents see.
#include "server/server.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "attune/v1/artifact_service.grpc.pb.h"
#include "attune/v1/checkpoint_service.grpc.pb.h"
#include "attune/v1/fine_tuning_service.grpc.pb.h"
#include "attune/v1/watch_service.grpc.pb.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"
#include "proto/crc32c.h"
#include "proto/metric_names.h"
#include "server/artifacts/sha256.h"
#include "server/fake_agent.h"

namespace attune {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// The reason in a status's ErrorInfo, or "".
std::string ReasonOf(const grpc::Status& status) {
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

TEST_F(ServerTest, AJobRunsFromCreateToDownload) {
  FakeAgent agent(channel_, server_->token(), MakeRegister("workers/a", 2));
  const v1::Job created = Create(MakeRequest());
  EXPECT_EQ(created.state(), v1::JOB_STATE_VALIDATING);
  EXPECT_EQ(created.spec().lora().r(), 16) << "the spec is not resolved";
  const v1::Lease lease = RunOn(&agent);
  EXPECT_EQ(lease.job(), created.name());
  EXPECT_THAT(lease.devices(), ElementsAre("cpu:0"));
  EXPECT_EQ(lease.spec().precision(), v1::PRECISION_F32);
  EXPECT_EQ(lease.spec().model().digest(), "digest");
  for (int step = 1; step <= 3; ++step) ReportStep(&agent, lease.epoch(), step);
  agent.WaitForAck(lease.epoch());
  const v1::Job running = Get(created.name());
  EXPECT_EQ(running.state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(running.progress().step(), 3);
  EXPECT_EQ(running.progress().trained_tokens(), 300);
  EXPECT_THAT(running.devices(), ElementsAre("a/cpu:0"));
  Complete(&agent, lease.epoch());
  const v1::Job ended = Wait(created.name(), 10);
  EXPECT_EQ(ended.state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(ended.final_checkpoint(), created.name() + "/checkpoints/3");

  v1::GetCheckpointRequest get;
  get.set_name(created.name() + "/checkpoints/last");
  v1::Checkpoint checkpoint;
  ASSERT_TRUE(
      Call(checkpoints_.get(), &v1::CheckpointService::Stub::GetCheckpoint, get, &checkpoint).ok());
  grpc::ClientContext context;
  AddToken(server_->token(), &context);
  v1::ReadFileRequest read;
  read.set_artifact(checkpoint.artifact());
  read.set_path("adapter/adapter_model.safetensors");
  read.set_offset(2);
  auto reader = artifacts_->ReadFile(&context, read);
  v1::ReadFileResponse chunk;
  ASSERT_TRUE(reader->Read(&chunk));
  EXPECT_EQ(chunk.data(), "ights");
  EXPECT_EQ(chunk.crc32c(), Crc32c("ights"));
  EXPECT_FALSE(reader->Read(&chunk));
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(ServerTest, WatchResumesWithoutGapOrRepeatAcrossARestart) {
  std::string job, token;
  std::vector<int64_t> seen;
  {
    FakeAgent agent(channel_, server_->token(), MakeRegister("workers/a", 1));
    job = Create(MakeRequest()).name();
    const v1::Lease lease = RunOn(&agent);
    for (int step = 1; step <= 3; ++step) ReportStep(&agent, lease.epoch(), step);
    grpc::ClientContext context;
    AddToken(server_->token(), &context);
    v1::WatchRequest request;
    request.set_job(job);
    auto reader = watch_->WatchMetrics(&context, request);
    v1::WatchMetricsResponse response;
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(reader->Read(&response));
      seen.push_back(response.metrics().step());
      token = response.resume_token();
    }
    context.TryCancel();
    while (reader->Read(&response)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    Complete(&agent, lease.epoch());
  }
  StartAgain();
  grpc::ClientContext context;
  AddToken(server_->token(), &context);
  v1::WatchRequest request;
  request.set_job(job);
  request.set_resume_token(token);
  request.set_until_end(true);
  auto reader = watch_->WatchMetrics(&context, request);
  v1::WatchMetricsResponse response;
  while (reader->Read(&response)) seen.push_back(response.metrics().step());
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_THAT(seen, ElementsAre(1, 2, 3));
}

TEST_F(ServerTest, WatchEventsFollowsALiveJobToItsEnd) {
  FakeAgent agent(channel_, server_->token(), MakeRegister("workers/a", 1));
  const std::string job = Create(MakeRequest()).name();
  grpc::ClientContext context;
  AddToken(server_->token(), &context);
  v1::WatchRequest request;
  request.set_job(job);
  request.set_until_end(true);
  auto reader = watch_->WatchEvents(&context, request);
  const v1::Lease lease = RunOn(&agent);
  ReportStep(&agent, lease.epoch(), 3);
  Complete(&agent, lease.epoch());
  std::vector<std::string> states;
  int64_t last = 0;
  v1::WatchEventsResponse response;
  while (reader->Read(&response)) {
    EXPECT_GT(response.event().revision(), last);
    last = response.event().revision();
    if (response.event().kind() == v1::EVENT_KIND_STATE) {
      states.push_back(v1::JobState_Name(response.event().state()).substr(10));
    }
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_THAT(states, ElementsAre("VALIDATING", "QUEUED", "STARTING", "RUNNING", "SUCCEEDED"));
}

TEST_F(ServerTest, WatchRefusesTokensOfOtherStreamsAndUnknownJobs) {
  const std::string job = Create(MakeRequest()).name();
  v1::WatchRequest request;
  request.set_job(job);
  request.set_resume_token("m1-00000000");
  grpc::ClientContext wrong;
  AddToken(server_->token(), &wrong);
  auto events = watch_->WatchEvents(&wrong, request);
  v1::WatchEventsResponse response;
  EXPECT_FALSE(events->Read(&response));
  EXPECT_EQ(ReasonOf(events->Finish()), "INVALID_RESUME_TOKEN");
  request.set_job("jobs/nothing");
  request.clear_resume_token();
  grpc::ClientContext unknown;
  AddToken(server_->token(), &unknown);
  events = watch_->WatchEvents(&unknown, request);
  EXPECT_FALSE(events->Read(&response));
  EXPECT_EQ(events->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServerTest, CreateIsIdempotentInRequestIdAcrossARestart) {
  const v1::CreateJobRequest request = MakeRequest("11111111-2222-3333-4444-555555555555");
  const std::string name = Create(request).name();
  EXPECT_EQ(Create(request).name(), name);
  StartAgain();
  EXPECT_EQ(Create(request).name(), name);
  v1::CreateJobRequest other = request;
  other.mutable_spec()->set_name("other");
  v1::Job job;
  const grpc::Status status =
      Call(jobs_.get(), &v1::FineTuningService::Stub::CreateJob, other, &job);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(ReasonOf(status), "REQUEST_ID_REUSED");
}

TEST_F(ServerTest, AWrongSpecNamesItsFields) {
  v1::CreateJobRequest request = MakeRequest();
  request.mutable_spec()->mutable_lora()->set_r(-1);
  request.mutable_spec()->mutable_datasets(0)->mutable_source()->set_artifact("artifacts/none");
  v1::Job job;
  grpc::Status status = Call(jobs_.get(), &v1::FineTuningService::Stub::CreateJob, request, &job);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  google::rpc::BadRequest bad;
  for (const auto& any : details.details()) any.UnpackTo(&bad);
  ASSERT_GE(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "spec.lora.r");
  EXPECT_THAT(status.error_message(), HasSubstr("spec.lora.r: "));
  request.mutable_spec()->mutable_lora()->set_r(8);
  status = Call(jobs_.get(), &v1::FineTuningService::Stub::CreateJob, request, &job);
  EXPECT_THAT(status.error_message(), HasSubstr("spec.datasets[0].source.artifact"));
}

TEST_F(ServerTest, ValidateOnlyStoresNothing) {
  v1::CreateJobRequest request = MakeRequest();
  request.set_validate_only(true);
  const v1::Job job = Create(request);
  EXPECT_EQ(job.name(), "");
  EXPECT_EQ(job.spec().batch().micro_batch_tokens(), 2048);
  v1::ListJobsResponse list;
  ASSERT_TRUE(Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, v1::ListJobsRequest(),
                   &list)
                  .ok());
  EXPECT_EQ(list.jobs_size(), 0);
}

TEST_F(ServerTest, ListsInPagesNewestFirst) {
  std::vector<std::string> names;
  for (int i = 0; i < 5; ++i) names.push_back(Create(MakeRequest()).name());
  v1::ListJobsRequest request;
  request.set_page_size(2);
  std::vector<std::string> listed;
  do {
    v1::ListJobsResponse page;
    ASSERT_TRUE(
        Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, request, &page).ok());
    for (const v1::Job& job : page.jobs()) listed.push_back(job.name());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_THAT(listed, ElementsAre(names[4], names[3], names[2], names[1], names[0]));
  v1::ListJobsResponse page;
  ASSERT_TRUE(Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, request, &page).ok());
  request.set_page_token(page.next_page_token());
  request.add_states(v1::JOB_STATE_RUNNING);
  EXPECT_EQ(
      ReasonOf(Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, request, &page)),
      "INVALID_PAGE_TOKEN");
}

TEST_F(ServerTest, CancelAndDelete) {
  const v1::Job job = Create(MakeRequest());
  v1::CancelJobRequest cancel;
  cancel.set_name(job.name());
  cancel.set_etag("not this");
  v1::Job cancelled;
  EXPECT_EQ(ReasonOf(Call(jobs_.get(), &v1::FineTuningService::Stub::CancelJob, cancel,
                          &cancelled)),
            "ETAG_MISMATCH");
  cancel.set_etag(job.etag());
  ASSERT_TRUE(
      Call(jobs_.get(), &v1::FineTuningService::Stub::CancelJob, cancel, &cancelled).ok());
  EXPECT_EQ(cancelled.state(), v1::JOB_STATE_CANCELLED);
  v1::DeleteJobRequest remove;
  remove.set_name(job.name());
  google::protobuf::Empty empty;
  ASSERT_TRUE(Call(jobs_.get(), &v1::FineTuningService::Stub::DeleteJob, remove, &empty).ok());
  v1::GetJobRequest get;
  get.set_name(job.name());
  EXPECT_EQ(ReasonOf(Call(jobs_.get(), &v1::FineTuningService::Stub::GetJob, get, &cancelled)),
            "JOB_NOT_FOUND");
}

TEST_F(ServerTest, AWaitEndsWithItsClientAndWithItsTimeout) {
  const std::string job = Create(MakeRequest()).name();
  EXPECT_EQ(Wait(job, 0.3).state(), v1::JOB_STATE_VALIDATING);
  grpc::ClientContext context;
  AddToken(server_->token(), &context);
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  v1::WaitJobRequest request;
  request.set_name(job);
  request.set_timeout_s(300);
  v1::Job response;
  EXPECT_EQ(jobs_->WaitJob(&context, request, &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(ServerTest, UploadsGoOnWhereTheyStopped) {
  std::string data;
  for (int i = 0; i < 5000; ++i) data += static_cast<char>(i * 7);
  v1::CreateArtifactRequest create;
  create.set_kind(v1::ARTIFACT_KIND_DATASET);
  v1::ArtifactFile* file = create.add_files();
  file->set_path("train.jsonl");
  file->set_bytes(5000);
  file->set_sha256(Sha256Hex(data));
  v1::Artifact artifact;
  ASSERT_TRUE(
      Call(artifacts_.get(), &v1::ArtifactService::Stub::CreateArtifact, create, &artifact).ok());
  const std::string name = artifact.name();
  // The third chunk is damaged: what came before it stays.
  const grpc::Status damaged = Write(name, "train.jsonl", 0, data.substr(0, 3000), true);
  EXPECT_EQ(damaged.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(ReasonOf(damaged), "WRONG_CRC32C");
  v1::FinalizeArtifactRequest finalize;
  finalize.set_name(name);
  EXPECT_EQ(ReasonOf(Call(artifacts_.get(), &v1::ArtifactService::Stub::FinalizeArtifact, finalize,
                          &artifact)),
            "INCOMPLETE");
  StartAgain();
  v1::GetWriteStatusRequest status;
  status.set_artifact(name);
  status.set_path("train.jsonl");
  v1::WriteFileResponse committed;
  ASSERT_TRUE(
      Call(artifacts_.get(), &v1::ArtifactService::Stub::GetWriteStatus, status, &committed).ok());
  EXPECT_EQ(committed.committed_bytes(), 2000);
  EXPECT_EQ(ReasonOf(Write(name, "train.jsonl", 1000, data.substr(1000))), "WRONG_OFFSET");
  EXPECT_TRUE(Write(name, "train.jsonl", 2000, data.substr(2000)).ok());
  ASSERT_TRUE(Call(artifacts_.get(), &v1::ArtifactService::Stub::FinalizeArtifact, finalize,
                   &artifact)
                  .ok());
  EXPECT_EQ(artifact.state(), v1::ARTIFACT_STATE_READY);
  // The same content again is there at once; while a job uses it, it cannot be deleted.
  v1::Artifact again;
  ASSERT_TRUE(
      Call(artifacts_.get(), &v1::ArtifactService::Stub::CreateArtifact, create, &again).ok());
  EXPECT_EQ(again.state(), v1::ARTIFACT_STATE_READY);
  v1::CreateJobRequest job = MakeRequest();
  job.mutable_spec()->mutable_datasets(0)->mutable_source()->set_artifact(name);
  Create(job);
  v1::DeleteArtifactRequest remove;
  remove.set_name(name);
  google::protobuf::Empty empty;
  EXPECT_EQ(ReasonOf(Call(artifacts_.get(), &v1::ArtifactService::Stub::DeleteArtifact, remove,
                          &empty)),
            "ARTIFACT_IN_USE");
}

// Every method of every service of the contract, from the descriptors: a new one is covered.
TEST_F(ServerTest, NothingButHealthAnswersWithoutTheToken) {
  int methods = 0;
  for (const char* name : {"FineTuningService", "CheckpointService", "ArtifactService",
                           "WatchService", "WorkerService"}) {
    const auto* service = google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(
        std::string("attune.v1.") + name);
    ASSERT_NE(service, nullptr);
    for (int i = 0; i < service->method_count(); ++i) {
      const auto* method = service->method(i);
      for (const char* token : {"", "Bearer ", "Bearer 0000"}) {
        const std::string path = "/" + service->full_name() + "/" + method->name();
        grpc::ClientContext context;
        if (*token != '\0') context.AddMetadata("authorization", token);
        context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
        // A raw call that serves every shape: one message each way.
        grpc::internal::RpcMethod rpc(path.c_str(), grpc::internal::RpcMethod::NORMAL_RPC);
        google::protobuf::Empty request, response;
        const grpc::Status status =
            grpc::internal::BlockingUnaryCallImpl<google::protobuf::MessageLite,
                                                  google::protobuf::MessageLite>(
                channel_.get(), rpc, &context, request, &response)
                .status();
        EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << path;
        ++methods;
      }
    }
  }
  EXPECT_GT(methods, 60);
}

// The answer to GET /metrics.
std::string Scrape(const std::string& address) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  const std::string request = "GET /metrics HTTP/1.0\r\n\r\n";
  EXPECT_EQ(send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  std::string text;
  char buffer[4096];
  for (ssize_t n = 0; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) text.append(buffer, n);
  close(fd);
  return text;
}

TEST_F(ServerTest, ExportsEveryMetricOfTheTable) {
  metrics_address_ = "127.0.0.1:0";
  StartAgain();
  FakeAgent agent(channel_, server_->token(), MakeRegister("workers/a", 2));
  const std::string job = Create(MakeRequest()).name();
  const v1::Lease lease = RunOn(&agent);
  ReportStep(&agent, lease.epoch(), 3);
  Complete(&agent, lease.epoch());
  Wait(job, 10);
  std::string text;
  for (int i = 0; i < 100; ++i) {  // gauges are renewed once a second
    text = Scrape(server_->metrics_address());
    if (text.find("attune_jobs{state=\"SUCCEEDED\"} 1") != std::string::npos) break;
    usleep(50000);
  }
  for (const metrics::MetricName& metric : metrics::AllMetrics()) {
    EXPECT_THAT(text, HasSubstr(std::string("# TYPE ") + metric.name + " ")) << metric.name;
    EXPECT_THAT(text, HasSubstr(std::string("\n") + metric.name)) << metric.name;
  }
  EXPECT_THAT(text, HasSubstr("attune_jobs{state=\"SUCCEEDED\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("attune_devices{type=\"cpu\",use=\"free\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("attune_trained_tokens_total 100\n"));
  EXPECT_THAT(text, HasSubstr("attune_checkpoints_total 1\n"));
  EXPECT_THAT(text, HasSubstr("grpc_code=\"OK\",grpc_method=\"CreateJob\""));
}

TEST_F(ServerTest, RefusesAddressesThatOthersReach) {
  ServerOptions options;
  options.data_dir = data_dir_ + "/other";
  options.listen = {"0.0.0.0:0"};
  const auto server = StartServer(options);
  EXPECT_TRUE(absl::IsUnimplemented(server.status())) << server.status();
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("TLS"));
}

TEST_F(ServerTest, OneServerPerDataDirectory) {
  ServerOptions options;
  options.data_dir = data_dir_;
  EXPECT_TRUE(absl::IsFailedPrecondition(StartServer(options).status()));
}

TEST_F(ServerTest, SecretsAreForTheOwnerOnly) {
  for (const char* name : {"/token", "/socket", "/jobs.db", "/endpoint"}) {
    struct stat info;
    ASSERT_EQ(stat((data_dir_ + name).c_str(), &info), 0) << name;
    EXPECT_EQ(info.st_mode & 077, 0u) << name;
  }
}

}  // namespace
}  // namespace attune
