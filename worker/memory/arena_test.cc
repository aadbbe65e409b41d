#include "worker/memory/arena.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace attune {
namespace {

// What a layer does: saves, scratches, and releases in order.
void Work(Arena* arena) {
  ArenaScope saved(arena, ArenaEnd::kBottom);
  arena->New(ArenaEnd::kBottom, MemoryClass::kActivations, DType::kF32, {100});
  {
    ArenaScope scratch(arena);
    arena->NewScratch(DType::kBF16, {1000});
    arena->New(ArenaEnd::kBottom, MemoryClass::kActivations, DType::kF32, {10, 3});
  }
  ArenaScope scratch(arena);
  arena->NewScratch(DType::kF64, {7});
}

TEST(ArenaTest, PlanEqualsRealPeakAndFits) {
  Arena plan = Arena::Plan();
  plan.New(ArenaEnd::kBottom, MemoryClass::kWeights, DType::kU8, {300});
  plan.BeginPhase("train");
  Work(&plan);
  EXPECT_EQ(plan.peak().total, 512 + 512 + 2048 + 256);
  EXPECT_EQ(plan.peak().phase, "train");
  EXPECT_EQ(plan.peak().by_class[static_cast<int>(MemoryClass::kWeights)], 512);
  EXPECT_EQ(plan.peak().by_class[static_cast<int>(MemoryClass::kActivations)], 768);
  EXPECT_EQ(plan.peak().by_class[static_cast<int>(MemoryClass::kWorkspace)], 2048);

  absl::StatusOr<Arena> real = Arena::Allocate(DeviceKind::kCpu, plan.peak().total);
  ASSERT_TRUE(real.ok());
  real->New(ArenaEnd::kBottom, MemoryClass::kWeights, DType::kU8, {300});
  for (int i = 0; i < 3; ++i) Work(&*real);
  EXPECT_EQ(real->peak().total, real->capacity());
}

TEST(ArenaTest, ViewsDoNotOverlapAndAreAligned) {
  absl::StatusOr<Arena> arena = Arena::Allocate(DeviceKind::kCpu, 4096);
  ASSERT_TRUE(arena.ok());
  const TensorView a = arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, DType::kU8, {100});
  const TensorView b = arena->NewScratch(DType::kU8, {100});
  const TensorView c = arena->New(ArenaEnd::kBottom, MemoryClass::kWeights, DType::kU8, {100});
  for (const TensorView& v : {a, b, c}) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(v.data) % Arena::kAlignment, 0u);
  }
  EXPECT_GE(static_cast<char*>(c.data) - static_cast<char*>(a.data), 100);
  EXPECT_GE(static_cast<char*>(b.data) - static_cast<char*>(c.data), 100);
}

TEST(ArenaTest, RefusesWhatTheSystemDoesNotHave) {
  const absl::StatusOr<Arena> arena = Arena::Allocate(DeviceKind::kCpu, int64_t{1} << 60);
  EXPECT_EQ(arena.status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(ArenaDeathTest, BeyondThePlanIsAProgrammerError) {
  absl::StatusOr<Arena> arena = Arena::Allocate(DeviceKind::kCpu, 256);
  ASSERT_TRUE(arena.ok());
  EXPECT_DEATH(arena->NewScratch(DType::kU8, {257}), "CHECK failed");
}

}  // namespace
}  // namespace attune
