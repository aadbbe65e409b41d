#include "proto/coordinator_endpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace attune {
namespace {

using testing::HasSubstr;

class CoordinatorEndpointTest : public testing::Test {
 protected:
  CoordinatorEndpointTest() {
    char pattern[] = "/tmp/endpoint_test_XXXXXX";
    directory_ = mkdtemp(pattern);
  }
  ~CoordinatorEndpointTest() override { std::filesystem::remove_all(directory_); }
  void Write(const std::string& name, const std::string& text) {
    std::ofstream(directory_ + "/" + name) << text;
  }
  std::string directory_;
};

TEST_F(CoordinatorEndpointTest, PrefersTheSocketAndFindsTheToken) {
  Write("endpoint", R"({"addresses": ["127.0.0.1:7233", "unix:/run/a"], "pid": 1})");
  Write("token", "abc\n");
  const auto found = FindCoordinator({.data_directory = directory_});
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->address, "unix:/run/a");
  EXPECT_EQ(found->token, "abc");
}

TEST_F(CoordinatorEndpointTest, AGivenAddressNeedsNoEndpointFile) {
  Write("token", "abc");
  const auto found = FindCoordinator({.address = "127.0.0.1:1", .data_directory = directory_});
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(found->address, "127.0.0.1:1");
  EXPECT_EQ(found->token, "abc");
  const auto nowhere = FindCoordinator({.address = "127.0.0.1:1", .data_directory = "/nowhere"});
  ASSERT_TRUE(nowhere.ok());
  EXPECT_EQ(nowhere->token, "");
}

TEST_F(CoordinatorEndpointTest, SaysWhatToDo) {
  const auto none = FindCoordinator({.data_directory = directory_});
  EXPECT_TRUE(absl::IsUnavailable(none.status()));
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("Start attuned"));
  for (const char* text : {"", "{}", "{\"addresses\": []}", "{\"addresses\": [1]}", "[1"}) {
    Write("endpoint", text);
    EXPECT_TRUE(
        absl::IsFailedPrecondition(FindCoordinator({.data_directory = directory_}).status()))
        << text;
  }
  EXPECT_TRUE(absl::IsFailedPrecondition(
      FindCoordinator({.address = "a", .token_file = "/nowhere"}).status()));
}

TEST(DefaultDataDirectoryTest, FollowsXdg) {
  EXPECT_EQ(DefaultDataDirectory("/data", "/home/a"), "/data/attune");
  EXPECT_EQ(DefaultDataDirectory(nullptr, "/home/a"), "/home/a/.local/share/attune");
  EXPECT_EQ(DefaultDataDirectory("relative", "/home/a"), "/home/a/.local/share/attune");
  EXPECT_EQ(DefaultDataDirectory(nullptr, nullptr), "");
  EXPECT_EQ(DefaultCacheDirectory("/cache", "/home/a"), "/cache/attune");
  EXPECT_EQ(DefaultCacheDirectory(nullptr, "/home/a"), "/home/a/.cache/attune");
}

}  // namespace
}  // namespace attune
