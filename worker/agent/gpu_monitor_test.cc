// Against tests/support/fake_nvml.cc, whose answers a file holds.
#include "worker/agent/gpu_monitor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>

namespace attune {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr char kLibrary[] = ATTUNE_BIN_DIR "/../fake_nvml/libnvidia-ml.so.1";

class GpuMonitorTest : public testing::Test {
 protected:
  GpuMonitorTest() {
    file_ = testing::TempDir() + "/fake_nvml_state";
    setenv("FAKE_NVML", file_.c_str(), 1);
    Say();
  }

  // What NVML says from now on: two GPUs, the first with `uncorrected` errors, and `events`.
  void Say(int uncorrected = 3, const std::string& events = "") {
    std::ofstream(file_) << "gpu GPU-aaaa 150000000000 2000000000 90 75 412500 51 7 " << uncorrected
                         << " NVIDIA H200\n"
                         << "gpu GPU-bbbb 80000000000 0 75 0 30000 33 0 0 Tesla T4\n"
                         << events;
  }
  std::unique_ptr<GpuMonitor> Open(const char* visible = nullptr) {
    return GpuMonitor::Open(visible, kLibrary).value();
  }

  std::string file_;
};

TEST_F(GpuMonitorTest, DescribesDevices) {
  const auto devices = Open()->Devices(16, 1);
  ASSERT_THAT(devices, SizeIs(2));
  EXPECT_EQ(devices[0].id(), "cuda:GPU-aaaa");
  EXPECT_EQ(devices[0].uuid(), "GPU-aaaa");
  EXPECT_EQ(devices[0].type(), v1::DEVICE_TYPE_CUDA);
  EXPECT_EQ(devices[0].model(), "NVIDIA H200");
  EXPECT_EQ(devices[0].memory_bytes(), 150000000000);
  EXPECT_EQ(devices[0].compute_capability(), 90);
  EXPECT_EQ(devices[0].threads(), 8);
  EXPECT_TRUE(devices[0].bf16());
  EXPECT_FALSE(devices[1].bf16()) << "7.5 does not multiply it";
}

TEST_F(GpuMonitorTest, SharesAGpuAmongTrainersWhenAsked) {
  auto monitor = Open("GPU-aaaa");
  const auto devices = monitor->Devices(4, 2);
  ASSERT_THAT(devices, SizeIs(2));
  EXPECT_EQ(devices[0].id(), "cuda:GPU-aaaa");
  EXPECT_EQ(devices[1].id(), "cuda:GPU-aaaa/1");
  EXPECT_EQ(devices[1].uuid(), "GPU-aaaa");
  EXPECT_EQ(devices[1].memory_bytes(), 75000000000);
  EXPECT_EQ(devices[1].threads(), 2);
  EXPECT_THAT(monitor->Read(), SizeIs(2));
}

TEST_F(GpuMonitorTest, OffersOnlyWhatIsVisible) {
  for (const char* visible : {"1", "GPU-b", " GPU-bbbb ", "GPU-zz,1"}) {
    const auto devices = Open(visible)->Devices(2, 1);
    ASSERT_THAT(devices, SizeIs(1)) << visible;
    EXPECT_EQ(devices[0].uuid(), "GPU-bbbb") << visible;
  }
  for (const char* visible : {"", "-1", "2", "NoDevFiles"}) {
    EXPECT_TRUE(absl::IsNotFound(GpuMonitor::Open(visible, kLibrary).status())) << visible;
  }
}

TEST_F(GpuMonitorTest, ReadsTelemetry) {
  auto monitor = Open();
  monitor->Devices(2, 1);
  const auto statuses = monitor->Read();
  ASSERT_THAT(statuses, SizeIs(2));
  EXPECT_EQ(statuses[0].device(), "cuda:GPU-aaaa");
  EXPECT_DOUBLE_EQ(statuses[0].utilization(), 0.75);
  EXPECT_EQ(statuses[0].memory_used_bytes(), 2000000000);
  EXPECT_DOUBLE_EQ(statuses[0].power_w(), 412.5);
  EXPECT_DOUBLE_EQ(statuses[0].temperature_c(), 51);
  EXPECT_EQ(statuses[0].ecc_corrected_errors(), 7);
  EXPECT_EQ(statuses[0].ecc_uncorrected_errors(), 3);
  EXPECT_THAT(statuses[0].fault(), IsEmpty()) << "those errors were there before";
}

TEST_F(GpuMonitorTest, AnXidOfTheGpuMakesItFaultyOneOfAProgramDoesNot) {
  auto monitor = Open();
  Say(3, "xid 0 31\nxid 1 13\n");
  for (const v1::DeviceStatus& status : monitor->Read()) {
    EXPECT_THAT(status.fault(), IsEmpty());
    EXPECT_EQ(status.xid_errors(), 1);
  }
  Say(3, "xid 0 31\nxid 1 13\nxid 1 79\n");
  EXPECT_THAT(monitor->Read()[0].fault(), IsEmpty());
  EXPECT_THAT(monitor->Read()[1].fault(), HasSubstr("XID 79")) << "and it stays";
  EXPECT_EQ(monitor->Read()[1].xid_errors(), 2);
}

TEST_F(GpuMonitorTest, AnUncorrectedMemoryErrorMakesItFaulty) {
  auto monitor = Open();
  Say(5);
  EXPECT_THAT(monitor->Read()[0].fault(), HasSubstr("2 uncorrected"));
  Say(3);
  EXPECT_THAT(monitor->Read()[0].fault(), HasSubstr("2 uncorrected"));
}

TEST_F(GpuMonitorTest, ALostGpuIsFaulty) {
  auto monitor = Open();
  Say(3, "lost 1\n");
  EXPECT_THAT(monitor->Read()[1].fault(), HasSubstr("lost"));
  EXPECT_THAT(monitor->Read()[0].fault(), IsEmpty());
}

TEST_F(GpuMonitorTest, WithoutADriverThereIsNone) {
  setenv("FAKE_NVML", "/nowhere", 1);
  EXPECT_TRUE(absl::IsNotFound(GpuMonitor::Open(nullptr, kLibrary).status()));
  const absl::Status status = GpuMonitor::Open(nullptr, "libnvidia-ml-none.so.1").status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
}

}  // namespace
}  // namespace attune
