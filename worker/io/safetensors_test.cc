#include "worker/io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class SafetensorsTest : public ::testing::Test {
 protected:
  void SetUp() override { directory_ = *CreateTempDirectory(::testing::TempDir(), "safetensors_"); }
  void TearDown() override { EXPECT_TRUE(RemoveTree(directory_).ok()); }
  std::string Path(const std::string& name) const { return directory_ + "/" + name; }
  void Write(const std::string& name, absl::string_view bytes) {
    ASSERT_TRUE(WriteFileAtomic(Path(name), bytes).ok());
  }

  // A file with this header, and so many bytes of data.
  static std::string File(absl::string_view header, size_t data_bytes) {
    std::string file(8, '\0');
    const uint64_t size = header.size();
    for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(size >> (8 * i));
    absl::StrAppend(&file, header);
    for (size_t i = 0; i < data_bytes; ++i) file.push_back(static_cast<char>(i));
    return file;
  }

  static absl::Status Parse(const std::string& file) {
    return SafetensorsFile::Parse(
               absl::MakeSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()), "m.st")
        .status();
  }

  std::string directory_;
};

TEST_F(SafetensorsTest, RoundTrip) {
  const std::vector<SafetensorsWriter::Tensor> tensors = {{"b", DType::kBF16, {2, 3}},
                                                          {"a\"é", DType::kF32, {1}},
                                                          {"empty", DType::kI64, {0, 7}},
                                                          {"scalar", DType::kU8, {}}};
  absl::StatusOr<SafetensorsWriter> writer =
      SafetensorsWriter::Create(Path("m.safetensors"), tensors, {{"format", "pt"}, {"k", "v"}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  std::vector<uint8_t> bytes(12 + 4 + 1);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i + 1);
  ASSERT_TRUE(writer->Append(absl::MakeSpan(bytes).subspan(0, 5)).ok());
  ASSERT_FALSE(FileExists(Path("m.safetensors")));
  ASSERT_TRUE(writer->Append(absl::MakeSpan(bytes).subspan(5)).ok());
  ASSERT_TRUE(writer->Finish().ok());

  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(Path("m.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"k", "v"}}));
  EXPECT_EQ(file->names().size(), 4u);
  absl::StatusOr<TensorInfo> b = file->Find("b");
  ASSERT_TRUE(b.ok());
  EXPECT_EQ(b->dtype, DType::kBF16);
  EXPECT_THAT(b->shape, ElementsAre(2, 3));
  EXPECT_EQ(b->num_elements(), 6);
  EXPECT_EQ(b->bytes[0], 1);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b->bytes.data()) % 8, 0u);
  EXPECT_EQ(file->Find("a\"é")->bytes[0], 13);
  EXPECT_EQ(file->Find("empty")->num_elements(), 0);
  EXPECT_EQ(file->Find("scalar")->bytes[0], 17);
  EXPECT_EQ(file->Find("none").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SafetensorsTest, WriterRefusesWhatIsWrong) {
  EXPECT_THAT(std::string(SafetensorsWriter::Create(
                              Path("x"), {{"a", DType::kF32, {1}}, {"a", DType::kF32, {1}}})
                              .status()
                              .message()),
              HasSubstr("two tensors are named \"a\""));
  EXPECT_FALSE(SafetensorsWriter::Create(Path("x"), {{"a", DType::kF32, {-1}}}).ok());
  EXPECT_FALSE(
      SafetensorsWriter::Create(Path("x"), {{"a", DType::kF32, {1 << 30, 1 << 30, 8}}}).ok());
  EXPECT_FALSE(SafetensorsWriter::Create(Path("x"), {{"\xff", DType::kF32, {1}}}).ok());
  absl::StatusOr<SafetensorsWriter> writer =
      SafetensorsWriter::Create(Path("x"), {{"a", DType::kF32, {1}}});
  const std::vector<uint8_t> five(5);
  EXPECT_EQ(writer->Append(five).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(writer->Finish().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(FileExists(Path("x")));
}

TEST_F(SafetensorsTest, BrokenFilesHaveTheirOwnMessage) {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_TRUE(Parse(File(good, 8)).ok());
  struct Case {
    std::string file;
    absl::StatusCode code;
    std::string message;
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto lost = absl::StatusCode::kDataLoss;
  const auto tensor = [](const std::string& body) { return "{\"a\":{" + body + "}}"; };
  std::string huge = File(good, 8);
  huge[7] = '\x7f';
  std::string longer = File(good, 0);
  longer[0] = static_cast<char>(200);
  const std::vector<Case> cases = {
      {"", lost, "has 0 bytes; a safetensors file begins with 8"},
      {huge, invalid, "over the limit of 100000000 bytes"},
      {longer, lost, "the header should have 200 bytes, but the file ends after"},
      {File("{\"a\":", 0), invalid, "m.st (header):1:6: not valid JSON"},
      {File("[]", 0), invalid, "an object is needed"},
      {File("{\"a\xff\":1}", 0), invalid, "UTF-8"},
      {File(good, 7), lost, "ends at byte 8 of the data, but the file has only 7"},
      {File(good, 9), invalid, "the tensors end at byte 8, but the file has 9"},
      {File(tensor(R"("shape":[2],"data_offsets":[0,8])"), 8), invalid, "a.dtype is missing"},
      {File(tensor(R"("dtype":"F32","data_offsets":[0,8])"), 8), invalid, "a.shape is missing"},
      {File(tensor(R"("dtype":"F32","shape":[2])"), 8), invalid, "a.data_offsets is missing"},
      {File(tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8), invalid,
       "negative extent"},
      {File(tensor(R"("dtype":"F32","shape":["2"],"data_offsets":[0,8])"), 8), invalid,
       "a.shape[0] is a string"},
      {File(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8), invalid,
       "no range [begin, end)"},
      {File(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), 8), invalid,
       "no range [begin, end)"},
      {File(tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8), invalid,
       "has shape [3] of F32, which is 12 bytes, but data_offsets of 8 bytes"},
      {File(tensor(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0])"), 0),
       invalid, "product overflows"},
      {File(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
               "b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})",
            7),
       invalid, "tensor \"b\" begins at byte 3, inside the tensor before it, which ends at byte 4"},
      {File(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
               "b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}})",
            9),
       invalid, "tensor \"b\" begins at byte 5, but the one before it ends at byte 4"},
      {File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
               "a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
            2),
       invalid, "the key \"a\" is there twice"},
      {File(R"({"__metadata__":{"format":1}})", 0), invalid, "__metadata__.format is a number"},
  };
  for (const Case& broken : cases) {
    const absl::Status status = Parse(broken.file);
    EXPECT_EQ(status.code(), broken.code) << broken.message << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(broken.message));
    EXPECT_THAT(std::string(status.message()), HasSubstr("m.st"));
  }
}

TEST_F(SafetensorsTest, UnreadableDTypesAreNoErrorUntilAskedFor) {
  const std::string bytes = File(
      R"({"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},
          "b":{"dtype":"F3_NEW","shape":[9],"data_offsets":[4,6]},
          "c":{"dtype":"I8","shape":[2],"data_offsets":[6,8]}})",
      8);
  Write("m.safetensors", bytes);
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(Path("m.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->Find("c").ok());
  EXPECT_EQ(file->Find("a").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(file->Find("b").status().message()), HasSubstr("F3_NEW"));
}

TEST_F(SafetensorsTest, ManyTensors) {
  std::vector<SafetensorsWriter::Tensor> tensors;
  for (int i = 0; i < 100000; ++i) tensors.push_back({absl::StrCat("t", i), DType::kU8, {1}});
  absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::Create(Path("many"), tensors);
  ASSERT_TRUE(writer.ok());
  std::vector<uint8_t> bytes(tensors.size());
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i);
  ASSERT_TRUE(writer->Append(bytes).ok());
  ASSERT_TRUE(writer->Finish().ok());
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(Path("many"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->names().size(), tensors.size());
  EXPECT_EQ(checkpoint->Find("t77777")->bytes[0], static_cast<uint8_t>(77777));
}

std::string OneTensor(const std::string& name) {
  return "{\"" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
}

TEST_F(SafetensorsTest, ShardsThroughAnIndexAndLinks) {
  // As in a cache: blobs elsewhere, links in the snapshot.
  ASSERT_EQ(mkdir(Path("blobs").c_str(), 0700), 0);
  ASSERT_EQ(mkdir(Path("snapshot").c_str(), 0700), 0);
  Write("blobs/1", File(OneTensor("a"), 1));
  Write("blobs/2", File(OneTensor("b"), 1));
  Write("blobs/3", R"({"metadata": {"total_size": 2},
                       "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})");
  ASSERT_EQ(symlink("../blobs/1", Path("snapshot/m-1.safetensors").c_str()), 0);
  ASSERT_EQ(symlink("../blobs/2", Path("snapshot/m-2.safetensors").c_str()), 0);
  ASSERT_EQ(symlink("../blobs/3", Path("snapshot/model.safetensors.index.json").c_str()), 0);
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(Path("snapshot"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT(checkpoint->names(), ElementsAre("a", "b"));
  EXPECT_TRUE(checkpoint->Find("b").ok());
  EXPECT_EQ(checkpoint->files().size(), 2u);
  EXPECT_EQ(checkpoint->Find("c").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SafetensorsTest, BrokenCheckpointsHaveTheirOwnMessage) {
  const auto open_error = [&](const std::string& weight_map) {
    Write("model.safetensors.index.json", R"({"weight_map": )" + weight_map + "}");
    const absl::Status status = Checkpoint::Open(directory_).status();
    EXPECT_FALSE(status.ok()) << weight_map;
    return status.ToString();
  };
  EXPECT_THAT(Checkpoint::Open(directory_).status().ToString(),
              HasSubstr("has neither model.safetensors nor model.safetensors.index.json"));
  EXPECT_EQ(Checkpoint::Open(Path("no")).status().code(), absl::StatusCode::kNotFound);
  Write("1.safetensors", File(OneTensor("a"), 1));
  Write("2.safetensors", File(OneTensor("a"), 1));
  EXPECT_THAT(open_error(R"({"a": "3.safetensors"})"), HasSubstr("3.safetensors is missing, but"));
  EXPECT_THAT(open_error(R"({"b": "1.safetensors"})"),
              HasSubstr("puts tensor \"b\" into 1.safetensors, which does not have it"));
  EXPECT_THAT(open_error(R"({"a": "1.safetensors", "b": "2.safetensors"})"),
              HasSubstr("tensor \"a\" is in "));
  EXPECT_THAT(open_error(R"({"a": "../1.safetensors"})"), HasSubstr("no file name inside"));
  EXPECT_THAT(open_error(R"({"a": "/etc/passwd"})"), HasSubstr("no file name inside"));
  EXPECT_THAT(open_error(R"({"a": 5})"), HasSubstr("weight_map.a is a number"));
  EXPECT_THAT(open_error("[]"), HasSubstr("weight_map is an array"));
}

}  // namespace
}  // namespace attune
