#include "server/core/names.h"

#include "gtest/gtest.h"

namespace attune {
namespace {

TEST(NamesTest, ResourceNames) {
  EXPECT_TRUE(IsJobName("jobs/a-1"));
  for (const char* wrong : {"jobs/", "jobs/A", "jobs/a/b", "job/a", "jobs/../a"}) {
    EXPECT_FALSE(IsJobName(wrong)) << wrong;
  }
  EXPECT_TRUE(IsWorkerName("workers/Host.example_1-x"));
  EXPECT_FALSE(IsWorkerName("workers/a b"));
  EXPECT_EQ(ParseCheckpointName("jobs/a/checkpoints/12")->step, 12);
  EXPECT_EQ(ParseCheckpointName("jobs/a/checkpoints/last")->step, kLastCheckpoint);
  EXPECT_EQ(ParseCheckpointName("jobs/a/checkpoints/best")->step, kBestCheckpoint);
  EXPECT_EQ(ParseCheckpointName("jobs/a/checkpoints/result")->step, kResultCheckpoint);
  for (const char* wrong : {"jobs/a", "jobs/a/checkpoints/", "jobs/a/checkpoints/-1",
                            "jobs/A/checkpoints/1", "jobs/a/checkpoints/1x"}) {
    EXPECT_FALSE(ParseCheckpointName(wrong).ok()) << wrong;
  }
}

TEST(NamesTest, ResumeTokensAreBoundToTheirKind) {
  const std::string token = MakeResumeToken(StreamKind::kLogs, 42);
  EXPECT_EQ(*ParseResumeToken(StreamKind::kLogs, token), 42);
  EXPECT_FALSE(ParseResumeToken(StreamKind::kEvents, token).ok());
  for (size_t i = 0; i < token.size(); ++i) {
    std::string wrong = token;
    wrong[i] = wrong[i] == '1' ? '2' : '1';
    EXPECT_FALSE(ParseResumeToken(StreamKind::kLogs, wrong).ok()) << wrong;
    EXPECT_FALSE(ParseResumeToken(StreamKind::kLogs, token.substr(0, i)).ok());
  }
}

TEST(NamesTest, PageTokensAreBoundToTheirFilter) {
  const std::string token = MakePageToken("17", "jobs,4");
  EXPECT_EQ(*ParsePageToken(token, "jobs,4"), "17");
  EXPECT_FALSE(ParsePageToken(token, "jobs").ok());
  EXPECT_FALSE(ParsePageToken("p17", "jobs,4").ok());
  EXPECT_EQ(*PageSize(0, 50, 1000), 50);
  EXPECT_EQ(*PageSize(5000, 50, 1000), 1000);
  EXPECT_FALSE(PageSize(-1, 50, 1000).ok());
}

}  // namespace
}  // namespace attune
