#include "worker/io/digest_cache.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "proto/sha256.h"
#include "worker/io/file.h"

namespace attune {
namespace {

const std::string kLie(64, '1');

class DigestCacheTest : public testing::Test {
 protected:
  DigestCacheTest() {
    directory_ = *CreateTempDirectory(testing::TempDir(), "digest-");
    file_ = directory_ + "/model.safetensors";
    cache_ = directory_ + "/digests.json";
    Write(file_, "weights");
  }
  ~DigestCacheTest() override { RemoveTree(directory_).IgnoreError(); }

  static void Write(const std::string& path, const std::string& bytes) {
    ASSERT_TRUE(WriteFileAtomic(path, bytes).ok());
  }
  static std::string True(const std::string& bytes) { return Sha256Hex(bytes); }
  // The digest as a new process finds it, when everything is long settled.
  std::string Digest(const std::string& path, absl::Time now = absl::Now() + absl::Hours(1)) {
    DigestCache cache(cache_, now);
    const absl::StatusOr<std::string> sha256 = cache.Sha256Hex(path);
    EXPECT_TRUE(sha256.ok()) << sha256.status();
    EXPECT_TRUE(cache.Save().ok());
    return sha256.value_or("");
  }
  // Makes the cache lie about the file, so that an answer tells where it came from.
  void PlantLie(const std::string& bytes) {
    const std::string text = *ReadFile(cache_);
    const std::string planted = absl::StrReplaceAll(text, {{True(bytes), kLie}});
    ASSERT_NE(planted, text);
    Write(cache_, planted);
  }

  std::string directory_, file_, cache_;
};

TEST_F(DigestCacheTest, MakesItsDirectory) {
  cache_ = directory_ + "/not/yet/digests.json";
  EXPECT_EQ(Digest(file_), True("weights"));
  PlantLie("weights");
  EXPECT_EQ(Digest(file_), kLie);
}

TEST_F(DigestCacheTest, ASecondProcessDoesNotHashAgain) {
  EXPECT_EQ(Digest(file_), True("weights"));
  PlantLie("weights");
  EXPECT_EQ(Digest(file_), kLie);
}

TEST_F(DigestCacheTest, SeveralAreInTheirOrderAndRemembered) {
  std::vector<std::string> files;
  for (int i = 0; i < 9; ++i) {
    files.push_back(absl::StrCat(directory_, "/", i));
    Write(files.back(), absl::StrCat("shard ", i));
  }
  DigestCache cache(cache_, absl::Now() + absl::Hours(1));
  const std::vector<std::string> digests = cache.Sha256HexOfAll(files).value();
  ASSERT_EQ(digests.size(), files.size());
  for (int i = 0; i < 9; ++i) EXPECT_EQ(digests[i], True(absl::StrCat("shard ", i)));
  ASSERT_TRUE(cache.Save().ok());
  PlantLie("shard 5");
  EXPECT_EQ(Digest(files[5]), kLie);
  files.push_back(directory_ + "/none");
  EXPECT_FALSE(cache.Sha256HexOfAll(files).ok());
}

TEST_F(DigestCacheTest, ALinkIsTheFileBehindIt) {
  Digest(file_);
  PlantLie("weights");
  ASSERT_EQ(symlink("model.safetensors", (directory_ + "/link").c_str()), 0);
  EXPECT_EQ(Digest(directory_ + "/link"), kLie);
}

TEST_F(DigestCacheTest, AFileThatWasReplacedIsHashed) {
  Digest(file_);
  PlantLie("weights");
  Write(file_, "WEIGHTS");  // of the same size
  EXPECT_EQ(Digest(file_), True("WEIGHTS"));
}

// As `rsync -a --inplace` does: the same inode, size and mtime, but not the same ctime.
TEST_F(DigestCacheTest, AFileThatWasWrittenInPlaceAndGivenItsOldTimeIsHashed) {
  struct stat before;
  ASSERT_EQ(stat(file_.c_str(), &before), 0);
  Digest(file_);
  PlantLie("weights");
  absl::SleepFor(absl::Milliseconds(30));  // a tick of the file system's clock
  const int fd = open(file_.c_str(), O_WRONLY);
  ASSERT_EQ(write(fd, "WEIGHTS", 7), 7);
  const struct timespec times[] = {before.st_atim, before.st_mtim};
  ASSERT_EQ(futimens(fd, times), 0);
  close(fd);
  EXPECT_EQ(Digest(file_), True("WEIGHTS"));
}

TEST_F(DigestCacheTest, AFileThatHasJustChangedIsNotRemembered) {
  EXPECT_EQ(Digest(file_, absl::Now()), True("weights"));
  EXPECT_FALSE(FileExists(cache_));
}

TEST_F(DigestCacheTest, ABrokenCacheIsAnEmptyOne) {
  for (const std::string text : {"", "{", "[]", "{\"schema_version\": 2, \"files\": {}}",
                                 "{\"schema_version\": 1, \"files\": {\"a\": 1}}", "\xff\xfe"}) {
    Write(cache_, text);
    EXPECT_EQ(Digest(file_), True("weights")) << text;
    PlantLie("weights");  // it was written anew
  }
}

TEST_F(DigestCacheTest, TwoProcessesKeepEachOthersEntriesAndDropFilesThatAreGone) {
  const std::string other = directory_ + "/other", third = directory_ + "/third";
  Write(other, "other");
  Write(third, "third");
  const absl::Time now = absl::Now() + absl::Hours(1);
  DigestCache a(cache_, now), b(cache_, now);
  ASSERT_TRUE(a.Sha256Hex(file_).ok() && b.Sha256Hex(other).ok());
  ASSERT_TRUE(a.Save().ok() && b.Save().ok());
  PlantLie("weights");
  PlantLie("other");
  ASSERT_TRUE(RemoveTree(file_).ok());
  EXPECT_EQ(Digest(other), kLie);
  EXPECT_EQ(Digest(third), True("third"));
  EXPECT_EQ(ReadFile(cache_)->find("model.safetensors"), std::string::npos);
}

TEST_F(DigestCacheTest, AMissingFileIsAnError) {
  DigestCache cache(cache_, absl::Now());
  EXPECT_TRUE(absl::IsNotFound(cache.Sha256Hex(directory_ + "/nothing").status()));
}

TEST_F(DigestCacheTest, WithoutAPathNothingIsKept) {
  DigestCache cache("", absl::Now() + absl::Hours(1));
  EXPECT_EQ(*cache.Sha256Hex(file_), True("weights"));
  EXPECT_TRUE(cache.Save().ok());
}

}  // namespace
}  // namespace attune
