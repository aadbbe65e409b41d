#include "worker/train/device_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#ifdef ATTUNE_HAS_CUDA
#include "kernels/core/cuda_libraries.h"
#endif

namespace attune {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

TEST(DeviceChoiceTest, Parses) {
  EXPECT_FALSE(ParseDeviceChoice("auto")->decided);
  const auto cpu = ParseDeviceChoice("cpu");
  EXPECT_TRUE(cpu->decided && cpu->kind == DeviceKind::kCpu);
  const auto first = ParseDeviceChoice("cuda");
  EXPECT_TRUE(first->decided && first->kind == DeviceKind::kCuda && first->index == 0);
  EXPECT_EQ(ParseDeviceChoice("cuda:3")->index, 3);
  for (const char* wrong : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda0", "CPU"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseDeviceChoice(wrong).status())) << wrong;
  }
}

TEST(DeviceChoiceTest, ADeviceKeepsItsKind) {
  const v1::Device gpu = ToDevice({.kind = DeviceKind::kCuda, .index = 2}, 7);
  EXPECT_EQ(gpu.id(), "cuda:2");
  EXPECT_EQ(gpu.threads(), 7);
  EXPECT_TRUE(gpu.bf16());
  EXPECT_EQ(KindOf(gpu), DeviceKind::kCuda);
  EXPECT_EQ(KindOf(ToDevice({}, 1)), DeviceKind::kCpu);
}

#ifdef ATTUNE_HAS_CUDA
// Any library will do: the one that stands in for NVML in other tests.
TEST(DeviceChoiceTest, LibrariesAreFoundWherePythonPackagesPutThem) {
  const fs::path packages = fs::path(testing::TempDir()) / "attune_site_packages";
  fs::remove_all(packages);
  fs::create_directories(packages / "nvidia/cudnn/lib");
  fs::create_directories(packages / "nvidia/nccl/lib");
  fs::copy(ATTUNE_BIN_DIR "/../fake_nvml/libnvidia-ml.so.1",
           packages / "nvidia/nccl/lib/libattune_probe.so.2");
  for (const fs::path& given : {packages, packages / "nvidia", packages / "nvidia/nccl/lib"}) {
    std::string tried;
    SetLibraryDirectories({});
    EXPECT_EQ(OpenCudaLibrary("libattune_probe.so.2", &tried), nullptr);
    EXPECT_THAT(tried, HasSubstr("/usr/local/cuda/lib64/libattune_probe.so.2"));
    SetLibraryDirectories({given.string()});
    EXPECT_NE(OpenCudaLibrary("libattune_probe.so.2", &tried), nullptr) << given << tried;
  }
  std::string tried;
  SetLibraryDirectories({packages.string()});
  EXPECT_EQ(OpenCudaLibrary("libattune_other.so.9", &tried), nullptr);
  EXPECT_THAT(tried, HasSubstr("nvidia/cudnn/lib/libattune_other.so.9"));
  fs::remove_all(packages);
}
#endif

}  // namespace
}  // namespace attune
