// A trainer that trains nothing: it speaks the protocol of proto/attune/v1/trainer.proto and does
// what the job's name says, so that agent and coordinator can be tested without an engine.
//
// The name is "fake" followed by pairs "-<word>-<number>":
//   ms        milliseconds per step [5]
//   load      milliseconds of loading [0]
//   crash     aborts after this step, in attempt 1 only
//   always    aborts after this step, in every attempt
//   hang      stops doing anything after this step, in attempt 1 only
//   fail      reports DIVERGED after this step and ends
//   peer      rank 0 reports PEER_LOST after this step; rank 1 aborts 200 ms later
//   early     ends with exit code 0 after this step
//   rubbish   writes bytes that are no message after this step
//   spam      prints this many lines at the start
//   deaf      1: ignores SIGTERM and a stop with a checkpoint
//   child     1: starts a child that sleeps for ever in a session of its own
//   invalid   1: validation finds an error
// Total steps: schedule.steps [20]; a checkpoint every checkpoints.every_steps and at the end. The
// loss of a step is a function of the step alone; a resumed run reads the step to go on from.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "attune/v1/trainer.pb.h"
#include "worker/io/message_channel.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr int kAgentLost = 15;  // as attune-trainer's exit code

class FakeTrainer {
 public:
  FakeTrainer(v1::TrainerAssignment assignment, int fd)
      : assignment_(std::move(assignment)), channel_(fd) {
    const std::vector<std::string> words = absl::StrSplit(assignment_.spec().name(), '-');
    for (size_t i = 1; i + 1 < words.size(); i += 2) {
      int64_t value = 0;
      if (absl::SimpleAtoi(words[i + 1], &value)) script_[words[i]] = value;
    }
    std::thread([this] { Receive(); }).detach();
  }

  int Run() {
    if (Script("deaf", 0) != 0) signal(SIGTERM, SIG_IGN);
    if (Script("child", 0) != 0) StartChild();
    for (int64_t i = 0; i < Script("spam", 0); ++i) std::printf("spam line %ld\n", long(i));
    std::fflush(stdout);
    std::fprintf(stderr, "rank %d of %d starts, OMP_NUM_THREADS=%s\n", assignment_.rank(),
                 assignment_.world_size(), std::getenv("OMP_NUM_THREADS"));
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    std::fprintf(stderr, "device %s, CUDA_VISIBLE_DEVICES=%s\n", assignment_.device().id().c_str(),
                 visible == nullptr ? "(unset)" : visible);
    if (assignment_.kind() == v1::LEASE_KIND_VALIDATE) return Validate();
    Progress("load");
    Sleep(Script("load", 0));
    Rendezvous();
    return Train();
  }

 private:
  int64_t Script(const std::string& word, int64_t otherwise) const {
    const auto found = script_.find(word);
    return found == script_.end() ? otherwise : found->second;
  }

  void Sleep(int64_t ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

  void Send(const v1::TrainerToAgent& message) {
    if (!channel_.Send(message).ok()) _exit(kAgentLost);
  }

  void Progress(const char* phase) {
    v1::TrainerToAgent message;
    message.mutable_progress()->set_phase(phase);
    Send(message);
  }

  void StartChild() {
    if (fork() != 0) return;
    setsid();
    signal(SIGTERM, SIG_IGN);
    for (;;) pause();
  }

  void Receive() {
    for (;;) {
      v1::AgentToTrainer message;
      if (!channel_.Receive(absl::InfiniteDuration(), &message).ok()) _exit(kAgentLost);
      std::lock_guard<std::mutex> lock(mutex_);
      if (message.has_rendezvous_value()) {
        values_[message.rendezvous_value().key()] = message.rendezvous_value().value();
      }
      if (message.has_stop()) stop_ = true;
      if (message.has_checkpoint_release()) released_ = message.checkpoint_release().step();
      changed_.notify_all();
    }
  }

  int Validate() {
    v1::TrainerToAgent message;
    v1::ValidationReport* report = message.mutable_validation();
    if (Script("invalid", 0) != 0) report->add_errors("datasets[0]: line 3: not JSON");
    report->set_model_digest(std::string(64, 'a'));
    report->set_model_family("fake");
    report->set_precision(v1::PRECISION_F32);
    report->set_total_steps(TotalSteps());
    Send(message);
    return 0;
  }

  void Rendezvous() {
    v1::TrainerToAgent set;
    set.mutable_rendezvous_set()->set_key(absl::StrCat("rank-", assignment_.rank()));
    set.mutable_rendezvous_set()->set_value(absl::StrCat("value-", assignment_.rank()));
    Send(set);
    for (int rank = 0; rank < assignment_.world_size(); ++rank) {
      v1::TrainerToAgent get;
      get.mutable_rendezvous_get()->set_key(absl::StrCat("rank-", rank));
      Send(get);
      std::unique_lock<std::mutex> lock(mutex_);
      const std::string key = absl::StrCat("rank-", rank);
      changed_.wait(lock, [&] { return values_.count(key) > 0; });
      if (values_[key] != absl::StrCat("value-", rank)) std::abort();
    }
  }

  int64_t TotalSteps() const {
    return assignment_.spec().schedule().has_steps() ? assignment_.spec().schedule().steps() : 20;
  }

  int64_t FirstStep() const {
    if (assignment_.checkpoint_directory().empty()) return 0;
    std::ifstream in(assignment_.checkpoint_directory() + "/trainer/state.json");
    std::string text;
    std::getline(in, text);
    long long step = -1;
    if (std::sscanf(text.c_str(), "{\"step\": %lld}", &step) != 1) std::abort();
    return step;
  }

  static double Loss(int64_t step) { return 3.0 / std::sqrt(static_cast<double>(step)); }

  int Train() {
    const int64_t from = FirstStep(), total = TotalSteps();
    v1::TrainerToAgent running;
    running.mutable_running()->set_from_step(from);
    running.mutable_running()->set_total_steps(total);
    Send(running);
    const int64_t every = std::max<int64_t>(1, assignment_.spec().checkpoints().every_steps());
    for (int64_t step = from + 1; step <= total; ++step) {
      Sleep(Script("ms", 5));
      SendStep(step, total);
      const bool stop = Stopping();
      if (step % every == 0 || step == total || stop) WriteCheckpoint(step, step == total);
      if (stop) return WaitForRelease(step);
      if (const int end = Misbehave(step); end >= 0) return end;
    }
    return WaitForRelease(total);
  }

  bool Stopping() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stop_ && Script("deaf", 0) == 0;
  }

  void SendStep(int64_t step, int64_t total) {
    if (assignment_.rank() != 0) return Progress("train");
    v1::TrainerToAgent message;
    v1::StepMetrics* metrics = message.mutable_step();
    metrics->set_step(step);
    metrics->set_loss(Loss(step));
    metrics->set_total_steps(total);
    metrics->set_trained_tokens(100);
    metrics->set_tokens(128);
    metrics->set_step_s(0.001 * Script("ms", 5));
    metrics->set_tokens_per_s(128 / std::max(0.001, metrics->step_s()));
    Send(message);
  }

  void WriteCheckpoint(int64_t step, bool final) {
    if (assignment_.rank() != 0) return;
    const std::string directory = absl::StrCat(assignment_.work_directory(), "/step-", step);
    fs::create_directories(directory + "/adapter");
    fs::create_directories(directory + "/trainer");
    std::ofstream(directory + "/adapter/adapter_config.json") << "{\"r\": 16}\n";
    std::ofstream(directory + "/adapter/adapter_model.safetensors")
        << std::string(3000000, static_cast<char>('a' + step % 26));
    std::ofstream(directory + "/trainer/state.json") << "{\"step\": " << step << "}\n";
    std::ofstream(directory + "/manifest.json") << "{}\n";
    v1::TrainerToAgent message;
    message.mutable_checkpoint()->set_step(step);
    message.mutable_checkpoint()->set_directory(directory);
    message.mutable_checkpoint()->set_loss(Loss(step));
    message.mutable_checkpoint()->set_final(final);
    Send(message);
  }

  int WaitForRelease(int64_t step) {
    if (assignment_.rank() != 0) return 0;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(30), [&] { return released_ >= step; });
    return 0;
  }

  // The exit code, or -1 to go on.
  int Misbehave(int64_t step) {
    const bool first = assignment_.attempt() <= 1;
    const bool last_rank = assignment_.rank() == assignment_.world_size() - 1;
    if (last_rank && ((first && step == Script("crash", -1)) || step == Script("always", -1))) {
      std::fprintf(stderr, "about to crash at step %ld\n", long(step));
      std::abort();
    }
    if (first && step == Script("hang", -1)) {
      for (;;) pause();
    }
    if (step == Script("early", -1)) return 0;
    if (step == Script("rubbish", -1)) {
      [[maybe_unused]] const ssize_t n = write(3, "\xff\xff\xff\xff rubbish", 12);
      for (;;) pause();
    }
    if (step == Script("fail", -1)) return Fail(v1::FAILURE_CAUSE_DIVERGED, "loss is not finite");
    if (step == Script("peer", -1)) {
      if (assignment_.rank() == 0) return Fail(v1::FAILURE_CAUSE_PEER_LOST, "rank 1 is gone");
      Sleep(200);
      std::abort();
    }
    return -1;
  }

  int Fail(v1::FailureCause cause, const std::string& text) {
    v1::TrainerToAgent message;
    message.mutable_failure()->set_cause(cause);
    message.mutable_failure()->set_message(text);
    Send(message);
    return 12;
  }

  const v1::TrainerAssignment assignment_;
  MessageChannel channel_;
  std::map<std::string, int64_t> script_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  bool stop_ = false;
  int64_t released_ = -1;
};

}  // namespace
}  // namespace attune

int main(int argc, char** argv) {
  if (argc != 5 || std::strcmp(argv[1], "--assignment") != 0) return 2;
  std::ifstream in(argv[2], std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  attune::v1::TrainerAssignment assignment;
  if (!assignment.ParseFromString(text.str())) return 2;
  auto* trainer = new attune::FakeTrainer(assignment, std::atoi(argv[4]));
  const int code = trainer->Run();
  // The receiving thread is still there: end without tearing anything down under it.
  std::fflush(nullptr);
  _exit(code);
}
