#include "worker/agent/report_journal.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

class ReportJournalTest : public testing::Test {
 protected:
  ReportJournalTest() {
    char pattern[] = "/tmp/journal_test_XXXXXX";
    directory_ = mkdtemp(pattern);
    path_ = directory_ + "/reports";
  }
  ~ReportJournalTest() override { fs::remove_all(directory_); }

  std::unique_ptr<ReportJournal> Open() {
    absl::StatusOr<std::unique_ptr<ReportJournal>> journal = ReportJournal::Open(path_);
    EXPECT_TRUE(journal.ok()) << journal.status();
    return journal.ok() ? *std::move(journal) : nullptr;
  }

  static v1::Report NewReport(int64_t step, size_t padding = 0) {
    v1::Report report;
    report.set_epoch(7);
    report.mutable_step()->set_step(step);
    report.mutable_step()->set_job(std::string(padding, 'x'));
    return report;
  }

  static void Append(ReportJournal* journal, int64_t step, size_t padding = 0) {
    v1::Report report = NewReport(step, padding);
    ASSERT_TRUE(journal->Append(&report).ok());
  }

  std::string directory_;
  std::string path_;
};

TEST_F(ReportJournalTest, NumbersFromOneAndKeepsThatAcrossARestart) {
  {
    auto journal = Open();
    for (int i = 1; i <= 3; ++i) Append(journal.get(), 10 * i);
    EXPECT_EQ(journal->last_sequence(), 3);
  }
  auto journal = Open();
  Append(journal.get(), 40);
  ASSERT_TRUE(journal->Sync().ok());
  int64_t sequence = 0;
  for (const v1::Report* report; (report = journal->NextAfter(sequence)) != nullptr;) {
    EXPECT_EQ(report->sequence(), sequence + 1);
    EXPECT_EQ(report->step().step(), 10 * report->sequence());
    sequence = report->sequence();
  }
  EXPECT_EQ(sequence, 4);
}

TEST_F(ReportJournalTest, OnlyWhatIsDurableMayBeSent) {
  auto journal = Open();
  Append(journal.get(), 1);
  EXPECT_EQ(journal->NextAfter(0), nullptr);
  ASSERT_TRUE(journal->Sync().ok());
  EXPECT_NE(journal->NextAfter(0), nullptr);
}

TEST_F(ReportJournalTest, ForgetsWhatIsAcknowledged) {
  auto journal = Open();
  for (int i = 1; i <= 5; ++i) Append(journal.get(), i);
  ASSERT_TRUE(journal->Sync().ok());
  journal->Acknowledge(3);
  EXPECT_EQ(journal->NextAfter(0)->sequence(), 4);
  EXPECT_EQ(journal->acknowledged(), 3);
  journal->Acknowledge(5);
  EXPECT_TRUE(journal->all_acknowledged());
}

TEST_F(ReportJournalTest, RewritesALongFileAndKeepsItsNumbers) {
  {
    auto journal = Open();
    for (int i = 1; i <= 50; ++i) Append(journal.get(), i, 200000);
    ASSERT_TRUE(journal->Sync().ok());
    journal->Acknowledge(48);
    EXPECT_LT(fs::file_size(path_), 500000u);
    Append(journal.get(), 51);
  }
  auto journal = Open();
  EXPECT_EQ(journal->acknowledged(), 48);
  EXPECT_EQ(journal->last_sequence(), 51);
  EXPECT_EQ(journal->NextAfter(0)->step().step(), 49);
}

// Cut at every byte: what is whole before the cut is read, and new reports follow it.
TEST_F(ReportJournalTest, ATornTailIsCutOffAtEveryByte) {
  std::vector<size_t> ends;  // of the file after each report
  {
    auto journal = Open();
    for (int i = 1; i <= 3; ++i) {
      Append(journal.get(), i, 20);
      ends.push_back(fs::file_size(path_));
    }
  }
  std::ifstream in(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  for (size_t cut = 0; cut <= whole.size(); ++cut) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << whole.substr(0, cut);
    int64_t kept = 0;
    for (const size_t end : ends) kept += cut >= end;
    {
      auto journal = Open();
      ASSERT_EQ(journal->last_sequence(), kept) << "cut at " << cut;
      Append(journal.get(), 99);
    }
    EXPECT_EQ(Open()->last_sequence(), kept + 1) << "cut at " << cut;
  }
}

TEST_F(ReportJournalTest, AFlippedBitIsNoReport) {
  {
    auto journal = Open();
    for (int i = 1; i <= 3; ++i) Append(journal.get(), i, 20);
  }
  std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(-10, std::ios::end);
  file.put('?');
  file.close();
  EXPECT_EQ(Open()->last_sequence(), 2);
}

TEST_F(ReportJournalTest, RefusesAnotherFile) {
  std::ofstream(path_) << "this is something else entirely";
  EXPECT_TRUE(absl::IsDataLoss(ReportJournal::Open(path_).status()));
}

TEST_F(ReportJournalTest, AFullDiskAppendsNothingAndBreaksNothing) {
  auto journal = Open();
  Append(journal.get(), 1);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  // As good as a full disk for this process: the write stops in the middle of the record.
  rlimit limit = {fs::file_size(path_) + 100, old.rlim_max};
  setrlimit(RLIMIT_FSIZE, &limit);
  v1::Report report = NewReport(2, 5000);
  const absl::Status status = journal->Append(&report);
  setrlimit(RLIMIT_FSIZE, &old);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(journal->last_sequence(), 1);
  v1::Report volatile_report = NewReport(2);
  journal->AppendVolatile(&volatile_report);
  EXPECT_EQ(journal->NextAfter(1)->step().step(), 2);
  journal.reset();
  EXPECT_EQ(Open()->last_sequence(), 1);
}

}  // namespace
}  // namespace attune
