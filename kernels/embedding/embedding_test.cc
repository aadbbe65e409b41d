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

TEST(EmbeddingBackwardTest, AddsTheScaledRowsOfEachId) {
  for (DType dtype : op_testing::kFloatDTypes) {
    std::mt19937_64 rng(3);
    Tensor dy(dtype, {7, 133}, 5), dtable(op_testing::StatisticsOf(dtype), {9, 133}, 2);
    dy.Random(&rng);
    dtable.Random(&rng);
    const std::vector<int32_t> ids = {8, 0, 3, 3, 8, 3, 1};
    std::vector<double> want = dtable.ToVector();
    for (size_t t = 0; t < ids.size(); ++t) {
      if (ids[t] == 8) continue;  // padding
      for (int64_t c = 0; c < 133; ++c) {
        want[ids[t] * 133 + c] += 1.5 * dy[static_cast<int64_t>(t) * 133 + c];
      }
    }
    EmbeddingBackward(
        op_testing::CpuExec(),
        {.ids = op_testing::Ints(ids), .dy = dy, .dtable = dtable, .scale = 1.5, .padding_id = 8});
    op_testing::ExpectClose(dtable, want, 1e-6, DTypeName(dtype));
    dtable.ExpectGuardsIntact();
  }
}

// The table's gradient is that of y . w for a fixed w.
TEST(EmbeddingBackwardTest, EqualsFiniteDifferences) {
  std::mt19937_64 rng(4);
  Tensor table(DType::kF64, {6, 11}, 1), y(DType::kF64, {5, 11}), w(DType::kF64, {5, 11});
  Tensor dtable(DType::kF64, {6, 11});
  table.Random(&rng);
  w.Random(&rng);
  dtable.Constant(0.0);
  const Tensor ids = op_testing::Ints({2, 5, 2, 0, 2});
  EmbeddingBackward(op_testing::CpuExec(), {.ids = ids, .dy = w, .dtable = dtable, .scale = 0.7});
  const std::vector<double> want = op_testing::FiniteDifferences(&table, [&] {
    EmbeddingForward(op_testing::CpuExec(), {.ids = ids, .table = table, .y = y, .scale = 0.7});
    return op_testing::Dot(y, w);
  });
  op_testing::ExpectClose(dtable, want, 1e-9, "dtable");
}

// A run of noise on zeros: documents of 4, 1 and 6 tokens, then padding.
std::vector<double> Noise(DType dtype, int32_t step, int32_t pack, uint64_t seed, double alpha) {
  Tensor x(dtype, {13, 41}, 3);
  x.Constant(0.0);
  const Tensor count = op_testing::Ints({3}), begin = op_testing::Ints({0, 4, 5, 11, -1}),
               step_pack = op_testing::Ints({step, pack});
  EmbeddingNoise(op_testing::CpuExec(), {.x = x,
                                         .num_segments = count,
                                         .q_begin = begin,
                                         .step_pack = step_pack,
                                         .alpha = alpha,
                                         .seed = seed});
  x.ExpectGuardsIntact();
  return x.ToVector();
}

TEST(EmbeddingNoiseTest, IsUniformWithinAlphaOverTheRootOfTheDocumentsSize) {
  const std::vector<double> noise = Noise(DType::kF64, 3, 1, 42, 5);
  const struct { int64_t begin, end; } documents[] = {{0, 4}, {4, 5}, {5, 11}};
  for (const auto& document : documents) {
    const int64_t n = (document.end - document.begin) * 41;
    const double bound = 5 / std::sqrt(static_cast<double>(n));
    double sum = 0, squares = 0, largest = 0;
    for (int64_t i = document.begin * 41; i < document.end * 41; ++i) {
      sum += noise[i] / bound, squares += noise[i] / bound * noise[i] / bound;
      largest = std::max(largest, std::abs(noise[i]) / bound);
    }
    EXPECT_LE(largest, 1);
    EXPECT_GT(largest, 0.9);
    EXPECT_NEAR(sum / static_cast<double>(n), 0, 4 / std::sqrt(3.0 * static_cast<double>(n)));
    EXPECT_NEAR(squares / static_cast<double>(n), 1.0 / 3, 0.15);
  }
  for (size_t i = 11 * 41; i < noise.size(); ++i) EXPECT_EQ(noise[i], 0) << "padding";
}

TEST(EmbeddingNoiseTest, IsAFunctionOfSeedStepAndPack) {
  const std::vector<double> noise = Noise(DType::kF32, 3, 1, 42, 5);
  EXPECT_EQ(Noise(DType::kF32, 3, 1, 42, 5), noise);
  EXPECT_NE(Noise(DType::kF32, 4, 1, 42, 5), noise);
  EXPECT_NE(Noise(DType::kF32, 3, 2, 42, 5), noise);
  EXPECT_NE(Noise(DType::kF32, 3, 1, 43, 5), noise);
  const std::vector<double> exact = Noise(DType::kF64, 3, 1, 42, 5);
  for (size_t i = 0; i < noise.size(); ++i) EXPECT_NEAR(noise[i], exact[i], 1e-6);
}

TEST(EmbeddingDeathTest, StopsAtAnIdOutside) {
  const Tensor table(DType::kF32, {4, 9}), y(DType::kF32, {1, 9});
  for (int32_t id : {-1, 4}) {
    EXPECT_DEATH(EmbeddingBackward(op_testing::CpuExec(),
                                   {.ids = op_testing::Ints({id}), .dy = y, .dtable = table}),
                 "CHECK failed");
    EXPECT_DEATH(EmbeddingForward(op_testing::CpuExec(),
                                  {.ids = op_testing::Ints({id}), .table = table, .y = y}),
                 "CHECK failed");
  }
}

}  // namespace
}  // namespace attune
