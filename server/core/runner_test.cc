// Many threads against one runner with its store and watch hub, without sockets: what thread
// sanitizer looks at.
#include "server/core/runner.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <future>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/job_spec.h"
#include "server/core/names.h"

namespace attune {
namespace {

using testing::HasSubstr;

// Answers leases like an agent, on the runner's own thread.
class EchoSession final : public WorkerSession {
 public:
  void Send(const v1::CoordinatorMessage& message) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!message.has_lease()) return;
    v1::Report report;
    report.set_epoch(message.lease().epoch());
    report.set_sequence(1);
    if (message.lease().kind() == v1::LEASE_KIND_VALIDATE) {
      report.mutable_validation()->set_model_digest(std::string(64, 'd'));
    } else {
      report.mutable_running()->set_total_steps(1);
    }
    runner_->Post(ReportEvent{id_, report});
    report.set_sequence(2);
    report.mutable_log()->set_text("line");
    runner_->Post(ReportEvent{id_, report});
    report.set_sequence(3);
    report.mutable_checkpoint()->set_final(true);
    report.mutable_checkpoint()->set_artifact("artifacts/x");
    runner_->Post(ReportEvent{id_, report});
    report.set_sequence(4);
    report.mutable_ended()->set_outcome(v1::LEASE_OUTCOME_COMPLETED);
    runner_->Post(ReportEvent{id_, report});
  }
  void Close(const absl::Status& status) override { closed_ = true; }
  void Start(Runner* runner, SessionId id) {
    std::lock_guard<std::mutex> lock(mutex_);
    runner_ = runner;
    id_ = id;
  }

 private:
  std::mutex mutex_;
  Runner* runner_ = nullptr;
  SessionId id_ = 0;
  std::atomic<bool> closed_ = false;
};

// Collects a stream; asks for more at once, or never.
class Collector final : public WatchSubscriber {
 public:
  explicit Collector(bool stalls) : stalls_(stalls) {}
  void Deliver(std::vector<StreamItem> items) override {
    uint64_t more = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const StreamItem& item : items) revisions_.push_back(item.revision);
      more = stalls_ ? 0 : id_;
      early_ = id_ == 0;
    }
    if (more != 0) hub_->More(more);
  }
  void End(absl::Status status) override { ended_.set_value(status); }
  void Start(WatchHub* hub, WatchOptions options, const std::shared_ptr<Collector>& self) {
    hub_ = hub;
    const uint64_t id = hub->Subscribe(std::move(options), self);
    bool more = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      id_ = id;
      more = early_ && !stalls_;
    }
    if (more) hub->More(id);
  }
  std::future<absl::Status> ended() { return ended_.get_future(); }
  std::vector<int64_t> revisions() {
    std::lock_guard<std::mutex> lock(mutex_);
    return revisions_;
  }

 private:
  const bool stalls_;
  WatchHub* hub_ = nullptr;
  std::mutex mutex_;
  uint64_t id_ = 0;
  bool early_ = false;
  std::vector<int64_t> revisions_;
  std::promise<absl::Status> ended_;
};

class RunnerTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/attune_runner_test_XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    directory_ = path;
    auto store = Store::Open(directory_ + "/jobs.db", Retention());
    ASSERT_TRUE(store.ok());
    auto reader = StreamReader::Open(directory_ + "/jobs.db");
    ASSERT_TRUE(reader.ok());
    hub_ = std::make_unique<WatchHub>(*std::move(reader));
    CoordinatorOptions options;
    options.artifact_ready = [](const std::string&) { return true; };
    auto coordinator = std::make_unique<Coordinator>(options, *(*store)->Load(), absl::Now());
    RunnerOptions runner;
    runner.clock = [] { return absl::Now(); };
    runner.tick = absl::Milliseconds(20);
    runner.watch_hub = hub_.get();
    runner.on_fatal = [this](const absl::Status& status) { fatal_.set_value(status); };
    runner_ =
        std::make_unique<Runner>(std::move(runner), std::move(coordinator), *std::move(store));
  }
  void TearDown() override {
    runner_->Shutdown();
    hub_.reset();
    runner_.reset();
    std::system(("rm -rf " + directory_).c_str());
  }

  static v1::JobSpec MakeSpec() {
    v1::JobSpec spec;
    spec.mutable_model()->mutable_source()->set_path("m");
    spec.add_datasets()->mutable_source()->set_path("d");
    ApplyDefaults("job", &spec);
    return spec;
  }
  // Calls and waits for the answer.
  template <typename Event>
  std::pair<absl::Status, v1::Job> Call(Event event) {
    std::promise<std::pair<absl::Status, v1::Job>> answer;
    runner_->Call(std::move(event), [&](absl::Status status, v1::Job job) {
      answer.set_value({std::move(status), std::move(job)});
    });
    return answer.get_future().get();
  }
  std::shared_ptr<EchoSession> StartWorker(const std::string& name, int devices) {
    auto session = std::make_shared<EchoSession>();
    const SessionId id = runner_->OpenSession(session);
    session->Start(runner_.get(), id);
    RegisterEvent event{id, {}};
    event.message.set_worker(name);
    for (int i = 0; i < devices; ++i) {
      v1::Device* device = event.message.add_devices();
      device->set_id(absl::StrCat("cpu:", i));
      device->set_type(v1::DEVICE_TYPE_CPU);
    }
    runner_->Post(std::move(event));
    return session;
  }

  std::string directory_;
  std::unique_ptr<WatchHub> hub_;
  std::unique_ptr<Runner> runner_;
  std::promise<absl::Status> fatal_;
};

TEST_F(RunnerTest, ManyClientsWorkersAndWatchersAtOnce) {
  constexpr int kThreads = 4;
  constexpr int kJobs = 15;
  const auto a = StartWorker("workers/a", 2);
  const auto b = StartWorker("workers/b", 1);
  auto all = std::make_shared<Collector>(/*stalls=*/false);
  auto stalled = std::make_shared<Collector>(/*stalls=*/true);
  all->Start(hub_.get(), {.kind = StreamKind::kEvents}, all);
  stalled->Start(hub_.get(), {.kind = StreamKind::kEvents}, stalled);
  std::atomic<int> succeeded = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int j = 0; j < kJobs; ++j) {
        const std::string name = absl::StrCat("jobs/j", t, "-", j);
        EXPECT_TRUE(Call(CreateJobEvent{0, name, MakeSpec(), "", ""}).first.ok());
        auto logs = std::make_shared<Collector>(/*stalls=*/false);
        auto ended = logs->ended();
        logs->Start(hub_.get(), {.kind = StreamKind::kLogs, .job = name, .until_end = true}, logs);
        const auto [status, job] = Call(WaitJobEvent{0, name, absl::Now() + absl::Seconds(60)});
        EXPECT_TRUE(status.ok());
        if (job.state() == v1::JOB_STATE_SUCCEEDED) ++succeeded;
        EXPECT_TRUE(ended.get().ok());
        EXPECT_EQ(logs->revisions().size(), 1u);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(succeeded, kThreads * kJobs);
  // Each job had five state events and a checkpoint; nobody missed or doubled one.
  const size_t expected = kThreads * kJobs * 6;
  for (int i = 0; i < 500 && all->revisions().size() < expected; ++i) usleep(10000);
  const std::vector<int64_t> revisions = all->revisions();
  EXPECT_EQ(revisions.size(), expected);
  EXPECT_TRUE(std::is_sorted(revisions.begin(), revisions.end()));
  EXPECT_EQ(std::set<int64_t>(revisions.begin(), revisions.end()).size(), revisions.size());
  EXPECT_LT(stalled->revisions().size(), expected) << "it never asked for more";
}

TEST_F(RunnerTest, ShutdownAnswersWhatWaits) {
  EXPECT_TRUE(Call(CreateJobEvent{0, "jobs/a", MakeSpec(), "", ""}).first.ok());
  std::promise<absl::Status> waited;
  runner_->Call(WaitJobEvent{0, "jobs/a", absl::Now() + absl::Hours(1)},
                [&](absl::Status status, v1::Job) { waited.set_value(status); });
  runner_->Shutdown();
  EXPECT_TRUE(absl::IsUnavailable(waited.get_future().get()));
  EXPECT_TRUE(absl::IsUnavailable(Call(CancelJobEvent{0, "jobs/a", ""}).first));
}

TEST_F(RunnerTest, NothingIsAcknowledgedThatCannotBeStored) {
  EXPECT_TRUE(Call(CreateJobEvent{0, "jobs/a", MakeSpec(), "", ""}).first.ok());
  {  // another process breaks the schema under it
    auto database =
        sqlite::Database::Open(directory_ + "/jobs.db", sqlite::Database::Mode::kReadWriteCreate);
    ASSERT_TRUE((*database)->Execute("DROP TABLE events").ok());
  }
  const absl::Status status = Call(CreateJobEvent{0, "jobs/b", MakeSpec(), "", ""}).first;
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(fatal_.get_future().get().ToString(), HasSubstr("events"));
}

TEST_F(RunnerTest, WatchersStartWhereTheyAskAndAreRefusedTooOldTokens) {
  EXPECT_TRUE(Call(CreateJobEvent{0, "jobs/a", MakeSpec(), "", ""}).first.ok());
  auto now = std::make_shared<Collector>(/*stalls=*/false);
  auto ended = now->ended();
  now->Start(hub_.get(),
             {.kind = StreamKind::kEvents, .job = "jobs/a", .from_now = true, .until_end = true},
             now);
  usleep(50000);  // it must have been served: an event before that would not be seen
  EXPECT_TRUE(Call(CancelJobEvent{0, "jobs/a", ""}).first.ok());
  EXPECT_TRUE(ended.get().ok());
  EXPECT_EQ(now->revisions().size(), 1u);
  auto unknown = std::make_shared<Collector>(/*stalls=*/false);
  auto refused = unknown->ended();
  unknown->Start(hub_.get(), {.kind = StreamKind::kLogs, .job = "jobs/none"}, unknown);
  EXPECT_TRUE(absl::IsNotFound(refused.get()));
  auto ahead = std::make_shared<Collector>(/*stalls=*/false);
  auto ahead_refused = ahead->ended();
  ahead->Start(hub_.get(), {.kind = StreamKind::kEvents, .job = "jobs/a", .after = 1000000}, ahead);
  EXPECT_TRUE(absl::IsOutOfRange(ahead_refused.get()));
}

}  // namespace
}  // namespace attune
