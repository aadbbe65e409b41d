#include "server/store/store.h"

#include <sqlite3.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/store/schema.h"
#include "server/store/stream_reader.h"

namespace attune {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class StoreTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/attune_store_test_XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    directory_ = path;
    path_ = directory_ + "/jobs.db";
  }
  void TearDown() override { std::system(("rm -rf " + directory_).c_str()); }

  std::unique_ptr<Store> Open(Retention retention = {}) {
    auto store = Store::Open(path_, retention);
    EXPECT_TRUE(store.ok()) << store.status();
    return store.ok() ? *std::move(store) : nullptr;
  }

  JobRecord MakeJob(int64_t seq) {
    JobRecord record;
    record.seq = seq;
    record.change = 3;
    record.queued_time = absl::FromUnixMicros(1234567);
    record.job.set_name(absl::StrCat("jobs/j", seq));
    record.job.set_state(v1::JOB_STATE_RUNNING);
    record.job.set_attempt(1);
    return record;
  }
  v1::Event MakeEvent(int64_t revision, const std::string& job) {
    v1::Event event;
    event.set_revision(revision);
    event.set_job(job);
    event.set_message(absl::StrCat("event ", revision));
    return event;
  }
  v1::LogLine MakeLog(int64_t revision, const std::string& job) {
    v1::LogLine line;
    line.set_revision(revision);
    line.set_job(job);
    return line;
  }

  std::string directory_, path_;
};

TEST_F(StoreTest, LoadsWhatWasCommitted) {
  LeaseRecord lease;
  lease.epoch = 5;
  lease.worker = "workers/a";
  lease.job = "jobs/j1";
  lease.kind = v1::LEASE_KIND_TRAIN;
  lease.attempt = 1;
  lease.devices = {"cpu:0", "cpu:1"};
  lease.first_rank = 2;
  lease.world_size = 4;
  lease.checkpoint_artifact = "artifacts/x";
  lease.checkpoint_step = 7;
  lease.phase = LeasePhase::kRunning;
  lease.abandoned = true;
  lease.stop = v1::STOP_MODE_KILL;
  lease.outcome = v1::LEASE_OUTCOME_FAILED;
  lease.deliveries = 2;
  lease.last_sequence = 9;
  v1::Worker worker;
  worker.set_name("workers/a");
  CheckpointRecord checkpoint{.job = "jobs/j1", .trained_tokens = 70};
  checkpoint.checkpoint.set_step(7);
  v1::StepMetrics metrics;
  metrics.set_revision(2);
  metrics.set_job("jobs/j1");
  metrics.set_attempt(1);
  metrics.set_step(8);
  const std::string binary("a\0b", 3);
  ASSERT_TRUE(Open()
                  ->Commit({PutJob{MakeJob(1)},
                            PutRequest{{"id", "jobs/j1", "digest", absl::FromUnixMicros(5)}},
                            PutLease{lease}, PutWorker{worker}, PutCheckpoint{checkpoint},
                            AppendMetrics{metrics, 80}, PutRendezvous{5, "key", binary},
                            PutCounters{2, 5, 1}})
                  .ok());
  const auto state = Open()->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_EQ(state->jobs.size(), 1u);
  EXPECT_EQ(state->jobs[0].seq, 1);
  EXPECT_EQ(state->jobs[0].change, 3);
  EXPECT_EQ(state->jobs[0].queued_time, absl::FromUnixMicros(1234567));
  EXPECT_EQ(state->jobs[0].job.name(), "jobs/j1");
  ASSERT_EQ(state->requests.size(), 1u);
  EXPECT_EQ(state->requests[0].digest, "digest");
  ASSERT_EQ(state->leases.size(), 1u);
  const LeaseRecord& read = state->leases[0];
  EXPECT_THAT(read.devices, ElementsAre("cpu:0", "cpu:1"));
  EXPECT_EQ(read.first_rank, 2);
  EXPECT_EQ(read.world_size, 4);
  EXPECT_EQ(read.checkpoint_step, 7);
  EXPECT_EQ(read.phase, LeasePhase::kRunning);
  EXPECT_TRUE(read.abandoned);
  EXPECT_EQ(read.stop, v1::STOP_MODE_KILL);
  EXPECT_EQ(read.outcome, v1::LEASE_OUTCOME_FAILED);
  EXPECT_EQ(read.deliveries, 2);
  EXPECT_EQ(read.last_sequence, 9);
  EXPECT_EQ(state->workers[0].name(), "workers/a");
  EXPECT_EQ(state->checkpoints[0].trained_tokens, 70);
  ASSERT_EQ(state->steps.at("jobs/j1").size(), 1u);
  EXPECT_EQ(state->steps.at("jobs/j1")[0].trained_tokens, 80);
  EXPECT_EQ(state->rendezvous.at({5, "key"}), binary);
  EXPECT_EQ(state->counters.revision, 2);
  EXPECT_EQ(state->counters.epoch, 5);
  EXPECT_EQ(state->counters.job_seq, 1);
}

TEST_F(StoreTest, ACommitIsAllOrNothing) {
  auto store = Open();
  ASSERT_TRUE(store->Commit({PutJob{MakeJob(1)}, AppendEvent{MakeEvent(1, "jobs/j1")}}).ok());
  // The second revision 1 breaks the transaction: the job before it must not stay.
  EXPECT_FALSE(store->Commit({PutJob{MakeJob(2)}, AppendEvent{MakeEvent(1, "jobs/j2")}}).ok());
  EXPECT_EQ(store->Load()->jobs.size(), 1u);
  EXPECT_TRUE(store->Commit({PutJob{MakeJob(2)}, AppendEvent{MakeEvent(2, "jobs/j2")}}).ok());
  EXPECT_EQ(store->Load()->jobs.size(), 2u);
}

TEST_F(StoreTest, ANewerSchemaIsRefused) {
  Open();
  {
    auto database = sqlite::Database::Open(path_, sqlite::Database::Mode::kReadWriteCreate);
    ASSERT_TRUE((*database)
                    ->Execute(absl::StrCat("INSERT INTO migrations (version) VALUES (",
                                           kSchemaVersion + 1, ")"))
                    .ok());
  }
  const auto store = Store::Open(path_, Retention());
  EXPECT_TRUE(absl::IsFailedPrecondition(store.status())) << store.status();
  EXPECT_THAT(std::string(store.status().message()), HasSubstr("newer attuned"));
}

TEST_F(StoreTest, ADamagedFileIsReported) {
  std::ofstream(path_) << std::string(10000, 'x');
  const auto store = Store::Open(path_, Retention());
  EXPECT_TRUE(absl::IsDataLoss(store.status())) << store.status();
}

// A full disk, by the file size limit of the process.
TEST_F(StoreTest, AFullDiskIsAnErrorAndLosesNothing) {
  auto store = Open();
  ASSERT_TRUE(store->Commit({PutJob{MakeJob(1)}}).ok());
  struct rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 256 << 10;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  absl::Status status;
  int64_t committed = 1;
  JobRecord big = MakeJob(2);
  big.job.set_message(std::string(50000, 'm'));
  for (int i = 0; i < 100 && status.ok(); ++i) {
    big.seq = committed + 1;
    big.job.set_name(absl::StrCat("jobs/j", big.seq));
    status = store->Commit({PutJob{big}});
    if (status.ok()) ++committed;
  }
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(static_cast<int64_t>(store->Load()->jobs.size()), committed);
  store.reset();
  EXPECT_EQ(static_cast<int64_t>(Open()->Load()->jobs.size()), committed);
}

TEST_F(StoreTest, RetentionDropsTheOldestAndRemembersWhere) {
  auto store = Open({.events = 100, .metrics = 100, .logs = 10});
  std::vector<Effect> effects = {PutJob{MakeJob(1)}};
  for (int64_t revision = 1; revision <= 12; ++revision) {
    effects.push_back(AppendLog{MakeLog(revision, "jobs/j1")});
  }
  effects.push_back(AppendLog{MakeLog(13, "jobs/j2")});
  effects.push_back(PutCounters{13, 0, 1});
  ASSERT_TRUE(store->Commit(effects).ok());
  auto reader = StreamReader::Open(path_);
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto page = (*reader)->Read(StreamKind::kLogs, "jobs/j1", 0, 100, 1 << 20);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->items.size(), 10u);
  EXPECT_EQ(page->items[0].revision, 3);
  EXPECT_EQ(page->dropped, 2);
  EXPECT_EQ(page->newest, 13);
  EXPECT_EQ(page->job_state, v1::JOB_STATE_RUNNING);
  EXPECT_EQ((*reader)->Read(StreamKind::kLogs, "jobs/j2", 0, 100, 1 << 20)->items.size(), 1u);
}

TEST_F(StoreTest, ReadsInPages) {
  auto store = Open();
  std::vector<Effect> effects;
  for (int64_t revision = 1; revision <= 5; ++revision) {
    effects.push_back(AppendEvent{MakeEvent(revision, revision % 2 == 1 ? "jobs/a" : "jobs/b")});
  }
  ASSERT_TRUE(store->Commit(effects).ok());
  auto reader = *StreamReader::Open(path_);
  auto page = reader->Read(StreamKind::kEvents, "jobs/a", 0, 2, 1 << 20);
  ASSERT_EQ(page->items.size(), 2u);
  EXPECT_TRUE(page->full);
  EXPECT_FALSE(page->job_exists);
  page = reader->Read(StreamKind::kEvents, "jobs/a", page->items[1].revision, 2, 1 << 20);
  ASSERT_EQ(page->items.size(), 1u);
  EXPECT_FALSE(page->full);
  EXPECT_EQ(page->items[0].revision, 5);
  EXPECT_EQ(reader->Read(StreamKind::kEvents, "", 0, 100, 1 << 20)->items.size(), 5u);
  EXPECT_EQ(reader->Read(StreamKind::kEvents, "", 0, 100, 1)->items.size(), 1u);
}

TEST_F(StoreTest, DeletedJobsArePurgedInSteps) {
  auto store = Open();
  std::vector<Effect> effects = {PutJob{MakeJob(1)}};
  for (int64_t revision = 1; revision <= 25; ++revision) {
    effects.push_back(AppendLog{MakeLog(revision, "jobs/j1")});
  }
  ASSERT_TRUE(store->Commit(effects).ok());
  ASSERT_TRUE(store->Commit({DeleteJob{"jobs/j1"}}).ok());
  int rounds = 0;
  while (*store->Purge(10)) ++rounds;
  EXPECT_EQ(rounds, 3);
  EXPECT_TRUE(
      (*StreamReader::Open(path_))->Read(StreamKind::kLogs, "jobs/j1", 0, 10, 1000)->items.empty());
}

}  // namespace
}  // namespace attune
