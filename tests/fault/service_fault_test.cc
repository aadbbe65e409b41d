// The service as its users run it: attuned, attune-worker and attune as processes, with a trainer
// that does what the job's name says (tests/support/fake_trainer.cc). Everything is seen through
// the command line.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"

namespace attune {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

struct Result {
  int exit = -1;
  std::string out;  // standard output, or with the error output if it was asked for
};

class ServiceTest : public testing::Test {
 protected:
  ServiceTest() {
    char pattern[] = "/tmp/service_test_XXXXXX";
    directory_ = mkdtemp(pattern);
    fs::create_directories(directory_ + "/root/model");
    std::ofstream(directory_ + "/root/model/config.json") << "{}";
    std::ofstream(directory_ + "/train.jsonl") << "{}\n";
    StartCoordinator();
  }
  ~ServiceTest() override {
    for (auto& [name, pid] : running_) {
      kill(pid, SIGTERM);
      waitpid(pid, nullptr, 0);
    }
    EXPECT_EQ(Trainers(), 0) << "trainers are left behind";
    if (HasFailure()) {
      for (const char* log : {"attuned.log", "worker-a.log"}) {
        std::ifstream in(directory_ + "/" + log);
        std::cerr << "--- " << log << "\n" << in.rdbuf();
      }
    }
    fs::remove_all(directory_);
  }

  pid_t Spawn(const std::vector<std::string>& arguments, const std::string& out_file) {
    const pid_t pid = fork();
    if (pid != 0) return pid;
    const int fd = open(out_file.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(fd, 1);
    dup2(fd, 2);
    std::vector<char*> pointers;
    for (const std::string& a : arguments) pointers.push_back(const_cast<char*>(a.c_str()));
    pointers.push_back(nullptr);
    execv(pointers[0], pointers.data());
    _exit(127);
  }

  static std::string Program(const std::string& name) {
    return absl::StrCat(ATTUNE_BIN_DIR, "/", name);
  }

  void StartCoordinator() {
    running_["attuned"] = Spawn({Program("attuned"), "--data-dir", directory_ + "/data",
                                 "--lease-timeout-s", "3", "--heartbeat-interval-s", "0.3"},
                                directory_ + "/attuned.log");
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (Attune({"list"}).exit != 0 && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(50));
    }
  }

  void StartWorker(const std::string& name, int slots) {
    running_[name] =
        Spawn({Program("attune-worker"), "--data-dir", directory_ + "/data", "--state-dir",
               directory_ + "/" + name, "--cpu-slots", absl::StrCat(slots), "--root",
               directory_ + "/root", "--trainer", Program("fake_trainer")},
              directory_ + "/" + name + ".log");
  }

  void Kill(const std::string& name) {
    kill(running_[name], SIGKILL);
    waitpid(running_[name], nullptr, 0);
    running_.erase(name);
  }

  // Runs `attune` to its end.
  Result Attune(std::vector<std::string> arguments, bool with_errors = false) {
    arguments.insert(arguments.begin(), Program("attune"));
    if (arguments.back() != "--help") {
      arguments.insert(arguments.end(), {"--data-dir", directory_ + "/data"});
    }
    int pipe_fds[2];
    EXPECT_EQ(pipe(pipe_fds), 0);
    const pid_t pid = fork();
    if (pid == 0) {
      dup2(pipe_fds[1], 1);
      dup2(with_errors ? pipe_fds[1] : open("/dev/null", O_WRONLY), 2);
      close(pipe_fds[0]);
      close(pipe_fds[1]);
      std::vector<char*> pointers;
      for (const std::string& a : arguments) pointers.push_back(const_cast<char*>(a.c_str()));
      pointers.push_back(nullptr);
      execv(pointers[0], pointers.data());
      _exit(127);
    }
    close(pipe_fds[1]);
    Result result;
    char buffer[4096];
    for (ssize_t n; (n = read(pipe_fds[0], buffer, sizeof(buffer))) > 0;) {
      result.out.append(buffer, n);
    }
    close(pipe_fds[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    result.exit = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return result;
  }

  std::string WriteSpec(const std::string& name, int devices, int steps,
                        const std::string& more = "") {
    const std::string path = absl::StrCat(directory_, "/", name, ".yaml");
    std::ofstream(path) << "name: " << name << "\nmodel: {source: {path: model}}\n"
                        << "datasets: [{source: {file: train.jsonl}}]\n"
                        << "schedule: {steps: " << steps << "}\ncheckpoints: {every_steps: 5}\n"
                        << "resources: {devices: " << devices << "}\n"
                        << more;
    return path;
  }

  // The job's name.
  std::string Submit(const std::string& spec) {
    const Result result = Attune({"submit", spec, "-o", "json"});
    EXPECT_EQ(result.exit, 0) << result.out;
    return Json::parse(result.out, nullptr, false).value("name", "");
  }

  Json Get(const std::string& job) {
    return Json::parse(Attune({"get", job, "-o", "json"}).out, nullptr, false);
  }

  int64_t StepOf(const std::string& job) {
    const Json json = Get(job);
    if (!json.is_object() || !json.contains("progress") || json["progress"].is_null()) return 0;
    return std::stoll(json["progress"].value("step", "0"));
  }

  void WaitForStep(const std::string& job, int64_t step) {
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (StepOf(job) < step && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(20));
    ASSERT_GE(StepOf(job), step) << Get(job);
  }

  // Objects of this kind in the output of `attune watch -o json`.
  static std::vector<Json> Items(const std::string& out, const std::string& kind) {
    std::vector<Json> items;
    for (const absl::string_view line : absl::StrSplit(out, '\n', absl::SkipEmpty())) {
      Json json = Json::parse(line.begin(), line.end(), nullptr, false);
      if (json.is_object() && json.contains(kind)) items.push_back(json[kind]);
    }
    return items;
  }

  // (attempt, step) of every metric, in order.
  static std::vector<std::pair<int, int>> Steps(const std::string& out) {
    std::vector<std::pair<int, int>> steps;
    for (const Json& m : Items(out, "metrics")) {
      steps.push_back({m.value("attempt", 0), std::stoi(m.value("step", "0"))});
    }
    return steps;
  }

  static std::vector<std::pair<int, int>> Run(int attempt, int from, int to) {
    std::vector<std::pair<int, int>> steps;
    for (int step = from; step <= to; ++step) steps.push_back({attempt, step});
    return steps;
  }

  int Trainers() const {
    int found = 0;
    for (const auto& entry : fs::directory_iterator("/proc")) {
      std::ifstream in(entry.path() / "cmdline", std::ios::binary);
      const std::string line((std::istreambuf_iterator<char>(in)),
                             std::istreambuf_iterator<char>());
      found += absl::StrContains(line, directory_) && absl::StrContains(line, "--channel-fd");
    }
    return found;
  }

  std::string directory_;
  std::map<std::string, pid_t> running_;
};

TEST_F(ServiceTest, AJobFromSubmitToDownload) {
  StartWorker("worker-a", 2);
  const Result waited = Attune({"submit", WriteSpec("fake", 2, 20), "--wait", "--logs"});
  EXPECT_EQ(waited.exit, 0) << waited.out;
  EXPECT_THAT(waited.out, AllOf(HasSubstr("RUNNING"), HasSubstr("step 20/20"),
                                HasSubstr("rank 1 of 2 starts"), HasSubstr("succeeded")));
  const std::string id(absl::StrSplit(waited.out, '\n').begin()->substr(5));
  EXPECT_THAT(Attune({"list"}).out, AllOf(HasSubstr(id), HasSubstr("20/20 (100%)")));
  EXPECT_THAT(Attune({"get", id}).out, HasSubstr("final checkpoint:"));
  EXPECT_THAT(Attune({"get", id, "-o", "yaml"}).out, HasSubstr("state: \"JOB_STATE_SUCCEEDED\""));
  EXPECT_THAT(Attune({"get", id, "--spec"}).out, HasSubstr("learning_rate"));
  EXPECT_THAT(Attune({"checkpoints", id}).out, HasSubstr("20 (final)"));
  EXPECT_THAT(Attune({"logs", id, "--rank", "1"}).out, HasSubstr("rank 1 of 2 starts"));
  EXPECT_THAT(Attune({"workers"}).out, AllOf(HasSubstr("cpu:1"), HasSubstr("connected")));
  const std::string adapter = directory_ + "/adapter";
  EXPECT_EQ(Attune({"download", id, "-o", adapter}).exit, 0);
  EXPECT_EQ(fs::file_size(adapter + "/adapter_model.safetensors"), 3000000u);
  EXPECT_FALSE(fs::exists(adapter + ".part"));
  EXPECT_EQ(Attune({"download", id, "-o", adapter}).exit, 0) << "it is there already";
  std::ofstream(adapter + "/mine") << "x";
  EXPECT_EQ(Attune({"download", id, "-o", adapter}).exit, 7);
  EXPECT_EQ(Attune({"download", id, "-o", adapter, "--replace"}).exit, 0);
  EXPECT_FALSE(fs::exists(adapter + "/mine"));
  EXPECT_EQ(Attune({"download", id, "--checkpoint", "7", "-o", adapter + "7"}).exit, 5);
  EXPECT_EQ(Attune({"cancel", id}).exit, 7);
  EXPECT_EQ(Attune({"delete", id}).exit, 0);
  EXPECT_EQ(Attune({"get", id}).exit, 5);
}

TEST_F(ServiceTest, OneJobOverTwoWorkers) {
  StartWorker("worker-a", 1);
  StartWorker("worker-b", 1);
  const Result waited = Attune({"submit", WriteSpec("fake", 2, 20), "--wait"});
  EXPECT_EQ(waited.exit, 0) << waited.out;
  EXPECT_THAT(waited.out, HasSubstr("step 20/20"));
}

TEST_F(ServiceTest, ACrashGoesBackToTheLastCheckpoint) {
  StartWorker("worker-a", 2);
  const Result waited =
      Attune({"submit", WriteSpec("fake-crash-12", 1, 20), "--wait", "-o", "json"});
  EXPECT_EQ(waited.exit, 0) << waited.out;
  std::vector<std::pair<int, int>> expected = Run(1, 1, 12);
  for (const auto& step : Run(2, 11, 20)) expected.push_back(step);
  EXPECT_EQ(Steps(waited.out), expected);
  std::string recovery;
  for (const Json& event : Items(waited.out, "event")) {
    if (event.value("kind", "") == "EVENT_KIND_RECOVERY") recovery = event.value("message", "");
  }
  EXPECT_THAT(recovery, HasSubstr("10"));
}

TEST_F(ServiceTest, FailuresHaveTheirExitCodes) {
  StartWorker("worker-a", 1);
  Result result = Attune({"submit", WriteSpec("fake-fail-3", 1, 20), "--wait"});
  EXPECT_EQ(result.exit, 3);
  EXPECT_THAT(result.out, HasSubstr("loss is not finite"));
  result = Attune({"submit", WriteSpec("fake-invalid-1", 1, 20), "--wait"});
  EXPECT_EQ(result.exit, 3);
  EXPECT_THAT(result.out, HasSubstr("line 3: not JSON"));
  result =
      Attune({"submit", WriteSpec("fake-always-3", 1, 20, "retry: {max_restarts: 1}\n"), "--wait"});
  EXPECT_EQ(result.exit, 3);
  EXPECT_THAT(result.out, HasSubstr("signal 6"));
  result = Attune({"submit", WriteSpec("fake", 1, 20, "sede: 3\n")}, true);
  EXPECT_EQ(result.exit, 1);
  EXPECT_THAT(result.out, AllOf(HasSubstr("fake.yaml:7"), HasSubstr("sede")));
  EXPECT_EQ(Attune({"get", "nosuchjob"}).exit, 5);
  EXPECT_EQ(Attune({"get"}).exit, 1);
  std::ofstream(directory_ + "/bad-token") << "0123";
  EXPECT_EQ(Attune({"list", "--token-file", directory_ + "/bad-token"}).exit, 8);
  Kill("attuned");
  EXPECT_EQ(Attune({"list"}).exit, 2);
}

TEST_F(ServiceTest, TheSameRequestIdIsTheSameJob) {
  const std::string spec = WriteSpec("fake", 1, 20);
  const std::string id = "123e4567-e89b-42d3-a456-426614174000";
  const Result first = Attune({"submit", spec, "--request-id", id, "-o", "json"});
  const Result again = Attune({"submit", spec, "--request-id", id, "-o", "json"});
  ASSERT_EQ(first.exit, 0) << first.out;
  ASSERT_EQ(again.exit, 0) << again.out;
  EXPECT_EQ(Json::parse(first.out)["name"], Json::parse(again.out)["name"]);
  EXPECT_EQ(Attune({"submit", WriteSpec("fake", 1, 21), "--request-id", id}).exit, 7);
}

TEST_F(ServiceTest, AStalledJobStartsAgain) {
  StartWorker("worker-a", 1);
  const Result waited =
      Attune({"submit", WriteSpec("fake-hang-7", 1, 20, "retry: {stall_timeout_s: 5}\n"), "--wait",
              "-o", "json"});
  EXPECT_EQ(waited.exit, 0) << waited.out;
  std::vector<std::pair<int, int>> expected = Run(1, 1, 7);
  for (const auto& step : Run(2, 6, 20)) expected.push_back(step);
  EXPECT_EQ(Steps(waited.out), expected);
}

TEST_F(ServiceTest, CancelFreesTheDevicesWithinTwoSeconds) {
  StartWorker("worker-a", 2);
  const std::string job = Submit(WriteSpec("fake-ms-50-deaf-1-child-1", 2, 1000));
  WaitForStep(job, 2);
  const absl::Time before = absl::Now();
  EXPECT_EQ(Attune({"cancel", job, "--wait"}).exit, 0);
  EXPECT_LT(absl::Now() - before, absl::Seconds(2));
  EXPECT_EQ(Trainers(), 0);
  EXPECT_EQ(Attune({"watch", job}).exit, 4);
}

TEST_F(ServiceTest, PauseAndResumeOnAnotherNumberOfDevices) {
  StartWorker("worker-a", 2);
  const std::string job = Submit(WriteSpec("fake-ms-30", 2, 60));
  WaitForStep(job, 3);
  EXPECT_EQ(Attune({"pause", job, "--wait"}).exit, 0);
  EXPECT_EQ(Trainers(), 0);
  const Result paused = Attune({"watch", job, "-o", "json"});
  EXPECT_EQ(paused.exit, 6);
  const int last = Steps(paused.out).back().second;
  EXPECT_EQ(Attune({"resume", job, "--devices", "1"}).exit, 0);
  const Result done = Attune({"watch", job, "-o", "json"});
  EXPECT_EQ(done.exit, 0);
  std::vector<std::pair<int, int>> expected = Run(1, 1, last);
  for (const auto& step : Run(2, last + 1, 60)) expected.push_back(step);
  EXPECT_EQ(Steps(done.out), expected);
}

TEST_F(ServiceTest, AnAgentThatWasKilledComesBackAndTheJobGoesOn) {
  StartWorker("worker-a", 2);
  const std::string job = Submit(WriteSpec("fake-ms-30-child-1", 2, 60));
  WaitForStep(job, 12);
  Kill("worker-a");
  StartWorker("worker-a", 2);
  const Result done = Attune({"watch", job, "-o", "json"});
  EXPECT_EQ(done.exit, 0) << done.out;
  const std::vector<std::pair<int, int>> steps = Steps(done.out);
  // Attempt 1 without a gap; attempt 2 from a checkpoint of it.
  size_t second = 0;
  while (second < steps.size() && steps[second].first == 1) ++second;
  ASSERT_LT(second, steps.size());
  const int from = steps[second].second;
  EXPECT_EQ((from - 1) % 5, 0);
  EXPECT_GT(from, 5);
  std::vector<std::pair<int, int>> expected = Run(1, 1, static_cast<int>(second));
  for (const auto& step : Run(2, from, 60)) expected.push_back(step);
  EXPECT_EQ(steps, expected);
}

// Nothing is lost or doubled, for the coordinator and for somebody who watches all the time, and
// no trainer is stopped.
TEST_F(ServiceTest, ACoordinatorThatIsKilledLosesNothing) {
  StartWorker("worker-a", 2);
  const std::string job = Submit(WriteSpec("fake-ms-30", 2, 150));
  WaitForStep(job, 3);
  const pid_t watcher =
      Spawn({Program("attune"), "watch", job, "-o", "json", "--data-dir", directory_ + "/data"},
            directory_ + "/watched");
  std::error_code error;
  while (fs::file_size(directory_ + "/watched", error) == 0 || error) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  for (int i = 0; i < 4; ++i) {
    Kill("attuned");
    absl::SleepFor(absl::Milliseconds(100 + 150 * i));
    StartCoordinator();
    absl::SleepFor(absl::Milliseconds(300));
  }
  int status = 0;
  waitpid(watcher, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  std::ifstream in(directory_ + "/watched");
  const std::string watched((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  EXPECT_EQ(Steps(watched), Run(1, 1, 150)) << watched;
  const Result again = Attune({"watch", job, "-o", "json"});
  EXPECT_EQ(Steps(again.out), Run(1, 1, 150));
  EXPECT_EQ(Items(again.out, "event"), Items(watched, "event"));
  std::vector<int> checkpoints;
  for (const Json& event : Items(again.out, "event")) {
    if (event.value("kind", "") != "EVENT_KIND_CHECKPOINT") continue;
    checkpoints.push_back(std::stoi(event.value("step", "0")));
  }
  ASSERT_EQ(checkpoints.size(), 30u);
  for (int i = 0; i < 30; ++i) EXPECT_EQ(checkpoints[i], 5 * (i + 1));
}

TEST_F(ServiceTest, HelpIsQuick) {
  absl::Duration best = absl::InfiniteDuration();
  for (int i = 0; i < 5; ++i) {
    const absl::Time before = absl::Now();
    const Result help = Attune({"--help"}, true);
    best = std::min(best, absl::Now() - before);
    ASSERT_THAT(help.out, HasSubstr("submit"));
  }
  EXPECT_LT(best, absl::Milliseconds(50));
}

}  // namespace
}  // namespace attune
