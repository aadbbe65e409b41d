// Philox against the known answers of its authors (Random123), exp against libm, the block product
// against a plain loop, bfloat16 rounding.
#include <cmath>
#include <limits>

#include "kernels/core/gemm_block.h"
#include "kernels/core/op_testing.h"
#include "kernels/core/philox.h"
#include "kernels/core/simd.h"

namespace attune {
namespace {

TEST(PhiloxTest, KnownAnswers) {
  const auto expect = [](PhiloxBlock counter, uint32_t key0, uint32_t key1, PhiloxBlock want) {
    const PhiloxBlock got = Philox4x32(counter, key0, key1);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(got.word[i], want.word[i]) << i;
  };
  expect({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  const uint32_t ones = 0xffffffff;
  expect({{ones, ones, ones, ones}}, ones, ones,
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(SimdTest, ExpIsWithinTwoUlp) {
  for (float x = -87.0f; x < 88.5f; x += 0.00371f) {
    const double want = std::exp(static_cast<double>(x));
    EXPECT_LE(std::abs(Exp(x) - want) / want, 2.4e-7) << x;
  }
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Exp(0.0f), 1.0f);
  EXPECT_EQ(Exp(-inf), 0.0f);
  EXPECT_EQ(Exp(inf), inf);
  EXPECT_EQ(Exp(90.0f), inf);
  EXPECT_NEAR(Exp(-100.0f), std::exp(-100.0), 1e-45);
  EXPECT_TRUE(std::isnan(Exp(std::nanf(""))));
  EXPECT_NEAR(Tanh(0.3f), std::tanh(0.3), 2e-7);
  EXPECT_EQ(Tanh(50.0f), 1.0f);
  EXPECT_EQ(Tanh(-200.0f), -1.0f);
}

TEST(BFloat16Test, RoundsToNearestEven) {
  EXPECT_EQ(BFloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(BFloat16(1.00390625f).bits, 0x3f80);  // halfway: to the even
  EXPECT_EQ(BFloat16(1.01171875f).bits, 0x3f82);
  EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(std::nanf("")))));
  EXPECT_EQ(BFloat16(3.4e38f).bits, 0x7f80);
}

TEST(Float16Test, ConvertsExactly) {
  const auto value = [](uint16_t bits) {
    Float16 half;
    half.bits = bits;
    return static_cast<float>(half);
  };
  EXPECT_EQ(value(0x3c00), 1.0f);
  EXPECT_EQ(value(0xc248), -3.140625f);
  EXPECT_EQ(value(0x7bff), 65504.0f);
  EXPECT_EQ(value(0x0400), 6.103515625e-5f);
  EXPECT_EQ(value(0x0001), 5.9604644775390625e-8f);
  EXPECT_EQ(value(0x83ff), -1023 * 5.9604644775390625e-8f);
  EXPECT_TRUE(std::signbit(value(0x8000)));
  EXPECT_EQ(value(0xfc00), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(value(0x7e00)));
}

template <typename A>
void CheckGemmBlock(double tolerance) {
  std::mt19937_64 rng(7);
  for (int64_t m : {1, 2, 3, 5, 6, 7, 11, 23}) {
    for (bool transposed : {false, true}) {
      for (bool accumulate : {false, true}) {
        const int64_t n = 32, k = 13, width = 48;
        op_testing::Tensor a(DTypeOf<A>(), {m, k}), b(DTypeOf<A>(), {k, width}),
            c(DTypeOf<A>(), {m, width});
        a.Random(&rng), b.Random(&rng), c.Random(&rng);
        const op_testing::Tensor before = c;
        GemmBlock(GemmBlockArgs<A>{m, n, k, a.view().template As<A>(), transposed ? 1 : k,
                                   transposed ? m : 1, b.view().template As<A>(), width,
                                   c.view().template As<A>(), width, accumulate});
        std::vector<double> want = before.ToVector();
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            double sum = accumulate ? before[i * width + j] : 0.0;
            for (int64_t p = 0; p < k; ++p) {
              sum += a[transposed ? p * m + i : i * k + p] * b[p * width + j];
            }
            want[i * width + j] = sum;
          }
        }
        op_testing::ExpectClose(c, want, tolerance, "block product");
      }
    }
  }
}

TEST(GemmBlockTest, MatchesAPlainLoop) {
  CheckGemmBlock<float>(1e-6);
  CheckGemmBlock<double>(1e-14);
}

}  // namespace
}  // namespace attune
