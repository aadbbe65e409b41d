// The agent's smaller parts: lines, devices, fence, roots, processes.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "worker/agent/device_fence.h"
#include "worker/agent/devices.h"
#include "worker/agent/log_lines.h"
#include "worker/agent/process_table.h"
#include "worker/agent/source_roots.h"

namespace attune {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(LineSplitterTest, SplitsAcrossPieces) {
  LineSplitter splitter;
  EXPECT_THAT(splitter.Add("one\ntw"), ElementsAre("one"));
  EXPECT_THAT(splitter.Add("o\r\n\nthree"), ElementsAre("two"));
  EXPECT_EQ(splitter.TakeRest(), "three");
  EXPECT_EQ(splitter.TakeRest(), "");
}

TEST(LineSplitterTest, CutsLongLines) {
  LineSplitter splitter;
  const std::vector<std::string> lines =
      splitter.Add(std::string(2 * kMaxLineBytes + 5, 'x') + "\n");
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0].size(), kMaxLineBytes);
  EXPECT_EQ(lines[2].size(), 5u);
}

TEST(ToLogLineTest, IsAlwaysValidUtf8WithinTheLimit) {
  EXPECT_EQ(ToLogLine("a\x01\tb"), "a \tb");
  EXPECT_EQ(ToLogLine("gr\xC3\xBC\xC3"), "gr\xC3\xBC\xEF\xBF\xBD");
  EXPECT_EQ(ToLogLine("\xED\xA0\x80").substr(0, 3), "\xEF\xBF\xBD") << "a surrogate";
  EXPECT_EQ(ToLogLine("\xC0\x80").substr(0, 3), "\xEF\xBF\xBD") << "an overlong form";
  EXPECT_EQ(ToLogLine("\xF0\x9F\x98\x80"), "\xF0\x9F\x98\x80");
  EXPECT_LE(ToLogLine(std::string(kMaxLineBytes, '\xFF')).size(), kMaxLineBytes);
  EXPECT_EQ(ToLogLine(std::string(kMaxLineBytes - 1, 'x') + "\xC3\xBC").size(), kMaxLineBytes - 1);
}

TEST(LogLimiterTest, AdmitsTheRateAndCountsTheRest) {
  LogLimiter limiter(10, 20);
  absl::Time now = absl::UnixEpoch();
  int admitted = 0;
  for (int i = 0; i < 100; ++i) admitted += limiter.Admit(now);
  EXPECT_EQ(admitted, 20);
  EXPECT_EQ(limiter.TakeDropped(now), 0) << "no room to say so yet";
  now += absl::Seconds(2);
  EXPECT_EQ(limiter.TakeDropped(now), 80);
  EXPECT_TRUE(limiter.Admit(now));
  EXPECT_EQ(limiter.TakeDropped(now + absl::Seconds(9)), 0);
}

TEST(DevicesTest, SlotsShareTheHost) {
  HostCpu host = {"a CPU", 8, int64_t{64} << 30, true};
  const std::vector<v1::Device> devices = CpuSlots(host, 3);
  ASSERT_EQ(devices.size(), 3u);
  EXPECT_EQ(devices[2].id(), "cpu:2");
  EXPECT_EQ(devices[2].threads(), 2);
  EXPECT_EQ(devices[2].memory_bytes(), (int64_t{64} << 30) / 3);
  EXPECT_TRUE(devices[2].bf16());
  EXPECT_EQ(CpuSlots(host, 16)[15].threads(), 1);
  const HostCpu here = ReadHostCpu();
  EXPECT_GE(here.cores, 1);
  EXPECT_GT(here.memory_bytes, 0);
  EXPECT_FALSE(here.model.empty());
}

TEST(DeviceFenceTest, GivesADeviceToOneEpochAtATime) {
  DeviceFence fence({"cpu:0", "cpu:1"});
  std::vector<int64_t> older;
  EXPECT_EQ(fence.Claim(5, {"cpu:0", "cpu:1"}, &older), DeviceFence::Verdict::kClaimed);
  EXPECT_THAT(older, IsEmpty());
  EXPECT_TRUE(fence.Ready(5));
  EXPECT_EQ(fence.Claim(7, {"cpu:1"}, &older), DeviceFence::Verdict::kClaimed);
  EXPECT_THAT(older, ElementsAre(5));
  EXPECT_FALSE(fence.Ready(7));
  EXPECT_EQ(fence.Claim(6, {"cpu:0", "cpu:1"}, &older), DeviceFence::Verdict::kStale);
  EXPECT_EQ(fence.Claim(7, {"cpu:1"}, &older), DeviceFence::Verdict::kStale) << "twice";
  EXPECT_EQ(fence.Claim(8, {"cuda:0"}, &older), DeviceFence::Verdict::kUnknownDevice);
  fence.Release(5);
  EXPECT_TRUE(fence.Ready(7));
  EXPECT_EQ(fence.Claim(6, {"cpu:1"}, &older), DeviceFence::Verdict::kStale)
      << "also when it was released";
}

class SourceRootsTest : public testing::Test {
 protected:
  SourceRootsTest() {
    char pattern[] = "/tmp/roots_test_XXXXXX";
    directory_ = mkdtemp(pattern);
    fs::create_directories(directory_ + "/root/hub/blobs");
    fs::create_directories(directory_ + "/root/hub/snapshots/abc");
    fs::create_directories(directory_ + "/outside");
    std::ofstream(directory_ + "/outside/secret") << "x";
    std::ofstream(directory_ + "/root/hub/blobs/123") << "x";
    std::ofstream(directory_ + "/root/data.jsonl") << "x";
    fs::create_symlink("../../blobs/123", directory_ + "/root/hub/snapshots/abc/config.json");
  }
  ~SourceRootsTest() override { fs::remove_all(directory_); }

  absl::StatusOr<std::string> Resolve(const std::string& path) {
    absl::StatusOr<SourceRoots> roots = SourceRoots::Open({directory_ + "/root"});
    return roots.ok() ? roots->Resolve(path) : roots.status();
  }

  std::string directory_;
};

TEST_F(SourceRootsTest, ResolvesBeneathTheRoot) {
  EXPECT_EQ(*Resolve("data.jsonl"), directory_ + "/root/data.jsonl");
  EXPECT_EQ(*Resolve(directory_ + "/root/data.jsonl"), directory_ + "/root/data.jsonl");
  EXPECT_EQ(*Resolve("hub/../data.jsonl"), directory_ + "/root/data.jsonl");
}

TEST_F(SourceRootsTest, FollowsLinksInsideTheRoot) {
  EXPECT_EQ(*Resolve("hub/snapshots/abc"), directory_ + "/root/hub/snapshots/abc");
  EXPECT_EQ(*Resolve("hub/snapshots/abc/config.json"), directory_ + "/root/hub/blobs/123");
}

TEST_F(SourceRootsTest, RefusesWhatLeadsOut) {
  fs::create_symlink("../../../../outside/secret", directory_ + "/root/hub/snapshots/abc/weights");
  fs::create_symlink(directory_ + "/outside", directory_ + "/root/away");
  for (const char* path : {"../outside/secret", "hub/../../outside/secret", "away", "away/secret",
                           "hub/snapshots/abc/weights"}) {
    EXPECT_TRUE(absl::IsPermissionDenied(Resolve(path).status())) << path << Resolve(path).status();
  }
  // A directory with such a link in it, too: the trainer would follow it.
  const absl::Status status = Resolve("hub/snapshots/abc").status();
  EXPECT_TRUE(absl::IsPermissionDenied(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("weights"));
}

TEST_F(SourceRootsTest, SaysWhatToDoAboutAPathThatIsNotThere) {
  EXPECT_THAT(std::string(Resolve("modle").status().message()),
              testing::AllOf(HasSubstr("modle"), HasSubstr("--root"), HasSubstr(directory_)));
  EXPECT_TRUE(absl::IsNotFound(Resolve(directory_ + "/outside/secret").status()));
  EXPECT_FALSE(Resolve("").ok());
  EXPECT_FALSE(SourceRoots::Open({directory_ + "/nowhere"}).ok());
}

class ProcessTableTest : public testing::Test {
 protected:
  // A child that sleeps, with the token in its environment, as a group leader.
  pid_t StartSleeper(const std::string& token) {
    const pid_t pid = fork();
    if (pid == 0) {
      setpgid(0, 0);
      const std::string variable = absl::StrCat(kTrainerTokenVariable, "=", token);
      char* const arguments[] = {const_cast<char*>("sleep"), const_cast<char*>("60"), nullptr};
      char* const environment[] = {const_cast<char*>(variable.c_str()), nullptr};
      execve("/bin/sleep", arguments, environment);
      _exit(127);
    }
    while (ProcessesWithToken(token).empty()) absl::SleepFor(absl::Milliseconds(2));
    return pid;
  }
};

TEST_F(ProcessTableTest, KillsWhatItRecorded) {
  const pid_t pid = StartSleeper("token-a");
  const ProcessRecord record = {pid, *StartTicks(pid), BootId(), "token-a"};
  EXPECT_THAT(ProcessesInGroup(pid), ElementsAre(pid));
  EXPECT_TRUE(KillLeftover(record, absl::Seconds(5)).ok());
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST_F(ProcessTableTest, LeavesAStrangerWithARecycledPidAlone) {
  const pid_t pid = StartSleeper("token-b");
  // The number is the same, the process is not.
  ProcessRecord record = {pid, *StartTicks(pid) - 1, BootId(), "token-of-another"};
  EXPECT_TRUE(KillLeftover(record, absl::Seconds(5)).ok());
  EXPECT_EQ(kill(pid, 0), 0);
  EXPECT_THAT(ProcessesWithToken("token-b"), ElementsAre(pid));
  // The same after a boot.
  record = {pid, *StartTicks(pid), "another boot", "token-b"};
  EXPECT_TRUE(KillLeftover(record, absl::Seconds(5)).ok());
  EXPECT_THAT(ProcessesWithToken("token-b"), ElementsAre(pid));
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

TEST_F(ProcessTableTest, FindsStraysByTheirEnvironment) {
  const pid_t stray = StartSleeper("token-c");
  // The recorded leader is long gone.
  EXPECT_TRUE(KillLeftover({1 << 22, 1, BootId(), "token-c"}, absl::Seconds(5)).ok());
  int status = 0;
  EXPECT_EQ(waitpid(stray, &status, 0), stray);
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST_F(ProcessTableTest, RecordsSurviveOnDisk) {
  const std::string path = absl::StrCat("/tmp/process_record_", getpid());
  ASSERT_TRUE(WriteProcessRecord(path, {12, 34, "boot", "token"}).ok());
  const absl::StatusOr<ProcessRecord> record = ReadProcessRecord(path);
  ASSERT_TRUE(record.ok());
  EXPECT_EQ(record->pid, 12);
  EXPECT_EQ(record->start_ticks, 34);
  EXPECT_EQ(record->token, "token");
  std::ofstream(path) << "12 x";
  EXPECT_FALSE(ReadProcessRecord(path).ok());
  unlink(path.c_str());
}

}  // namespace
}  // namespace attune
