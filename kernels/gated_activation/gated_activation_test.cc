// The gate against its formula in double, its backward against central differences.
#include "kernels/gated_activation/gated_activation.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

constexpr int64_t kM = 5, kF = 41;

double Act(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kGeluErf:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  }
  return 0.0;
}

class GatedActivationTest : public testing::TestWithParam<Activation> {};

TEST_P(GatedActivationTest, MatchesReference) {
  for (DType dtype : op_testing::kFloatDTypes) {
    SCOPED_TRACE(DTypeName(dtype));
    std::mt19937_64 rng(1);
    Tensor both(dtype, {kM, 2 * kF}, 3), h(dtype, {kM, kF}, 1), dh(dtype, {kM, kF});
    both.Random(&rng, 3.0), dh.Random(&rng);
    const TensorView gate = both.view().Slice(1, 0, kF), up = both.view().Slice(1, kF, 2 * kF);
    GatedActivationForward(CpuExec(), {.gate = gate, .up = up, .h = h, .activation = GetParam()});
    std::vector<double> want_h, want_both(2 * kM * kF);
    for (int64_t m = 0; m < kM; ++m) {
      for (int64_t f = 0; f < kF; ++f) {
        const double g = both[m * 2 * kF + f], u = both[m * 2 * kF + kF + f];
        want_h.push_back(Act(GetParam(), g) * u);
        const double slope = (Act(GetParam(), g + 1e-6) - Act(GetParam(), g - 1e-6)) / 2e-6;
        want_both[m * 2 * kF + f] = dh[m * kF + f] * u * slope;
        want_both[m * 2 * kF + kF + f] = dh[m * kF + f] * Act(GetParam(), g);
      }
    }
    op_testing::ExpectClose(h, want_h, op_testing::Tolerance(dtype), "h");
    // Backward over gate and up themselves, h rebuilt into dh's buffer: separate rows first.
    Tensor rebuilt(dtype, {kM, kF}, 1), separate(dtype, {kM, 2 * kF}, 2);
    GatedActivationBackward(CpuExec(), {.dh = dh,
                                        .gate = gate,
                                        .up = up,
                                        .dgate = separate.view().Slice(1, 0, kF),
                                        .dup = separate.view().Slice(1, kF, 2 * kF),
                                        .h = rebuilt,
                                        .activation = GetParam()});
    EXPECT_EQ(rebuilt.bytes(), h.bytes()) << "rebuilt h has other bits";
    op_testing::ExpectClose(separate, want_both,
                            dtype == DType::kF64 ? 1e-8 : op_testing::Tolerance(dtype), "d");
    GatedActivationBackward(CpuExec(), {.dh = dh,
                                        .gate = gate,
                                        .up = up,
                                        .dgate = gate,
                                        .dup = up,
                                        .h = dh,
                                        .activation = GetParam()});
    EXPECT_EQ(both.ToVector(), separate.ToVector());
    EXPECT_EQ(dh.ToVector(), h.ToVector());
    both.ExpectGuardsIntact();
  }
}

TEST_P(GatedActivationTest, BackwardMatchesFiniteDifferences) {
  std::mt19937_64 rng(2);
  Tensor gate(DType::kF64, {kM, kF}), up = gate, dh = gate, h = gate, dgate = gate, dup = gate;
  gate.Random(&rng, 2.0), up.Random(&rng), dh.Random(&rng);
  const auto loss = [&] {
    GatedActivationForward(CpuExec(), {.gate = gate, .up = up, .h = h, .activation = GetParam()});
    return op_testing::Dot(h, dh);
  };
  const std::vector<double> want_dgate = op_testing::FiniteDifferences(&gate, loss);
  const std::vector<double> want_dup = op_testing::FiniteDifferences(&up, loss);
  GatedActivationBackward(
      CpuExec(),
      {.dh = dh, .gate = gate, .up = up, .dgate = dgate, .dup = dup, .activation = GetParam()});
  op_testing::ExpectClose(dgate, want_dgate, 1e-8, "dgate");
  op_testing::ExpectClose(dup, want_dup, 1e-8, "dup");
}

// The codes are those of h, and of the rows of both gradients, which share a scale.
TEST_P(GatedActivationTest, GivesTheCodesOfItsRows) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    std::mt19937_64 rng(3);
    Tensor both(dtype, {kM, 2 * kF}, 3), h(dtype, {kM, kF}, 1), dh(dtype, {kM, kF});
    both.Random(&rng, 3.0), dh.Random(&rng);
    const TensorView gate = both.view().Slice(1, 0, kF), up = both.view().Slice(1, kF, 2 * kF);
    const Tensor want(DType::kF8E4M3, {kM, 2 * kF}), got(DType::kF8E4M3, {kM, 2 * kF}, 5),
        want_scale(DType::kF32, {kM}), got_scale(DType::kF32, {kM});
    const TensorView want_h = want.view().Slice(1, 0, kF);
    GatedActivationForward(CpuExec(), {.gate = gate,
                                       .up = up,
                                       .h = h,
                                       .activation = GetParam(),
                                       .fp8 = {got.view().Slice(1, 0, kF), got_scale}});
    Fp8Quantize(CpuExec(), {.x = h, .q = want_h, .scale = want_scale});
    for (int64_t i = 0; i < kM * kF; ++i) {
      EXPECT_EQ(got[i / kF * 2 * kF + i % kF], want[i / kF * 2 * kF + i % kF]);
    }
    EXPECT_EQ(got_scale.bytes(), want_scale.bytes());
    GatedActivationBackward(CpuExec(), {.dh = dh,
                                        .gate = gate,
                                        .up = up,
                                        .dgate = gate,
                                        .dup = up,
                                        .h = dh,
                                        .activation = GetParam(),
                                        .fp8 = {got, got_scale}});
    Fp8Quantize(CpuExec(), {.x = both, .q = want, .scale = want_scale});
    EXPECT_EQ(got.ToVector(), want.ToVector());
    EXPECT_EQ(got_scale.bytes(), want_scale.bytes());
    got.ExpectGuardsIntact();
  }
}

// Far from 0 the activations are x or 0, not NaN.
TEST_P(GatedActivationTest, SaturatesWithoutNaN) {
  Tensor gate(DType::kF32, {1, 4}), up = gate, h = gate, dgate = gate, dup = gate;
  gate.Assign({-1e4, -200.0, 200.0, 1e4}), up.Constant(1.0);
  GatedActivationForward(CpuExec(), {.gate = gate, .up = up, .h = h, .activation = GetParam()});
  op_testing::ExpectClose(h, {0.0, 0.0, 200.0, 1e4}, 1e-6, "h");
  GatedActivationBackward(
      CpuExec(),
      {.dh = up, .gate = gate, .up = up, .dgate = dgate, .dup = dup, .activation = GetParam()});
  op_testing::ExpectClose(dgate, {0.0, 0.0, 1.0, 1.0}, 1e-6, "dgate");
}

INSTANTIATE_TEST_SUITE_P(Activations, GatedActivationTest,
                         testing::Values(Activation::kSilu, Activation::kGeluTanh,
                                         Activation::kGeluErf));

}  // namespace
}  // namespace attune
