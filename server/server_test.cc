// The whole server over a Unix socket, with a fake agent: what clients and agents see.
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "proto/metric_names.h"
#include "absl/strings/match.h"
#include "server/server_fixture.h"

namespace attune {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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
  ASSERT_TRUE(
      Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, v1::ListJobsRequest(), &list).ok());
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
    ASSERT_TRUE(Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, request, &page).ok());
    for (const v1::Job& job : page.jobs()) listed.push_back(job.name());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_THAT(listed, ElementsAre(names[4], names[3], names[2], names[1], names[0]));
  v1::ListJobsResponse page;
  ASSERT_TRUE(Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, request, &page).ok());
  request.set_page_token(page.next_page_token());
  request.add_states(v1::JOB_STATE_RUNNING);
  EXPECT_EQ(ReasonOf(Call(jobs_.get(), &v1::FineTuningService::Stub::ListJobs, request, &page)),
            "INVALID_PAGE_TOKEN");
}

TEST_F(ServerTest, CancelAndDelete) {
  const v1::Job job = Create(MakeRequest());
  v1::CancelJobRequest cancel;
  cancel.set_name(job.name());
  cancel.set_etag("not this");
  v1::Job cancelled;
  EXPECT_EQ(
      ReasonOf(Call(jobs_.get(), &v1::FineTuningService::Stub::CancelJob, cancel, &cancelled)),
      "ETAG_MISMATCH");
  cancel.set_etag(job.etag());
  ASSERT_TRUE(Call(jobs_.get(), &v1::FineTuningService::Stub::CancelJob, cancel, &cancelled).ok());
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
  ASSERT_TRUE(
      Call(artifacts_.get(), &v1::ArtifactService::Stub::FinalizeArtifact, finalize, &artifact)
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
  EXPECT_EQ(
      ReasonOf(Call(artifacts_.get(), &v1::ArtifactService::Stub::DeleteArtifact, remove, &empty)),
      "ARTIFACT_IN_USE");
}

// A unary call of any method; `context` carries a token or not.
grpc::Status RawCall(grpc::Channel* channel, const std::string& path, grpc::ClientContext* context,
                     google::protobuf::Empty* response) {
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  grpc::internal::RpcMethod rpc(path.c_str(), grpc::internal::RpcMethod::NORMAL_RPC);
  google::protobuf::Empty request;
  return grpc::internal::BlockingUnaryCallImpl<google::protobuf::MessageLite,
                                               google::protobuf::MessageLite>(channel, rpc, context,
                                                                              request, response)
      .status();
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
        google::protobuf::Empty response;
        const grpc::Status status = RawCall(channel_.get(), path, &context, &response);
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
    // Only where an agent offers GPUs: gpu_inventory_test.
    if (absl::StartsWith(metric.name, "attune_gpu_")) continue;
    EXPECT_THAT(text, HasSubstr(std::string("# TYPE ") + metric.name + " ")) << metric.name;
    EXPECT_THAT(text, HasSubstr(std::string("\n") + metric.name)) << metric.name;
  }
  EXPECT_THAT(text, HasSubstr("attune_jobs{state=\"SUCCEEDED\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("attune_devices{type=\"cpu\",use=\"free\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("attune_trained_tokens_total 100\n"));
  EXPECT_THAT(text, HasSubstr("attune_checkpoints_total 1\n"));
  EXPECT_THAT(text, HasSubstr("grpc_code=\"OK\",grpc_method=\"CreateJob\""));
}

TEST_F(ServerTest, HealthIsForEverybodyAndReflectionIsNot) {
  grpc::ClientContext health;
  google::protobuf::Empty response;
  EXPECT_TRUE(RawCall(channel_.get(), "/grpc.health.v1.Health/Check", &health, &response).ok());
  const auto& fields = response.GetReflection()->GetUnknownFields(response);
  ASSERT_EQ(fields.field_count(), 1);
  EXPECT_EQ(fields.field(0).varint(), 1u) << "not SERVING";
  const char* reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  grpc::ClientContext anonymous;
  EXPECT_EQ(RawCall(channel_.get(), reflection, &anonymous, &response).error_code(),
            grpc::StatusCode::CANCELLED);
  grpc::ClientContext known;
  AddToken(server_->token(), &known);
  EXPECT_NE(RawCall(channel_.get(), reflection, &known, &response).error_code(),
            grpc::StatusCode::CANCELLED);
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
