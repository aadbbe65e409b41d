#include "server/artifacts/artifact_store.h"

#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/crc32c.h"
#include "proto/sha256.h"
#include "server/core/errors.h"

namespace attune {
namespace {

using testing::HasSubstr;

class ArtifactStoreTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/attune_artifacts_test_XXXXXX";
    ASSERT_NE(mkdtemp(path), nullptr);
    root_ = std::string(path) + "/artifacts";
    Reopen();
  }
  void TearDown() override {
    store_.reset();
    std::system(("rm -rf " + root_.substr(0, root_.rfind('/'))).c_str());
  }
  void Reopen() {
    store_.reset();
    auto store = ArtifactStore::Open(root_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  static v1::ArtifactFile MakeFile(const std::string& path, const std::string& data) {
    v1::ArtifactFile file;
    file.set_path(path);
    file.set_bytes(static_cast<int64_t>(data.size()));
    file.set_sha256(Sha256Hex(data));
    return file;
  }
  absl::StatusOr<int64_t> Write(const std::string& name, const std::string& path, int64_t offset,
                                const std::string& data) {
    return store_->Write(name, path, offset, data, Crc32c(data));
  }
  std::string Upload(const std::string& path, const std::string& data,
                     v1::ArtifactKind kind = v1::ARTIFACT_KIND_DATASET) {
    const auto artifact = store_->Create(kind, {MakeFile(path, data)}, now_);
    EXPECT_TRUE(artifact.ok()) << artifact.status();
    EXPECT_TRUE(Write(artifact->name(), path, 0, data).ok());
    const auto ready = store_->Finalize(artifact->name());
    EXPECT_TRUE(ready.ok()) << ready.status();
    return artifact->name();
  }
  int CountIn(const std::string& folder) {
    DIR* stream = opendir((root_ + "/" + folder).c_str());
    int count = 0;
    while (const dirent* entry = readdir(stream)) count += entry->d_name[0] != '.' ? 1 : 0;
    closedir(stream);
    return count;
  }

  const absl::Time now_ = absl::FromUnixSeconds(4000000000);
  std::string root_;
  std::unique_ptr<ArtifactStore> store_;
};

TEST_F(ArtifactStoreTest, StoresAndReadsBackAfterAReopen) {
  const std::string name = Upload("a/b.txt", "hello");
  Reopen();
  EXPECT_TRUE(store_->IsReady(name));
  const auto file = store_->OpenFile(name, "a/b.txt");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->bytes, 5);
  EXPECT_EQ(*file->file->Read(1, 3), "ell");
  EXPECT_EQ(ReasonOf(store_->OpenFile(name, "a/c.txt").status()), "FILE_NOT_FOUND");
}

TEST_F(ArtifactStoreTest, AnUploadGoesOnAfterAReopen) {
  const std::string data = "0123456789";
  const auto artifact = store_->Create(v1::ARTIFACT_KIND_MODEL, {MakeFile("m", data)}, now_);
  EXPECT_EQ(*Write(artifact->name(), "m", 0, "0123"), 4);
  Reopen();
  EXPECT_EQ(*store_->CommittedBytes(artifact->name(), "m"), 4);
  EXPECT_EQ(ReasonOf(Write(artifact->name(), "m", 2, "23").status()), "WRONG_OFFSET");
  EXPECT_EQ(ReasonOf(store_->Finalize(artifact->name()).status()), "INCOMPLETE");
  EXPECT_EQ(ReasonOf(store_->OpenFile(artifact->name(), "m").status()), "NOT_READY");
  EXPECT_EQ(*Write(artifact->name(), "m", 4, "456789"), 10);
  EXPECT_EQ(store_->Finalize(artifact->name())->state(), v1::ARTIFACT_STATE_READY);
  EXPECT_EQ(store_->Finalize(artifact->name())->state(), v1::ARTIFACT_STATE_READY);
}

TEST_F(ArtifactStoreTest, RefusesDamagedAndTooLongChunks) {
  const auto artifact = store_->Create(v1::ARTIFACT_KIND_MODEL, {MakeFile("m", "abc")}, now_);
  EXPECT_EQ(ReasonOf(store_->Write(artifact->name(), "m", 0, "abc", 1).status()), "WRONG_CRC32C");
  EXPECT_EQ(*store_->CommittedBytes(artifact->name(), "m"), 0);
  EXPECT_TRUE(absl::IsOutOfRange(Write(artifact->name(), "m", 0, "abcd").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      Write(artifact->name(), "m", 0, std::string((1 << 20) + 1, 'x')).status()));
}

TEST_F(ArtifactStoreTest, OtherContentThanDeclaredBeginsAgain) {
  const auto artifact = store_->Create(v1::ARTIFACT_KIND_MODEL, {MakeFile("m", "abc")}, now_);
  EXPECT_TRUE(Write(artifact->name(), "m", 0, "abd").ok());
  EXPECT_EQ(ReasonOf(store_->Finalize(artifact->name()).status()), "WRONG_SHA256");
  EXPECT_EQ(*store_->CommittedBytes(artifact->name(), "m"), 0);
  EXPECT_TRUE(Write(artifact->name(), "m", 0, "abc").ok());
  EXPECT_TRUE(store_->Finalize(artifact->name()).ok());
}

TEST_F(ArtifactStoreTest, EqualContentIsStoredOnce) {
  const std::string a = Upload("a", "same");
  const auto again = store_->Create(v1::ARTIFACT_KIND_DATASET, {MakeFile("a", "same")}, now_);
  EXPECT_EQ(again->name(), a);
  EXPECT_EQ(again->state(), v1::ARTIFACT_STATE_READY);
  const auto other = store_->Create(v1::ARTIFACT_KIND_MODEL, {MakeFile("b", "same")}, now_);
  EXPECT_NE(other->name(), a);
  EXPECT_EQ(other->state(), v1::ARTIFACT_STATE_READY) << "the content is there";
  EXPECT_EQ(CountIn("blobs"), 1);
  EXPECT_TRUE(store_->Remove(a).ok());
  EXPECT_EQ(CountIn("blobs"), 1) << "the other artifact needs it";
  EXPECT_EQ(*store_->OpenFile(other->name(), "b")->file->Read(0, 4), "same");
  EXPECT_TRUE(store_->Remove(other->name()).ok());
  EXPECT_EQ(CountIn("blobs"), 0);
  EXPECT_TRUE(absl::IsNotFound(store_->Remove(a)));
}

TEST_F(ArtifactStoreTest, EmptyFilesAreFiles) {
  const std::string name = Upload("empty", "");
  EXPECT_EQ(store_->OpenFile(name, "empty")->bytes, 0);
}

TEST_F(ArtifactStoreTest, RefusesPathsThatLeaveTheirDirectory) {
  for (const std::string path : {"../x", "/x", "a//b", "a/./b", "a/..", "", "a\\b", "a\nb"}) {
    const auto artifact = store_->Create(v1::ARTIFACT_KIND_DATASET, {MakeFile(path, "x")}, now_);
    EXPECT_TRUE(absl::IsInvalidArgument(artifact.status())) << path;
    EXPECT_THAT(std::string(artifact.status().message()), HasSubstr("files[0].path")) << path;
  }
  v1::ArtifactFile file = MakeFile("x", "x");
  file.set_sha256("../../etc/passwd");
  EXPECT_TRUE(
      absl::IsInvalidArgument(store_->Create(v1::ARTIFACT_KIND_DATASET, {file}, now_).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      store_->Create(v1::ARTIFACT_KIND_DATASET, {MakeFile("x", "x"), MakeFile("x", "y")}, now_)
          .status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(store_->Create(v1::ARTIFACT_KIND_DATASET, {}, now_).status()));
  EXPECT_TRUE(absl::IsNotFound(store_->Get("artifacts/../../etc").status()));
}

TEST_F(ArtifactStoreTest, DoesNotFollowLinks) {
  const std::string name = Upload("a", "secret");
  const std::string blob = root_ + "/blobs/" + Sha256Hex("secret");
  const std::string target = root_ + "/target";
  std::ofstream(target) << "outside";
  ASSERT_EQ(unlink(blob.c_str()), 0);
  ASSERT_EQ(symlink(target.c_str(), blob.c_str()), 0);
  EXPECT_FALSE(store_->OpenFile(name, "a").ok());
}

TEST_F(ArtifactStoreTest, AFullDiskIsResourceExhaustedAndKeepsWhatWasThere) {
  const std::string data(1 << 20, 'z');
  const auto artifact = store_->Create(v1::ARTIFACT_KIND_MODEL, {MakeFile("m", data + data)}, now_);
  EXPECT_TRUE(Write(artifact->name(), "m", 0, data).ok());
  struct rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = (1 << 20) + 1000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto status = Write(artifact->name(), "m", 1 << 20, data).status();
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(*store_->CommittedBytes(artifact->name(), "m"), 1 << 20);
  EXPECT_TRUE(Write(artifact->name(), "m", 1 << 20, data).ok());
  EXPECT_TRUE(store_->Finalize(artifact->name()).ok());
}

TEST_F(ArtifactStoreTest, GarbageIsWhatNobodyFinishedOrCommitted) {
  const std::string dataset = Upload("d", "dataset");
  const std::string used = Upload("c", "used", v1::ARTIFACT_KIND_CHECKPOINT);
  const std::string left = Upload("c", "left", v1::ARTIFACT_KIND_CHECKPOINT);
  const auto unfinished = store_->Create(v1::ARTIFACT_KIND_MODEL, {MakeFile("m", "abc")}, now_);
  std::ofstream(root_ + "/blobs/" + Sha256Hex("nobody lists this")) << "x";
  const auto in_use = [&](const std::string& name) { return name == used; };
  store_->CollectGarbage(now_ - absl::Hours(1), in_use);
  EXPECT_TRUE(store_->Get(left).ok()) << "too young";
  store_->CollectGarbage(now_ + absl::Hours(25), in_use);
  EXPECT_TRUE(store_->IsReady(dataset));
  EXPECT_TRUE(store_->IsReady(used));
  EXPECT_TRUE(absl::IsNotFound(store_->Get(left).status()));
  EXPECT_TRUE(absl::IsNotFound(store_->Get(unfinished->name()).status()));
  EXPECT_EQ(CountIn("blobs"), 2);
}

TEST_F(ArtifactStoreTest, AnotherVersionIsRefused) {
  store_.reset();
  std::ofstream(root_ + "/VERSION") << "2\n";
  EXPECT_TRUE(absl::IsFailedPrecondition(ArtifactStore::Open(root_).status()));
}

}  // namespace
}  // namespace attune
