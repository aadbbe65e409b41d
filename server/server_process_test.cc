// The daemon as a process: what it does on SIGKILL, SIGTERM and wrong flags.
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "attune/v1/fine_tuning_service.grpc.pb.h"
#include "attune/v1/watch_service.grpc.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

extern char** environ;

namespace attune {
namespace {

using testing::HasSubstr;

std::string ReadAll(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class AttunedTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/server_process_test_XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    directory_ = path;
  }
  void TearDown() override {
    if (pid_ > 0) Stop(SIGKILL);
    std::system(("rm -rf " + directory_).c_str());
  }

  void Spawn(std::vector<std::string> arguments) {
    const std::string program = std::string(ATTUNE_BIN_DIR) + "/attuned";
    arguments.insert(arguments.begin(), program);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, (directory_ + "/out").c_str(),
                                     O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    ASSERT_EQ(posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
  }
  // Ends it; returns its wait status.
  int Stop(int signal) {
    kill(pid_, signal);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    return status;
  }
  void Start() {
    unlink((directory_ + "/data/endpoint").c_str());
    Spawn({"--data-dir", directory_ + "/data"});
    for (int i = 0; i < 1000 && access((directory_ + "/data/endpoint").c_str(), R_OK) != 0; ++i) {
      usleep(10000);
    }
    const auto endpoint = nlohmann::json::parse(ReadAll(directory_ + "/data/endpoint"));
    EXPECT_EQ(endpoint["pid"], pid_);
    token_ = ReadAll(directory_ + "/data/token");
    token_.resize(64);
    grpc::ChannelArguments fresh;  // not the connection to the process before
    fresh.SetInt("attune.run", ++runs_);
    channel_ = grpc::CreateCustomChannel(endpoint["addresses"][0].get<std::string>(),
                                         grpc::InsecureChannelCredentials(), fresh);
    stub_ = v1::FineTuningService::NewStub(channel_);
  }
  void Prepare(grpc::ClientContext* context) {
    context->AddMetadata("authorization", "Bearer " + token_);
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  }
  grpc::Status Create(const std::string& request_id, v1::Job* job) {
    v1::CreateJobRequest request;
    request.set_request_id(request_id);
    request.mutable_spec()->mutable_model()->mutable_source()->set_path("m");
    request.mutable_spec()->add_datasets()->mutable_source()->set_path("d");
    grpc::ClientContext context;
    Prepare(&context);
    return stub_->CreateJob(&context, request, job);
  }

  std::string directory_, token_;
  pid_t pid_ = 0;
  int runs_ = 0;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::FineTuningService::Stub> stub_;
};

// Killed under load again and again: every job that was acknowledged is there afterwards, with
// its first event, and every request that was repeated made one job only.
TEST_F(AttunedTest, SigkillLosesNoAcknowledgedJob) {
  std::mutex mutex;
  std::map<std::string, std::string> acknowledged;  // request -> job
  std::set<std::string> requests;
  std::mt19937 random(1);
  for (int round = 0; round < 5; ++round) {
    Start();
    std::atomic<bool> stop = false;
    std::vector<std::thread> clients;
    for (int c = 0; c < 3; ++c) {
      clients.emplace_back([&, c] {
        for (int i = 0; !stop; ++i) {
          const std::string id =
              std::to_string(round) + "-" + std::to_string(c) + "-" + std::to_string(i);
          v1::Job job;
          {
            std::lock_guard<std::mutex> lock(mutex);
            requests.insert(id);
          }
          if (!Create(id, &job).ok()) return;
          std::lock_guard<std::mutex> lock(mutex);
          acknowledged[id] = job.name();
        }
      });
    }
    usleep(100000 + random() % 100000);
    EXPECT_TRUE(WIFSIGNALED(Stop(SIGKILL)));
    stop = true;
    for (std::thread& client : clients) client.join();
  }
  ASSERT_GT(acknowledged.size(), 50u);
  Start();
  std::set<std::string> names;
  for (const std::string& id : requests) {
    v1::Job job;
    const grpc::Status status = Create(id, &job);
    ASSERT_TRUE(status.ok()) << status.error_message();
    if (acknowledged.count(id) != 0) {
      EXPECT_EQ(job.name(), acknowledged[id]);
    }
    EXPECT_TRUE(names.insert(job.name()).second) << "two requests share " << job.name();
  }
  auto watch = v1::WatchService::NewStub(channel_);
  grpc::ClientContext context;
  Prepare(&context);
  auto reader = watch->WatchEvents(&context, v1::WatchRequest());
  std::set<std::string> created;
  int64_t last = 0;
  v1::WatchEventsResponse response;
  while (created.size() < names.size() && reader->Read(&response)) {
    EXPECT_GT(response.event().revision(), last);
    last = response.event().revision();
    EXPECT_TRUE(created.insert(response.event().job()).second);
  }
  EXPECT_EQ(created, names);
  context.TryCancel();
}

TEST_F(AttunedTest, SigtermEndsItCleanly) {
  Start();
  v1::Job job;
  ASSERT_TRUE(Create("", &job).ok());
  const int status = Stop(SIGTERM);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_NE(access((directory_ + "/data/endpoint").c_str(), F_OK), 0);
  EXPECT_THAT(ReadAll(directory_ + "/out"), HasSubstr("attuned is ready on unix:/"));
}

TEST_F(AttunedTest, RefusesToListenForOthersAndSaysWhy) {
  Spawn({"--data-dir", directory_ + "/data", "--listen", "0.0.0.0:0"});
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = 0;
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_THAT(ReadAll(directory_ + "/out"), HasSubstr("TLS is not built yet"));
}

}  // namespace
}  // namespace attune
