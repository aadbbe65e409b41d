#include "kernels/dora/dora.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::StatisticsOf;
using op_testing::Tensor;

TEST(DoraFactorsTest, AreMagnitudesOverLengths) {
  for (DType dtype : {DType::kF32, DType::kF64}) {
    std::mt19937_64 rng(1);
    Tensor v(dtype, {7, 53}, 3), magnitude(dtype, {7}), norm(dtype, {7}), factor(dtype, {7});
    v.Random(&rng);
    magnitude.Random(&rng);
    for (int64_t c = 0; c < 53; ++c) v.Set(2 * 53 + c, 0);
    DoraFactors(CpuExec(), {.v = v, .magnitude = magnitude, .norm = norm, .factor = factor});
    std::vector<double> lengths, factors;
    for (int64_t n = 0; n < 7; ++n) {
      double squares = 0;
      for (int64_t c = 0; c < 53; ++c) squares += v[n * 53 + c] * v[n * 53 + c];
      lengths.push_back(std::sqrt(squares));
      factors.push_back(n == 2 ? 0 : magnitude[n] / std::sqrt(squares));
    }
    op_testing::ExpectClose(norm, lengths, op_testing::Tolerance(dtype), "norm");
    op_testing::ExpectClose(factor, factors, op_testing::Tolerance(dtype), "factor");
    Tensor alone(dtype, {7});
    DoraFactors(CpuExec(), {.v = v, .norm = alone});
    EXPECT_EQ(alone.bytes(), norm.bytes());
  }
}

TEST(ScaleColumnsTest, ScalesOrAdds) {
  for (DType dtype : op_testing::kFloatDTypes) {
    for (const bool accumulate : {false, true}) {
      std::mt19937_64 rng(2);
      Tensor x(dtype, {5, 67}, 2), y(dtype, {5, 67}, 1), factor(StatisticsOf(dtype), {67});
      x.Random(&rng);
      factor.Random(&rng);
      std::vector<double> want;
      if (accumulate) want = y.Random(&rng).ToVector();
      want.resize(5 * 67);
      for (int64_t i = 0; i < x.size(); ++i) want[i] += 0.5 * (factor[i % 67] - 1) * x[i];
      ScaleColumns(
          CpuExec(),
          {.x = x, .factor = factor, .y = y, .offset = -1, .alpha = 0.5, .accumulate = accumulate});
      op_testing::ExpectClose(y, want, op_testing::Tolerance(dtype), DTypeName(dtype));
      if (accumulate) continue;
      ScaleColumns(CpuExec(), {.x = x, .factor = factor, .y = x, .offset = -1, .alpha = 0.5});
      EXPECT_EQ(x.ToVector(), y.ToVector()) << "in place";
    }
  }
}

// loss = w . (magnitude / norm o u), with a fixed norm.
TEST(DoraMagnitudeBackwardTest, EqualsFiniteDifferences) {
  std::mt19937_64 rng(3);
  Tensor dy(DType::kF64, {9, 71}, 3), u(DType::kF64, {9, 71}, 1);
  Tensor norm(DType::kF64, {71}), magnitude(DType::kF64, {71}), got(DType::kF64, {71});
  dy.Random(&rng);
  u.Random(&rng);
  magnitude.Random(&rng);
  for (int64_t n = 0; n < 71; ++n) norm.Set(n, 1 + n / 10.0);
  got.Constant(0.0);
  DoraMagnitudeBackward(CpuExec(),
                        {.dy = dy, .u = u, .norm = norm, .dmagnitude = got, .alpha = 0.7});
  const std::vector<double> want = op_testing::FiniteDifferences(&magnitude, [&] {
    double loss = 0;
    for (int64_t i = 0; i < u.size(); ++i) {
      loss += 0.7 * dy[i] * magnitude[i % 71] / norm[i % 71] * u[i];
    }
    return loss;
  });
  op_testing::ExpectClose(got, want, 1e-8, "dmagnitude");
}

TEST(DoraMagnitudeBackwardTest, AddsAndIsTheSameOnAnyThreadCount) {
  for (DType dtype : op_testing::kFloatDTypes) {
    std::mt19937_64 rng(4);
    Tensor dy(dtype, {300, 131}), u(dtype, {300, 131}), norm(StatisticsOf(dtype), {131});
    Tensor start(StatisticsOf(dtype), {131});
    dy.Random(&rng);
    u.Random(&rng);
    start.Random(&rng);
    norm.Constant(2.0);
    norm.Set(5, 0);
    std::vector<double> want = start.ToVector();
    for (int64_t i = 0; i < u.size(); ++i) {
      if (i % 131 != 5) want[i % 131] += dy[i] * u[i] / 2;
    }
    op_testing::ExpectSameOnAnyThreadCount([&] {
      Tensor got = start;
      DoraMagnitudeBackward(CpuExec(), {.dy = dy, .u = u, .norm = norm, .dmagnitude = got});
      op_testing::ExpectClose(got, want, dtype == DType::kF64 ? 1e-12 : 1e-5, DTypeName(dtype));
      return got.bytes();
    });
  }
}

}  // namespace
}  // namespace attune
