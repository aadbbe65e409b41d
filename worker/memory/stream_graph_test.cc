#include "worker/memory/stream_graph.h"

#include <gtest/gtest.h>

#include "worker/memory/arena.h"
#include "worker/memory/device.h"

namespace attune {
namespace {

TEST(StreamGraphTest, OnTheCpuTheCodeRunsEveryTime) {
  StreamGraph graph;
  int runs = 0;
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(graph.Run({}, {1}, [&] { ++runs; }));
  EXPECT_EQ(runs, 4);
  EXPECT_EQ(graph.key(), StreamGraph::Key{1});
}

// What is copied changes in memory, so a replayed copy shows it; where to, in the key.
TEST(StreamGraphTest, ReplaysWhatWasRecordedUntilTheKeyChanges) {
  if (absl::Status s = OpenDevice(DeviceKind::kCuda, 0); !s.ok()) GTEST_SKIP() << s;
  const Exec exec = {.device = DeviceKind::kCuda, .stream = NewStream(DeviceKind::kCuda)};
  const Exec side = {.device = DeviceKind::kCuda, .stream = NewStream(DeviceKind::kCuda)};
  Arena arena = Arena::Allocate(DeviceKind::kCuda, 4096).value();
  const TensorView x = arena.New(ArenaEnd::kBottom, MemoryClass::kWorkspace, DType::kI32, {1});
  PinnedMemory in, out;
  ASSERT_TRUE(in.Allocate(DeviceKind::kCuda, sizeof(int32_t)).ok());
  ASSERT_TRUE(out.Allocate(DeviceKind::kCuda, 2 * sizeof(int32_t)).ok());
  StreamGraph graph;
  StreamEvent filled, sent;
  int runs = 0;
  for (int32_t i = 0; i < 10; ++i) {
    const int64_t key = i / 5;
    *reinterpret_cast<int32_t*>(in.data()) = 100 + i;
    const bool ran = graph.Run(exec, {key}, [&] {
      ++runs;
      CopyFromPinned(exec, in.data(), x);
      filled.Record(exec);
      filled.MakeWait(side);  // another stream takes part, and comes back
      CopyToPinned(side, x, out.data() + key * sizeof(int32_t));
      sent.Record(side);
      sent.MakeWait(exec);
    });
    EXPECT_EQ(ran, i % 5 < 2) << i;
    Synchronize(exec);
    EXPECT_EQ(reinterpret_cast<const int32_t*>(out.data())[key], 100 + i);
  }
  EXPECT_EQ(runs, 4);
}

}  // namespace
}  // namespace attune
