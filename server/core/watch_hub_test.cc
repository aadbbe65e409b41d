#include "server/core/watch_hub.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <optional>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/errors.h"
#include "server/core/names.h"
#include "server/store/store.h"

namespace attune {
namespace {

class Subscriber final : public WatchSubscriber {
 public:
  void Deliver(std::vector<StreamItem> items) override {}
  void End(absl::Status status) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = std::move(status);
    changed_.notify_all();
  }

  /// The status that the stream ended with; none within `patience`: the stream goes on.
  std::optional<absl::Status> Ended(std::chrono::milliseconds patience) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, patience, [this] { return ended_.has_value(); });
    return ended_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<absl::Status> ended_;
};

constexpr std::chrono::milliseconds kShort(100);
constexpr std::chrono::milliseconds kLong(30000);

class WatchHubTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/attune_hub_test_XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    directory_ = path;
    store_ = *Store::Open(directory_ + "/jobs.db", {.events = 10, .metrics = 10, .logs = 10});
    JobRecord job;
    job.seq = 1;
    job.job.set_name("jobs/a");
    job.job.set_state(v1::JOB_STATE_RUNNING);
    std::vector<Effect> effects = {PutJob{job}};
    for (int64_t revision = 1; revision <= 12; ++revision) {
      v1::LogLine line;
      line.set_revision(revision);
      line.set_job("jobs/a");
      effects.push_back(AppendLog{line});
    }
    effects.push_back(PutCounters{12, 0, 1});
    ASSERT_TRUE(store_->Commit(effects).ok());
    hub_ = std::make_unique<WatchHub>(*StreamReader::Open(directory_ + "/jobs.db"));
  }
  void TearDown() override {
    hub_.reset();
    store_.reset();
    std::system(("rm -rf " + directory_).c_str());
  }

  std::string directory_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<WatchHub> hub_;
};

TEST_F(WatchHubTest, ATokenOlderThanWhatIsKeptIsRefusedWithTheOldestThatWorks) {
  auto subscriber = std::make_shared<Subscriber>();
  hub_->Subscribe({.kind = StreamKind::kLogs, .job = "jobs/a", .after = 1}, subscriber);
  const absl::Status status = subscriber->Ended(kLong).value_or(absl::OkStatus());
  EXPECT_TRUE(absl::IsOutOfRange(status)) << status;
  EXPECT_EQ(ReasonOf(status), "RESUME_TOKEN_EXPIRED");
  EXPECT_THAT(status.ToString(), testing::HasSubstr(MakeResumeToken(StreamKind::kLogs, 2)));
}

TEST_F(WatchHubTest, ATokenAtTheEdgeIsServedAndShutdownEndsIt) {
  auto subscriber = std::make_shared<Subscriber>();
  hub_->Subscribe({.kind = StreamKind::kLogs, .job = "jobs/a", .after = 2}, subscriber);
  EXPECT_EQ(subscriber->Ended(kShort), std::nullopt);
  hub_.reset();
  EXPECT_TRUE(absl::IsUnavailable(subscriber->Ended(kLong).value_or(absl::OkStatus())));
}

TEST_F(WatchHubTest, TheEndOfAJobEndsStreamsOfEveryKind) {
  auto subscriber = std::make_shared<Subscriber>();
  hub_->Subscribe({.kind = StreamKind::kMetrics, .job = "jobs/a", .until_end = true}, subscriber);
  EXPECT_EQ(subscriber->Ended(kShort), std::nullopt);
  JobRecord job;
  job.seq = 1;
  job.job.set_name("jobs/a");
  job.job.set_state(v1::JOB_STATE_SUCCEEDED);
  v1::Event event;
  event.set_revision(13);
  event.set_job("jobs/a");
  ASSERT_TRUE(store_->Commit({PutJob{job}, AppendEvent{event}, PutCounters{13, 0, 1}}).ok());
  hub_->Notify({{StreamKind::kEvents, "jobs/a"}});
  EXPECT_EQ(subscriber->Ended(kLong), absl::OkStatus());
}

}  // namespace
}  // namespace attune
