// CheckpointWeights: what Read gives is what the view shows, wherever a tensor lies in its file; a
// file that is cut or changed while it is read is an error with its name, not the end of the
// process.
#include "worker/model/checkpoint_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include "worker/io/file.h"

namespace attune {
namespace {

using ::testing::HasSubstr;

class CheckpointWeightsTest : public testing::Test {
 protected:
  void SetUp() override { root_ = CreateTempDirectory(testing::TempDir(), "weights-").value(); }
  void TearDown() override { RemoveTree(root_).IgnoreError(); }

  std::string Path() const { return root_ + "/model.safetensors"; }

  // "odd" moves what follows it off its alignment.
  CheckpointWeights Write() {
    const std::vector<SafetensorsWriter::Tensor> tensors = {
        {"aligned", DType::kBF16, {300, 70}},
        {"odd", DType::kU8, {3}},
        {"unaligned", DType::kF32, {41, 53}},
    };
    auto writer = SafetensorsWriter::Create(Path(), tensors).value();
    std::mt19937 rng(3);
    for (const auto& tensor : tensors) {
      std::vector<uint8_t> bytes(static_cast<size_t>(DTypeBytes(tensor.dtype)));
      size_t elements = 1;
      for (int64_t n : tensor.shape) elements *= static_cast<size_t>(n);
      bytes.resize(bytes.size() * elements);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng());
      EXPECT_TRUE(writer.Append(bytes).ok());
    }
    EXPECT_TRUE(writer.Finish().ok());
    return CheckpointWeights(Checkpoint::Open(root_).value());
  }

  std::string root_;
};

TEST_F(CheckpointWeightsTest, ReadsWhatTheViewShows) {
  const CheckpointWeights weights = Write();
  EXPECT_EQ(weights.checkpoint().data_bytes(), 300 * 70 * 2 + 3 + 41 * 53 * 4);
  for (const char* name : {"aligned", "unaligned", "odd", "unaligned"}) {
    const TensorView view = weights.Find(name).value();
    std::vector<char> read(static_cast<size_t>(view.bytes()));
    const char* const data = static_cast<const char*>(view.data);
    // The whole, then a piece of it.
    ASSERT_TRUE(weights.Read(data, view.bytes(), read.data()).ok()) << name;
    EXPECT_EQ(std::memcmp(read.data(), data, read.size()), 0) << name;
    ASSERT_TRUE(weights.Read(data + 1, view.bytes() - 1, read.data()).ok()) << name;
    EXPECT_EQ(std::memcmp(read.data(), data + 1, read.size() - 1), 0) << name;
  }
}

TEST_F(CheckpointWeightsTest, AFileThatIsCutMeanwhileIsAnError) {
  const CheckpointWeights weights = Write();
  const TensorView view = weights.Find("aligned").value();
  const auto size = static_cast<off_t>(weights.checkpoint().FileOf(view.data)->bytes().size());
  ASSERT_EQ(truncate(Path().c_str(), size - weights.checkpoint().data_bytes() + 1000), 0);
  std::vector<char> read(static_cast<size_t>(view.bytes()));
  EXPECT_TRUE(weights.Read(view.data, 1000, read.data()).ok());
  const absl::Status status = weights.Read(view.data, view.bytes(), read.data());
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path()));
  EXPECT_THAT(std::string(status.message()), HasSubstr("changed meanwhile, or cut"));
}

// A download that is moved into the place of the old one does not disturb who reads that.
TEST_F(CheckpointWeightsTest, AFileThatIsReplacedIsReadToItsEnd) {
  const CheckpointWeights weights = Write();
  const TensorView view = weights.Find("aligned").value();
  const std::vector<char> before(static_cast<const char*>(view.data),
                                 static_cast<const char*>(view.data) + view.bytes());
  ASSERT_TRUE(WriteFileAtomic(Path(), "another").ok());
  std::vector<char> read(before.size());
  ASSERT_TRUE(weights.Read(view.data, view.bytes(), read.data()).ok());
  EXPECT_EQ(read, before);
}

}  // namespace
}  // namespace attune
