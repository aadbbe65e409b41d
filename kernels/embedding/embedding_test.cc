#include "kernels/embedding/embedding.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::Tensor;

TEST(EmbeddingTest, PicksAndScalesRows) {
  for (DType dtype : op_testing::kFloatDTypes) {
    std::mt19937_64 rng(1);
    Tensor table(dtype, {11, 41}, 3), y(dtype, {5, 41}, 2);
    table.Random(&rng);
    const std::vector<int32_t> ids = {10, 0, 3, 3, 7};
    EmbeddingForward(op_testing::CpuExec(),
                     {.ids = op_testing::Ints(ids), .table = table, .y = y, .scale = 1.5});
    std::vector<double> want;
    for (int32_t id : ids) {
      for (int64_t c = 0; c < 41; ++c) want.push_back(table[id * 41 + c] * 1.5);
    }
    op_testing::ExpectClose(y, want, op_testing::Tolerance(dtype), DTypeName(dtype));
  }
}

TEST(EmbeddingTest, ScaleOneKeepsBits) {
  std::mt19937_64 rng(2);
  Tensor table(DType::kBF16, {4, 9}), y(DType::kBF16, {4, 9});
  table.Random(&rng);
  EmbeddingForward(op_testing::CpuExec(),
                   {.ids = op_testing::Ints({0, 1, 2, 3}), .table = table, .y = y});
  EXPECT_EQ(y.bytes(), table.bytes());
}

TEST(EmbeddingDeathTest, StopsAtAnIdOutside) {
  const Tensor table(DType::kF32, {4, 9}), y(DType::kF32, {1, 9});
  for (int32_t id : {-1, 4}) {
    EXPECT_DEATH(EmbeddingForward(op_testing::CpuExec(),
                                  {.ids = op_testing::Ints({id}), .table = table, .y = y}),
                 "CHECK failed");
  }
}

}  // namespace
}  // namespace attune
