#include "kernels/rows/rows.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::Tensor;

constexpr int64_t kT = 9, kC = 41;
const std::vector<int32_t> kIndex = {0, 4, 8, -1, -7};

TEST(RowsTest, GatherAndScatter) {
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kU8}) {
    SCOPED_TRACE(DTypeName(dtype));
    std::mt19937_64 rng(1);
    const int64_t R = static_cast<int64_t>(kIndex.size());
    const Tensor index = op_testing::Ints(kIndex);
    Tensor x(dtype, {kT, kC}, 3), y(dtype, {R, kC}, 1), back(dtype, {kT, kC}, 2);
    for (int64_t i = 0; i < x.size(); ++i) x.Set(i, static_cast<double>(rng() % 200));
    GatherRows(op_testing::CpuExec(), {.x = x, .index = index, .y = y});
    std::vector<double> want_y, want_x(kT * kC, 0.0);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t c = 0; c < kC; ++c) {
        want_y.push_back(kIndex[r] < 0 ? 0.0 : x[kIndex[r] * kC + c]);
        if (kIndex[r] >= 0) want_x[kIndex[r] * kC + c] = x[kIndex[r] * kC + c];
      }
    }
    EXPECT_EQ(y.ToVector(), want_y);
    y.ExpectGuardsIntact();
    for (int64_t c = 0; c < kC; ++c) y.Set(3 * kC + c, 77.0);  // a dropped row
    ScatterRows(op_testing::CpuExec(), {.y = y, .index = index, .x = back});
    EXPECT_EQ(back.ToVector(), want_x);
    back.ExpectGuardsIntact();
  }
}

TEST(RowsTest, NoRowsClearEverything) {
  const Tensor none(DType::kF32, {0, kC}), index(DType::kI32, {0}), x(DType::kF32, {kT, kC});
  ScatterRows(op_testing::CpuExec(), {.y = none, .index = index, .x = x});
  EXPECT_EQ(x.ToVector(), std::vector<double>(kT * kC, 0.0));
  GatherRows(op_testing::CpuExec(), {.x = x, .index = index, .y = none});
}

TEST(RowsTest, GatherTakesRowsInAnyOrder) {
  Tensor x(DType::kF32, {3, 1}), y(DType::kF32, {4, 1});
  for (int64_t i = 0; i < 3; ++i) x.Set(i, static_cast<double>(i + 1));
  GatherRows(op_testing::CpuExec(), {.x = x, .index = op_testing::Ints({2, -1, 0, 2}), .y = y});
  EXPECT_EQ(y.ToVector(), (std::vector<double>{3, 0, 1, 3}));
}

TEST(RowsDeathTest, ScatterStopsAtAnIndexOutOfOrder) {
  const Tensor x(DType::kF32, {kT, kC}), y(DType::kF32, {3, kC});
  for (const std::vector<int32_t>& index : {std::vector<int32_t>{4, 2, 8}, {4, -1, 8}, {2, 4, 4}}) {
    EXPECT_DEATH(
        ScatterRows(op_testing::CpuExec(), {.y = y, .index = op_testing::Ints(index), .x = x}),
        "CHECK");
  }
}

TEST(RowsDeathTest, StopsAtAnIndexPastTheEnd) {
  const Tensor x(DType::kF32, {kT, kC}), y(DType::kF32, {1, kC});
  const Tensor index = op_testing::Ints({kT});
  EXPECT_DEATH(GatherRows(op_testing::CpuExec(), {.x = x, .index = index, .y = y}), "CHECK");
  EXPECT_DEATH(ScatterRows(op_testing::CpuExec(), {.y = y, .index = index, .x = x}), "CHECK");
}

}  // namespace
}  // namespace attune
