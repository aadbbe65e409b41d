#include "worker/io/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>

#include "worker/io/line_reader.h"

namespace attune {
namespace {

using ::testing::HasSubstr;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::string> directory = CreateTempDirectory(::testing::TempDir(), "file_test_");
    ASSERT_TRUE(directory.ok()) << directory.status();
    directory_ = *directory;
  }
  void TearDown() override { EXPECT_TRUE(RemoveTree(directory_).ok()); }
  std::string Path(const std::string& name) const { return directory_ + "/" + name; }

  std::string directory_;
};

TEST_F(FileTest, WritesWholeAndReplaces) {
  ASSERT_TRUE(WriteFileAtomic(Path("a"), "first").ok());
  ASSERT_TRUE(WriteFileAtomic(Path("a"), std::string("se\0cond", 7), 0600).ok());
  EXPECT_EQ(*ReadFile(Path("a")), std::string("se\0cond", 7));
  struct stat info;
  ASSERT_EQ(stat(Path("a").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(FileTest, AWriteWithoutCommitLeavesNothing) {
  ASSERT_TRUE(WriteFileAtomic(Path("a"), "old").ok());
  {
    absl::StatusOr<AtomicFileWriter> file = AtomicFileWriter::Create(Path("a"));
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->Append("new").ok());
    AtomicFileWriter moved = *std::move(file);
    EXPECT_EQ(moved.bytes_written(), 3);
  }
  EXPECT_EQ(*ReadFile(Path("a")), "old");
  ASSERT_EQ(unlink(Path("a").c_str()), 0);
  EXPECT_EQ(rmdir(directory_.c_str()), 0) << "a temporary file was left";
}

TEST_F(FileTest, AFailedWriteKeepsTheOldContent) {
  ASSERT_TRUE(WriteFileAtomic(Path("a"), "old").ok());
  // A limit on the size of files fails the write as a full disk does.
  struct rlimit old_limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit limit = old_limit;
  limit.rlim_cur = 1000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const absl::Status status = WriteFileAtomic(Path("a"), std::string(5000, 'x'));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path("a")));
  EXPECT_EQ(*ReadFile(Path("a")), "old");
}

TEST(FileErrorTest, AFullDiskIsResourceExhaustedWithThePath) {
  const absl::Status status = FileError(ENOSPC, "write", "/models/a.safetensors");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "write /models/a.safetensors: No space left on device");
}

TEST_F(FileTest, ErrorsHaveTheirCodeAndPath) {
  EXPECT_EQ(ReadFile(Path("missing")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(ReadFile(Path("missing")).status().message()),
              HasSubstr(Path("missing")));
  EXPECT_EQ(ReadFile(directory_).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(MappedFile::Open(directory_).status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_EQ(mkfifo(Path("fifo").c_str(), 0600), 0);
  EXPECT_EQ(ReadFile(Path("fifo")).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(WriteFileAtomic(Path("no/such"), "x").code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteFileAtomic(Path("a"), "12345").ok());
  EXPECT_EQ(ReadFile(Path("a"), 4).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(*ReadFile(Path("a"), 5), "12345");
}

TEST_F(FileTest, ReadsFilesThatSayNoSize) {
  absl::StatusOr<std::string> text = ReadFile("/proc/self/status");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text, HasSubstr("Name:"));
}

TEST_F(FileTest, HashesFiles) {
  const std::string of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  ASSERT_TRUE(WriteFileAtomic(Path("abc"), "abc").ok());
  EXPECT_EQ(*Sha256HexOfFile(Path("abc")), of_abc);
  EXPECT_EQ(Sha256HexOfFile(Path("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(FileTest, Maps) {
  ASSERT_TRUE(WriteFileAtomic(Path("a"), "mapped").ok());
  absl::StatusOr<MappedFile> file = MappedFile::Open(Path("a"));
  ASSERT_TRUE(file.ok());
  MappedFile moved = *std::move(file);
  EXPECT_EQ(std::string(moved.bytes().begin(), moved.bytes().end()), "mapped");
  ASSERT_TRUE(WriteFileAtomic(Path("empty"), "").ok());
  EXPECT_TRUE(MappedFile::Open(Path("empty"))->bytes().empty());
}

TEST_F(FileTest, ReadsPiecesOfAMappedFile) {
  ASSERT_TRUE(WriteFileAtomic(Path("a"), "mapped").ok());
  MappedFile file = MappedFile::Open(Path("a")).value();
  char to[7] = "......";
  ASSERT_TRUE(file.Read(file.bytes().subspan(1, 3), to).ok());
  EXPECT_STREQ(to, "app...");
  ASSERT_TRUE(file.Read(file.bytes().subspan(6), to).ok());
  ASSERT_EQ(truncate(Path("a").c_str(), 4), 0);
  const absl::Status cut = file.Read(file.bytes(), to);
  EXPECT_EQ(cut.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(cut.message()), HasSubstr("had 6 bytes"));
  EXPECT_THAT(std::string(cut.message()), HasSubstr("ends after 4"));
}

TEST_F(FileTest, RemovesTreesAndFollowsNoLink) {
  ASSERT_EQ(mkdir(Path("tree").c_str(), 0700), 0);
  ASSERT_EQ(mkdir(Path("tree/inner").c_str(), 0700), 0);
  ASSERT_TRUE(WriteFileAtomic(Path("tree/inner/file"), "x").ok());
  ASSERT_TRUE(WriteFileAtomic(Path("outside"), "kept").ok());
  ASSERT_EQ(symlink(Path("outside").c_str(), Path("tree/link").c_str()), 0);
  ASSERT_EQ(symlink(directory_.c_str(), Path("tree/up").c_str()), 0);
  EXPECT_TRUE(RemoveTree(Path("tree/")).ok());
  EXPECT_FALSE(FileExists(Path("tree")));
  EXPECT_EQ(*ReadFile(Path("outside")), "kept");
  EXPECT_TRUE(RemoveTree(Path("not there")).ok());
}

TEST_F(FileTest, TellsFreeBytes) {
  EXPECT_GT(*FreeBytes(directory_), 0);
  EXPECT_EQ(FreeBytes(Path("no")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(FileTest, ReadsLines) {
  std::string text = "one\r\n\n" + std::string(3 << 20, 'x') + "\nlast";
  ASSERT_TRUE(WriteFileAtomic(Path("lines"), text).ok());
  absl::StatusOr<LineReader> reader = LineReader::Open(Path("lines"), 4 << 20);
  ASSERT_TRUE(reader.ok());
  absl::string_view line;
  for (const std::string& wanted :
       {std::string("one"), std::string(), std::string(3 << 20, 'x'), std::string("last")}) {
    ASSERT_TRUE(*reader->Next(&line));
    EXPECT_TRUE(line == wanted) << reader->line_number();
  }
  EXPECT_EQ(reader->line_number(), 4);
  EXPECT_FALSE(*reader->Next(&line));

  absl::StatusOr<LineReader> narrow = LineReader::Open(Path("lines"), 1000);
  ASSERT_TRUE(*narrow->Next(&line));
  ASSERT_TRUE(*narrow->Next(&line));
  const absl::Status status = narrow->Next(&line).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("lines:3: the line is longer"));
}

}  // namespace
}  // namespace attune
