// Dropout against the mask written out from Philox, its keep rate, and its independence of how the
// tensor is cut.
#include "kernels/dropout/dropout.h"

#include "kernels/core/op_testing.h"
#include "kernels/core/philox.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

DropoutArgs Args(const Tensor& x, const Tensor& y, const Tensor& step_pack, double p) {
  return {.x = x,
          .y = y,
          .step_pack = step_pack,
          .p = p,
          .seed = 0x123456789abcdefull,
          .layer = 11,
          .module = 3};
}

bool Keeps(const DropoutArgs& a, uint32_t step, uint32_t pack, uint64_t element) {
  const uint64_t block = element / 4;
  const PhiloxBlock drawn =
      Philox4x32({{static_cast<uint32_t>(block), step, pack,
                   a.layer << 16 | a.module << 8 | static_cast<uint32_t>(block >> 32)}},
                 static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
  return drawn.word[element % 4] >= a.p * 4294967296.0;
}

TEST(DropoutTest, FollowsItsKey) {
  const int64_t M = 7, N = 41;
  const Tensor step_pack = op_testing::Ints({5, 9});
  for (DType dtype : op_testing::kFloatDTypes) {
    for (int64_t first_row : {int64_t{0}, int64_t{3}, int64_t{1} << 32}) {
      std::mt19937_64 rng(1);
      Tensor x(dtype, {M, N}, 3), y(dtype, {M, N}, 1), sum(dtype, {M, N}, 2);
      x.Random(&rng), sum.Random(&rng);
      DropoutArgs args = Args(x, y, step_pack, 0.3);
      args.first_row = first_row;
      std::vector<double> want, want_sum;
      for (int64_t i = 0; i < M * N; ++i) {
        const bool keep = Keeps(args, 5, 9, static_cast<uint64_t>(first_row * N + i));
        want.push_back(keep ? x[i] / 0.7 : 0.0);
        want_sum.push_back(sum[i] + want.back());
      }
      Dropout(CpuExec(), args);
      op_testing::ExpectClose(y, want, op_testing::Tolerance(dtype), "y");
      args.y = sum;
      args.accumulate = true;
      Dropout(CpuExec(), args);
      op_testing::ExpectClose(sum, want_sum, op_testing::Tolerance(dtype), "y +=");
    }
  }
}

TEST(DropoutTest, KeepRateAndScale) {
  const int64_t M = 64, N = 1001;
  Tensor x(DType::kF32, {M, N}), y(DType::kF32, {M, N});
  x.Constant(1.0);
  const Tensor step_pack = op_testing::Ints({0, 0});
  for (double p : {0.05, 0.5, 0.9}) {
    Dropout(CpuExec(), Args(x, y, step_pack, p));
    double kept = 0.0;
    for (int64_t i = 0; i < y.size(); ++i) kept += y[i] != 0.0;
    const double n = static_cast<double>(y.size());
    EXPECT_NEAR(kept / n, 1.0 - p, 4.0 * std::sqrt(p * (1.0 - p) / n));
  }
  Dropout(CpuExec(), Args(x, y, step_pack, 0.0));
  EXPECT_EQ(y.ToVector(), x.ToVector());
}

TEST(DropoutTest, EveryPartOfTheKeyCounts) {
  Tensor x(DType::kF32, {4, 100}), y(DType::kF32, {4, 100});
  x.Constant(1.0);
  const Tensor first = op_testing::Ints({1, 2});
  const Tensor other_step = op_testing::Ints({2, 2}), other_pack = op_testing::Ints({1, 1});
  std::vector<DropoutArgs> variants(6, Args(x, y, first, 0.5));
  variants[1].seed ^= uint64_t{1} << 40;
  variants[2].step_pack = other_step;
  variants[3].step_pack = other_pack;
  variants[4].layer = 12;
  variants[5].module = 4;
  std::vector<std::vector<double>> masks;
  for (const DropoutArgs& args : variants) {
    Dropout(CpuExec(), args);
    masks.push_back(y.ToVector());
  }
  for (size_t i = 0; i < masks.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(masks[i], masks[j]) << i << " and " << j;
  }
}

TEST(DropoutTest, ChunksOfRowsDrawTheSameMask) {
  Tensor x(DType::kF32, {9, 41}), whole(DType::kF32, {9, 41}), parts(DType::kF32, {9, 41});
  x.Constant(1.0);
  const Tensor step_pack = op_testing::Ints({3, 4});
  Dropout(CpuExec(), Args(x, whole, step_pack, 0.4));
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 4}, {4, 9}}) {
    DropoutArgs args = Args(x, parts, step_pack, 0.4);
    args.x = x.view().Slice(0, begin, end);
    args.y = parts.view().Slice(0, begin, end);
    args.first_row = begin;
    Dropout(CpuExec(), args);
  }
  EXPECT_EQ(parts.bytes(), whole.bytes());
}

TEST(DropoutTest, BackwardMatchesFiniteDifferences) {
  std::mt19937_64 rng(2);
  Tensor x(DType::kF64, {3, 41}), y = x, dy = x, dx = x;
  x.Random(&rng), dy.Random(&rng);
  const Tensor step_pack = op_testing::Ints({3, 4});
  const std::vector<double> want = op_testing::FiniteDifferences(&x, [&] {
    Dropout(CpuExec(), Args(x, y, step_pack, 0.4));
    return op_testing::Dot(y, dy);
  });
  Dropout(CpuExec(), Args(dy, dx, step_pack, 0.4));
  op_testing::ExpectClose(dx, want, 1e-8, "dx");
}

TEST(DropoutTest, SameOnAnyThreadCount) {
  std::mt19937_64 rng(3);
  Tensor x(DType::kF32, {37, 130}), y = x;
  x.Random(&rng);
  const Tensor step_pack = op_testing::Ints({3, 4});
  op_testing::ExpectSameOnAnyThreadCount([&] {
    Dropout(CpuExec(), Args(x, y, step_pack, 0.1));
    return y.bytes();
  });
}

}  // namespace
}  // namespace attune
