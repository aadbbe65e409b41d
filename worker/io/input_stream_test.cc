#include "worker/io/input_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include "absl/strings/str_cat.h"
#include "worker/io/file.h"
#include "worker/io/line_reader.h"
#include "worker/io/spill_buffer.h"

namespace attune {
namespace {

using ::testing::HasSubstr;

std::string Gzip(const std::string& text) {
  std::string out(compressBound(text.size()) + 32, '\0');
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string Zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

std::string Lines(int count) {
  std::string text;
  for (int i = 0; i < count; ++i) absl::StrAppend(&text, "line ", i, " ", i * 7919 % 1000, "\n");
  return text;
}

std::string Write(const std::string& name, const std::string& bytes) {
  const std::string path = absl::StrCat(testing::TempDir(), "/input_stream_", name);
  EXPECT_TRUE(WriteFileAtomic(path, bytes).ok());
  return path;
}

absl::StatusOr<std::string> ReadLines(const std::string& path) {
  absl::StatusOr<LineReader> reader = LineReader::Open(path, 1 << 20);
  if (!reader.ok()) return reader.status();
  std::string text;
  while (true) {
    absl::string_view line;
    absl::StatusOr<bool> more = reader->Next(&line);
    if (!more.ok()) return more.status();
    if (!*more) return text;
    absl::StrAppend(&text, line, "\n");
  }
}

TEST(InputStream, ReadsGzipAndZstdWhateverTheyAreCalled) {
  const std::string text = Lines(200000);
  EXPECT_EQ(*ReadLines(Write("plain", text)), text);
  EXPECT_EQ(*ReadLines(Write("a.gz", Gzip(text))), text);
  EXPECT_EQ(*ReadLines(Write("a.jsonl", Zstd(text))), text);
}

TEST(InputStream, ReadsSeveralMembersAndFrames) {
  EXPECT_EQ(*ReadLines(Write("m.gz", Gzip("a\n") + Gzip("") + Gzip("b\n"))), "a\nb\n");
  EXPECT_EQ(*ReadLines(Write("m.zst", Zstd("a\n") + Zstd("b\n"))), "a\nb\n");
}

TEST(InputStream, DamageIsDataLoss) {
  const std::string text = Lines(5000);
  for (std::string bytes : {Gzip(text), Zstd(text)}) {
    const absl::Status cut =
        ReadLines(Write("cut", bytes.substr(0, bytes.size() / 2))).status();
    EXPECT_EQ(cut.code(), absl::StatusCode::kDataLoss) << cut;
    EXPECT_THAT(std::string(cut.message()), HasSubstr("ends in the middle"));
    bytes.replace(bytes.size() / 2, 40, std::string(40, '\x55'));
    const absl::Status changed = ReadLines(Write("changed", bytes)).status();
    EXPECT_EQ(changed.code(), absl::StatusCode::kDataLoss) << changed;
  }
}

TEST(InputStream, ParquetIsRefusedWithAdvice) {
  const absl::Status status = ReadLines(Write("a.parquet", "PAR1....PAR1")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("JSON lines"));
}

TEST(SpillBuffer, IsTheSameInMemoryAndOnDisk) {
  for (size_t limit : {size_t{1} << 20, size_t{1000}}) {
    SpillBuffer buffer(testing::TempDir(), limit);
    std::vector<int32_t> wanted;
    for (int32_t i = 0; i < 5000; ++i) {
      const int32_t values[2] = {i, -i};
      ASSERT_TRUE(buffer.Append(absl::MakeConstSpan(values)).ok());
      wanted.insert(wanted.end(), values, values + 2);
    }
    ASSERT_TRUE(buffer.Finish().ok());
    EXPECT_EQ(buffer.spilled(), limit == 1000);
    const SpillBuffer moved = std::move(buffer);
    EXPECT_EQ(moved.View<int32_t>(), absl::MakeConstSpan(wanted));
  }
}

TEST(SpillBuffer, AMissingDirectoryIsAnErrorOnlyWhenNeeded) {
  SpillBuffer buffer("/nowhere", 10);
  EXPECT_TRUE(buffer.Append("12345").ok());
  EXPECT_EQ(buffer.Append("67890123").code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace attune
