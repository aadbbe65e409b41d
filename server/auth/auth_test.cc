#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "gtest/gtest.h"
#include "server/auth/listen_address.h"
#include "server/auth/token.h"

namespace attune {
namespace {

TEST(TokenTest, IsMadeOnceForTheOwnerOnly) {
  char directory[] = "/tmp/attune_token_test_XXXXXX";
  ASSERT_NE(mkdtemp(directory), nullptr);
  const std::string path = std::string(directory) + "/token";
  const auto token = LoadOrCreateToken(path);
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(token->size(), 64u);
  EXPECT_EQ(token->find_first_not_of("0123456789abcdef"), std::string::npos);
  struct stat info;
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_EQ(*LoadOrCreateToken(path), *token);
  ASSERT_EQ(chmod(path.c_str(), 0644), 0);
  EXPECT_TRUE(absl::IsPermissionDenied(LoadOrCreateToken(path).status()));
  ASSERT_EQ(chmod(path.c_str(), 0600), 0);
  std::ofstream(path) << "short\n";
  EXPECT_TRUE(absl::IsFailedPrecondition(LoadOrCreateToken(path).status()));
  std::system((std::string("rm -rf ") + directory).c_str());
}

TEST(TokenTest, OnlyTheWholeTokenIsAuthorized) {
  EXPECT_TRUE(IsAuthorized("Bearer abc", "abc"));
  for (const char* wrong : {"", "abc", "Bearer ", "Bearer ab", "Bearer abcd", "bearer abc"}) {
    EXPECT_FALSE(IsAuthorized(wrong, "abc")) << wrong;
  }
}

TEST(ListenAddressTest, LoopbackAndUnixOnly) {
  for (const char* right :
       {"unix:/run/attune/socket", "127.0.0.1:0", "[::1]:50051", "localhost:1"}) {
    const auto address = ParseListenAddress(right);
    ASSERT_TRUE(address.ok()) << address.status();
    EXPECT_EQ(address->ToString(), right);
  }
  EXPECT_EQ(ParseListenAddress("unix:///a")->ToString(), "unix:/a");
  for (const char* open :
       {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", ":1", "127.0.0.1.example.org:1"}) {
    EXPECT_TRUE(absl::IsUnimplemented(ParseListenAddress(open).status())) << open;
  }
  const std::string long_path = "unix:/" + std::string(120, 'x');
  for (const std::string& wrong :
       {std::string("unix:relative"), std::string("127.0.0.1"), std::string("127.0.0.1:x"),
        std::string("127.0.0.1:70000"), long_path}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseListenAddress(wrong).status())) << wrong;
  }
}

}  // namespace
}  // namespace attune
