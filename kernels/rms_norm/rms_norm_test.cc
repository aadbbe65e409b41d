// RMSNorm against a plain loop in double, and its backward against central differences.
#include "kernels/rms_norm/rms_norm.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::StatisticsOf;
using op_testing::Tensor;

// y and rstd of x, from x as it was stored.
void Reference(const Tensor& x, const Tensor& w, double eps, double offset, std::vector<double>* y,
               std::vector<double>* rstd) {
  const int64_t M = x.dim(0), C = x.dim(1);
  for (int64_t m = 0; m < M; ++m) {
    double sum = 0.0;
    for (int64_t c = 0; c < C; ++c) sum += x[m * C + c] * x[m * C + c];
    rstd->push_back(1.0 / std::sqrt(sum / static_cast<double>(C) + eps));
    for (int64_t c = 0; c < C; ++c) y->push_back(x[m * C + c] * rstd->back() * (w[c] + offset));
  }
}

class RmsNormTest : public testing::TestWithParam<std::tuple<DType, int64_t>> {};

TEST_P(RmsNormTest, ForwardAndRebuild) {
  const auto [dtype, C] = GetParam();
  const int64_t M = 7;
  std::mt19937_64 rng(1);
  for (double offset : {0.0, 1.0}) {
    for (DType w_dtype : {dtype, StatisticsOf(dtype)}) {
      Tensor x(dtype, {M, C}, 3), w(w_dtype, {C}), y(dtype, {M, C}, 5);
      Tensor rstd(StatisticsOf(dtype), {M}), again(dtype, {M, C}, 5);
      x.Random(&rng), w.Random(&rng);
      RmsNormForward(CpuExec(),
                     {.x = x, .w = w, .y = y, .rstd = rstd, .eps = 1e-3, .weight_offset = offset});
      std::vector<double> want_y, want_rstd;
      Reference(x, w, 1e-3, offset, &want_y, &want_rstd);
      op_testing::ExpectClose(y, want_y, op_testing::Tolerance(dtype), "y");
      op_testing::ExpectClose(rstd, want_rstd, dtype == DType::kF64 ? 1e-13 : 1e-6, "rstd");
      RmsNormRebuild(CpuExec(),
                     {.x = x, .rstd = rstd, .w = w, .y = again, .weight_offset = offset});
      EXPECT_EQ(again.bytes(), y.bytes()) << "rebuilt y has other bits";
    }
  }
}

TEST_P(RmsNormTest, AddsDelta) {
  const auto [dtype, C] = GetParam();
  const int64_t M = 5;
  std::mt19937_64 rng(2);
  Tensor x(dtype, {M, C}, 3), delta(dtype, {M, C}), sum(dtype, {M, C}, 1), w(dtype, {C});
  Tensor y(dtype, {M, C}), rstd(StatisticsOf(dtype), {M});
  x.Random(&rng), delta.Random(&rng), w.Random(&rng);
  RmsNormForward(CpuExec(), {.x = x, .delta = delta, .sum = sum, .w = w, .y = y, .rstd = rstd});
  std::vector<double> want_sum, want_y, want_rstd;
  for (int64_t i = 0; i < M * C; ++i) want_sum.push_back(x[i] + delta[i]);
  op_testing::ExpectClose(sum, want_sum, op_testing::Tolerance(dtype), "sum");
  Reference(sum, w, 1e-5, 0.0, &want_y, &want_rstd);
  op_testing::ExpectClose(y, want_y, op_testing::Tolerance(dtype), "y");
  // In place: sum over x, y over delta.
  Tensor y2 = delta, x2 = x;
  RmsNormForward(CpuExec(), {.x = x2, .delta = y2, .sum = x2, .w = w, .y = y2, .rstd = rstd});
  EXPECT_EQ(x2.ToVector(), sum.ToVector());
  EXPECT_EQ(y2.ToVector(), y.ToVector());
}

// The codes are those of y, of Forward and of Rebuild, and nothing else changes.
TEST_P(RmsNormTest, GivesTheCodesOfItsRows) {
  const auto [dtype, C] = GetParam();
  if (dtype == DType::kF64) return;
  constexpr int64_t kM = 5;
  std::mt19937_64 rng(6);
  const Tensor x = Tensor(dtype, {kM, C}, 2).Random(&rng), w = Tensor(dtype, {C}).Random(&rng);
  const Tensor y(dtype, {kM, C}, 1), plain(dtype, {kM, C}, 1), rstd(DType::kF32, {kM});
  const Tensor want(DType::kF8E4M3, {kM, C}), want_scale(DType::kF32, {kM});
  RmsNormForward(CpuExec(), {.x = x, .w = w, .y = plain, .rstd = rstd});
  Fp8Quantize(CpuExec(), {.x = plain, .q = want, .scale = want_scale});
  for (const bool rebuild : {false, true}) {
    const Tensor q(DType::kF8E4M3, {kM, C}, 7), scale(DType::kF32, {kM});
    if (rebuild) {
      RmsNormRebuild(CpuExec(), {.x = x, .rstd = rstd, .w = w, .y = y, .fp8 = {q, scale}});
    } else {
      RmsNormForward(CpuExec(), {.x = x, .w = w, .y = y, .rstd = rstd, .fp8 = {q, scale}});
    }
    EXPECT_EQ(y.bytes(), plain.bytes());
    EXPECT_EQ(q.ToVector(), want.ToVector());
    EXPECT_EQ(scale.bytes(), want_scale.bytes());
    q.ExpectGuardsIntact();
  }
}

TEST_P(RmsNormTest, BackwardMatchesReference) {
  const auto [dtype, C] = GetParam();
  const int64_t M = 6;
  std::mt19937_64 rng(3);
  const DType statistics = StatisticsOf(dtype);
  Tensor x(dtype, {M, C}, 2), w(dtype, {C}), dy(dtype, {M, C}, 1), dresidual(dtype, {M, C}, 4);
  Tensor dx(dtype, {M, C}, 3), dw(statistics, {C}), rstd(statistics, {M}), y(dtype, {M, C});
  x.Random(&rng), w.Random(&rng), dy.Random(&rng), dresidual.Random(&rng), dw.Random(&rng);
  RmsNormForward(CpuExec(), {.x = x, .w = w, .y = y, .rstd = rstd, .weight_offset = 1.0});
  std::vector<double> want_dx, want_dw = dw.ToVector();
  for (int64_t m = 0; m < M; ++m) {
    double mean = 0.0;
    const double r = rstd[m];
    for (int64_t c = 0; c < C; ++c) {
      mean += dy[m * C + c] * (w[c] + 1.0) * x[m * C + c] * r / static_cast<double>(C);
      want_dw[c] += dy[m * C + c] * x[m * C + c] * r;
    }
    for (int64_t c = 0; c < C; ++c) {
      want_dx.push_back(r * (dy[m * C + c] * (w[c] + 1.0) - x[m * C + c] * r * mean) +
                        dresidual[m * C + c]);
    }
  }
  RmsNormBackward(CpuExec(), {.dy = dy,
                              .x = x,
                              .rstd = rstd,
                              .w = w,
                              .dresidual = dresidual,
                              .dx = dx,
                              .dw = dw,
                              .weight_offset = 1.0});
  op_testing::ExpectClose(dx, want_dx, op_testing::Tolerance(dtype), "dx");
  op_testing::ExpectClose(dw, want_dw, dtype == DType::kF64 ? 1e-12 : 2e-6, "dw");
  // In place over dy, without dw.
  Tensor in_place = dy;
  RmsNormBackward(CpuExec(), {.dy = in_place,
                              .x = x,
                              .rstd = rstd,
                              .w = w,
                              .dresidual = dresidual,
                              .dx = in_place,
                              .weight_offset = 1.0});
  EXPECT_EQ(in_place.ToVector(), dx.ToVector());
}

INSTANTIATE_TEST_SUITE_P(Shapes, RmsNormTest,
                         testing::Combine(testing::ValuesIn(op_testing::kFloatDTypes),
                                          testing::Values<int64_t>(1, 16, 41, 260)));

TEST(RmsNormGradientTest, MatchesFiniteDifferences) {
  const int64_t M = 3, C = 41;
  std::mt19937_64 rng(4);
  Tensor x(DType::kF64, {M, C}), w(DType::kF64, {C}), y(DType::kF64, {M, C});
  Tensor rstd(DType::kF64, {M}), dy(DType::kF64, {M, C}), dx(DType::kF64, {M, C});
  Tensor dw(DType::kF64, {C});
  x.Random(&rng), w.Random(&rng), dy.Random(&rng), dw.Constant(0.0);
  const auto loss = [&] {
    RmsNormForward(CpuExec(), {.x = x, .w = w, .y = y, .rstd = rstd, .weight_offset = 1.0});
    return op_testing::Dot(y, dy);
  };
  const std::vector<double> want_dx = op_testing::FiniteDifferences(&x, loss);
  const std::vector<double> want_dw = op_testing::FiniteDifferences(&w, loss);
  loss();
  RmsNormBackward(
      CpuExec(),
      {.dy = dy, .x = x, .rstd = rstd, .w = w, .dx = dx, .dw = dw, .weight_offset = 1.0});
  op_testing::ExpectClose(dx, want_dx, 1e-8, "dx");
  op_testing::ExpectClose(dw, want_dw, 1e-8, "dw");
}

TEST(RmsNormThreadsTest, SameOnAnyThreadCount) {
  const int64_t M = 37, C = 530;
  std::mt19937_64 rng(5);
  Tensor x(DType::kF32, {M, C}), w(DType::kF32, {C}), y(DType::kF32, {M, C});
  Tensor rstd(DType::kF32, {M}), dy(DType::kF32, {M, C}), dx(DType::kF32, {M, C});
  x.Random(&rng), w.Random(&rng), dy.Random(&rng);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    Tensor dw(DType::kF32, {C});
    dw.Constant(0.0);
    RmsNormForward(CpuExec(), {.x = x, .w = w, .y = y, .rstd = rstd});
    RmsNormBackward(CpuExec(), {.dy = dy, .x = x, .rstd = rstd, .w = w, .dx = dx, .dw = dw});
    std::vector<uint8_t> all = y.bytes();
    all.insert(all.end(), dx.bytes().begin(), dx.bytes().end());
    all.insert(all.end(), dw.bytes().begin(), dw.bytes().end());
    return all;
  });
}

TEST(RmsNormPlanTest, TouchesNothing) {
  const TensorView x(nullptr, DType::kBF16, {4, 8}), w(nullptr, DType::kBF16, {8});
  const TensorView rstd(nullptr, DType::kF32, {4});
  RmsNormForward(op_testing::PlanExec(), {.x = x, .w = w, .y = x, .rstd = rstd});
  RmsNormRebuild(op_testing::PlanExec(), {.x = x, .rstd = rstd, .w = w, .y = x});
  RmsNormBackward(op_testing::PlanExec(), {.dy = x, .x = x, .rstd = rstd, .w = w, .dx = x});
}

// Named so that it runs first, before there are threads to fork.
TEST(RmsNormDeathTest, RefusesShapesThatDoNotMatch) {
  const TensorView x(nullptr, DType::kBF16, {4, 8}), rstd(nullptr, DType::kF32, {4});
  EXPECT_DEATH(RmsNormRebuild(op_testing::PlanExec(), {.x = x, .rstd = rstd, .w = rstd, .y = x}),
               "CHECK failed");
}

}  // namespace
}  // namespace attune
