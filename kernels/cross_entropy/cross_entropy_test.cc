// Cross entropy against its formula in double, its gradient against central differences.
#include "kernels/cross_entropy/cross_entropy.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

const std::vector<int32_t> kTargets = {3, -1, 0, 40, 17, -100, 2};
const int64_t kRows = static_cast<int64_t>(kTargets.size());

struct Want {
  std::vector<double> loss, gradient;
  std::vector<double> correct;
};

Want Reference(const Tensor& logits, double softcap, double grad_scale) {
  Want want;
  const int64_t V = logits.dim(1);
  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<double> z(V);
    double largest = -INFINITY, sum = 0.0;
    int64_t argmax = 0;
    for (int64_t v = 0; v < V; ++v) {
      z[v] = logits[r * V + v];
      if (softcap > 0) z[v] = softcap * std::tanh(z[v] / softcap);
      if (z[v] > largest) argmax = v;
      largest = std::max(largest, z[v]);
    }
    for (double v : z) sum += std::exp(v - largest);
    const int64_t target = kTargets[r];
    want.loss.push_back(target < 0 ? 0.0 : largest + std::log(sum) - z[target]);
    want.correct.push_back(target >= 0 && argmax == target);
    for (int64_t v = 0; v < V; ++v) {
      const double slope = softcap > 0 ? 1.0 - z[v] * z[v] / (softcap * softcap) : 1.0;
      want.gradient.push_back(
          target < 0 ? 0.0 : (std::exp(z[v] - largest) / sum - (v == target)) * slope * grad_scale);
    }
  }
  return want;
}

class CrossEntropyTest : public testing::TestWithParam<std::tuple<DType, int64_t, double>> {};

TEST_P(CrossEntropyTest, MatchesReference) {
  const auto [dtype, V, softcap] = GetParam();
  const DType statistics = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  std::mt19937_64 rng(1);
  Tensor logits(dtype, {kRows, V}, 3), loss(statistics, {kRows}), scale(statistics, {1});
  Tensor correct = op_testing::Bytes(kRows);
  logits.Random(&rng, 4.0), scale.Constant(0.37);
  logits.Set(3 * V + 40, 30.0);  // one row that is right
  const Want want = Reference(logits, softcap, scale[0]);
  const Tensor before = logits;
  CrossEntropyArgs args{.logits = logits,
                        .targets = op_testing::Ints(kTargets),
                        .loss = loss,
                        .correct = correct,
                        .softcap = softcap,
                        .want_grad = false};
  const Tensor targets = op_testing::Ints(kTargets);
  args.targets = targets;
  CrossEntropy(CpuExec(), args);
  EXPECT_EQ(logits.bytes(), before.bytes()) << "logits changed without want_grad";
  // bf16 logits are read exactly: their loss is as good as that of f32.
  op_testing::ExpectClose(loss, want.loss, dtype == DType::kF64 ? 1e-12 : 1e-6, "loss");
  EXPECT_EQ(correct.ToVector(), want.correct);
  EXPECT_EQ(want.correct[3], 1.0);
  args.want_grad = true;
  args.grad_scale = scale;
  loss.Poison();
  CrossEntropy(CpuExec(), args);
  op_testing::ExpectClose(loss, want.loss, dtype == DType::kF64 ? 1e-12 : 1e-6, "loss");
  op_testing::ExpectClose(logits, want.gradient, op_testing::Tolerance(dtype), "gradient");
}

INSTANTIATE_TEST_SUITE_P(Shapes, CrossEntropyTest,
                         testing::Combine(testing::ValuesIn(op_testing::kFloatDTypes),
                                          testing::Values<int64_t>(41, 1003),
                                          testing::Values(0.0, 30.0)));

TEST(CrossEntropyGradientTest, MatchesFiniteDifferences) {
  const int64_t V = 41;
  for (int variant = 0; variant < 8; ++variant) {
    const double softcap = variant & 1 ? 5.0 : 0.0;
    std::mt19937_64 rng(2);
    Tensor logits(DType::kF64, {kRows, V}), loss(DType::kF64, {kRows}), scale(DType::kF64, {1});
    logits.Random(&rng, 2.0), scale.Constant(1.0);
    const Tensor targets = op_testing::Ints(kTargets);
    CrossEntropyArgs args{.logits = logits,
                          .targets = targets,
                          .loss = loss,
                          .grad_scale = scale,
                          .softcap = softcap,
                          .label_smoothing = variant & 2 ? 0.2 : 0.0,
                          .z_loss = variant & 4 ? 0.03 : 0.0,
                          .want_grad = false};
    const auto total = [&] {
      CrossEntropy(CpuExec(), args);
      double sum = 0.0;
      for (int64_t r = 0; r < kRows; ++r) sum += loss[r];
      return sum;
    };
    const std::vector<double> want = op_testing::FiniteDifferences(&logits, total);
    args.want_grad = true;
    CrossEntropy(CpuExec(), args);
    op_testing::ExpectClose(logits, want, 1e-8, "dlogits");
  }
}

// From torch 2.x in double: logits[v] = sin(v) + v / 4 for v of 0 to 6, target 2;
//   torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
//   + 0.01 * torch.logsumexp(logits, -1)**2     and its gradient.
constexpr double kTorchLoss = 1.540820249270057;
constexpr double kTorchGradient[7] = {0.04967293711224947, 0.17622487645604304, -0.6524979201621832,
                                      0.1416364304895637,  0.06728206378085215, 0.07128238381941016,
                                      0.2024809086488331};

TEST(CrossEntropyGradientTest, SmoothingAndZLossAsTorch) {
  Tensor logits(DType::kF64, {1, 7}), loss(DType::kF64, {1}), scale(DType::kF64, {1});
  for (int v = 0; v < 7; ++v) logits.Set(v, std::sin(v) + v / 4.0);
  scale.Constant(1.0);
  const Tensor targets = op_testing::Ints({2});
  CrossEntropy(CpuExec(), {.logits = logits,
                           .targets = targets,
                           .loss = loss,
                           .grad_scale = scale,
                           .label_smoothing = 0.1,
                           .z_loss = 0.01});
  EXPECT_NEAR(loss[0], kTorchLoss, 1e-13);
  for (int v = 0; v < 7; ++v) EXPECT_NEAR(logits[v], kTorchGradient[v], 1e-14) << v;
}

TEST(CrossEntropyEdgeTest, ExtremeLogits) {
  Tensor logits(DType::kF32, {4, 3}), loss(DType::kF32, {4}), scale(DType::kF32, {1});
  Tensor correct = op_testing::Bytes(4);
  logits.Assign({1e4, -1e4, 0.0, 1e4, -1e4, 0.0, 2.0, 2.0, 1.0, NAN, 0.0, 0.0});
  scale.Constant(1.0);
  const Tensor targets = op_testing::Ints({0, 2, 1, 0});
  CrossEntropy(CpuExec(), {.logits = logits,
                           .targets = targets,
                           .loss = loss,
                           .correct = correct,
                           .grad_scale = scale});
  EXPECT_EQ(loss[0], 0.0);
  EXPECT_EQ(loss[1], 1e4);
  EXPECT_EQ(logits[3], 1.0);
  EXPECT_EQ(logits[5], -1.0);
  EXPECT_EQ(correct[2], 0.0) << "of two equal maxima the first counts";
  EXPECT_TRUE(std::isnan(loss[3]));
  EXPECT_TRUE(std::isnan(logits[10]));
}

TEST(CrossEntropyThreadsTest, SameOnAnyThreadCount) {
  std::mt19937_64 rng(3);
  Tensor start(DType::kF32, {kRows, 517}), loss(DType::kF32, {kRows}), scale(DType::kF32, {1});
  start.Random(&rng), scale.Constant(1.0);
  const Tensor targets = op_testing::Ints(kTargets);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    Tensor logits = start;
    CrossEntropy(CpuExec(),
                 {.logits = logits, .targets = targets, .loss = loss, .grad_scale = scale});
    std::vector<uint8_t> all = logits.bytes();
    all.insert(all.end(), loss.bytes().begin(), loss.bytes().end());
    return all;
  });
}

TEST(CrossEntropyDeathTest, StopsAtATargetPastTheEnd) {
  const Tensor logits(DType::kF32, {1, 3}), loss(DType::kF32, {1});
  const Tensor targets = op_testing::Ints({3});
  EXPECT_DEATH(
      CrossEntropy(CpuExec(),
                   {.logits = logits, .targets = targets, .loss = loss, .want_grad = false}),
      "CHECK failed");
}

}  // namespace
}  // namespace attune
