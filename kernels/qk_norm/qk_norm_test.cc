// The norm of heads and its rotation against plain loops in double, the backward against central
// differences.
#include "kernels/qk_norm/qk_norm.h"

#include "kernels/core/op_testing.h"
#include "kernels/rope/rope.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::StatisticsOf;
using op_testing::Tensor;

constexpr int64_t kTokens = 5, kHeads = 3, kD = 41;

struct Tables {
  Tensor cos, sin;
  Tables(DType dtype, int64_t rotary_dim, std::mt19937_64* rng)
      : cos(StatisticsOf(dtype), {kTokens, rotary_dim / 2}),
        sin(StatisticsOf(dtype), {kTokens, rotary_dim / 2}) {
    cos.Random(rng), sin.Random(rng);
  }
};

class QkNormTest : public testing::TestWithParam<std::tuple<DType, int64_t>> {};

// Heads in fused rows, into buffers of their own.
TEST_P(QkNormTest, NormalisesThenRotates) {
  const DType dtype = std::get<0>(GetParam());
  const int64_t R = std::get<1>(GetParam());
  std::mt19937_64 rng(1);
  const Tables tables(dtype, R, &rng);
  Tensor fused(dtype, {kTokens, kHeads + 2, kD}, 5), w(dtype, {kD}),
      y(dtype, {kTokens, kHeads, kD});
  Tensor rstd(StatisticsOf(dtype), {kTokens, kHeads});
  fused.Random(&rng), w.Random(&rng);
  const QkNormHeads heads[] = {
      {.x = fused.view().Slice(1, 1, 1 + kHeads), .w = w, .y = y, .rstd = rstd}};
  QkNormForward(CpuExec(), {.heads = heads,
                            .cos = tables.cos,
                            .sin = tables.sin,
                            .rotary_dim = R,
                            .eps = 1e-3,
                            .weight_offset = 1.0});
  std::vector<double> want, want_rstd;
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t h = 1; h <= kHeads; ++h) {
      double n[kD], sum = 0;
      for (int64_t i = 0; i < kD; ++i) {
        n[i] = fused[(t * (kHeads + 2) + h) * kD + i];
        sum += n[i] * n[i];
      }
      want_rstd.push_back(1 / std::sqrt(sum / kD + 1e-3));
      for (int64_t i = 0; i < kD; ++i) n[i] *= want_rstd.back() * (w[i] + 1.0);
      for (int64_t i = 0; i < R / 2; ++i) {
        const double c = tables.cos[t * R / 2 + i], s = tables.sin[t * R / 2 + i];
        const double first = n[i], second = n[R / 2 + i];
        n[i] = first * c - second * s;
        n[R / 2 + i] = second * c + first * s;
      }
      want.insert(want.end(), n, n + kD);
    }
  }
  op_testing::ExpectClose(y, want, op_testing::Tolerance(dtype), "y");
  op_testing::ExpectClose(rstd, want_rstd, dtype == DType::kF64 ? 1e-13 : 1e-6, "rstd");
}

TEST_P(QkNormTest, BackwardMatchesFiniteDifferencesOfDouble) {
  const DType dtype = std::get<0>(GetParam());
  const int64_t R = std::get<1>(GetParam());
  std::mt19937_64 rng(2);
  const Tables tables(DType::kF64, R, &rng);
  // Values that the dtype has, so that the differences in double are of the same function.
  Tensor x(dtype, {kTokens, kHeads, kD}, 3), w(dtype, {kD}), dy(dtype, {kTokens, kHeads, kD}, 2);
  x.Random(&rng), w.Random(&rng), dy.Random(&rng);
  Tensor wide_x(DType::kF64, {kTokens, kHeads, kD}), wide_w(DType::kF64, {kD}), wide_dy = wide_x;
  wide_x.Assign(x.ToVector()), wide_w.Assign(w.ToVector()), wide_dy.Assign(dy.ToVector());
  Tensor y = wide_x, rstd(DType::kF64, {kTokens, kHeads});
  const auto forward = [&] {
    const QkNormHeads heads[] = {{.x = wide_x, .w = wide_w, .y = y, .rstd = rstd}};
    QkNormForward(CpuExec(), {.heads = heads,
                              .cos = tables.cos,
                              .sin = tables.sin,
                              .rotary_dim = R,
                              .weight_offset = 1.0});
  };
  const std::vector<double> want = op_testing::FiniteDifferences(&wide_x, [&] {
    forward();
    return op_testing::Dot(y, wide_dy);
  });
  forward();
  Tensor narrow_rstd(StatisticsOf(dtype), {kTokens, kHeads});
  Tensor cos(StatisticsOf(dtype), {kTokens, R / 2}), sin = cos, dx(dtype, {kTokens, kHeads, kD}, 7);
  narrow_rstd.Assign(rstd.ToVector());
  cos.Assign(tables.cos.ToVector()), sin.Assign(tables.sin.ToVector());
  const QkNormHeadsBackward heads[] = {{.dy = dy, .x = x, .rstd = narrow_rstd, .w = w, .dx = dx}};
  QkNormBackward(CpuExec(),
                 {.heads = heads, .cos = cos, .sin = sin, .rotary_dim = R, .weight_offset = 1.0});
  op_testing::ExpectClose(dx, want, dtype == DType::kF64 ? 1e-8 : op_testing::Tolerance(dtype),
                          "dx");
  dx.ExpectGuardsIntact();
}

INSTANTIATE_TEST_SUITE_P(Shapes, QkNormTest,
                         testing::Combine(testing::ValuesIn(op_testing::kFloatDTypes),
                                          testing::Values<int64_t>(0, 16, 40)));

// The one pass gives what the two give.
TEST(QkNormRopeTest, IsRopeAfterTheNorm) {
  std::mt19937_64 rng(3);
  const Tables tables(DType::kF32, 40, &rng);
  Tensor x(DType::kF32, {kTokens, kHeads, kD}), w(DType::kF32, {kD}), y = x, n = x;
  Tensor rstd(DType::kF32, {kTokens, kHeads});
  x.Random(&rng), w.Random(&rng);
  const QkNormHeads to_n[] = {{.x = x, .w = w, .y = n, .rstd = rstd}};
  QkNormForward(CpuExec(), {.heads = to_n});
  const RopeHeads heads[] = {{.x = n}};
  Rope(CpuExec(), {.heads = heads, .cos = tables.cos, .sin = tables.sin, .rotary_dim = 40});
  const QkNormHeads to_y[] = {{.x = x, .w = w, .y = y, .rstd = rstd}};
  QkNormForward(CpuExec(), {.heads = to_y, .cos = tables.cos, .sin = tables.sin, .rotary_dim = 40});
  op_testing::ExpectClose(y, n.ToVector(), 1e-6, "y");
}

TEST(QkNormPlanTest, TouchesNothing) {
  const TensorView x(nullptr, DType::kBF16, {4, 2, 8}), w(nullptr, DType::kBF16, {8});
  const TensorView rstd(nullptr, DType::kF32, {4, 2}), table(nullptr, DType::kF32, {4, 4});
  const Exec exec = op_testing::PlanExec();
  const QkNormHeads heads[] = {{.x = x, .w = w, .y = x, .rstd = rstd}};
  QkNormForward(exec, {.heads = heads, .cos = table, .sin = table, .rotary_dim = 8});
  const QkNormHeadsBackward back[] = {{.dy = x, .x = x, .rstd = rstd, .w = w, .dx = x}};
  QkNormBackward(exec, {.heads = back, .cos = table, .sin = table, .rotary_dim = 8});
}

}  // namespace
}  // namespace attune
