// Rope against the rotation written out in double; the inverse is the transpose.
#include "kernels/rope/rope.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

constexpr int64_t kRopeTokens = 6, kRopeHeads = 3, kRopeD = 40;

struct RopeTables {
  Tensor positions = op_testing::Ints({0, 1, 2, 0, 131071, 7});
  Tensor inv_freq, cos, sin;
  RopeTables(DType dtype, int64_t rotary_dim, double scaling)
      : inv_freq(DType::kF32, {rotary_dim / 2}),
        cos(dtype, {kRopeTokens, rotary_dim / 2}),
        sin(dtype, {kRopeTokens, rotary_dim / 2}) {
    for (int64_t i = 0; i < rotary_dim / 2; ++i) {
      inv_freq.Set(
          i, std::pow(500000.0, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim)));
    }
    RopeTable(CpuExec(), {.positions = positions,
                          .inv_freq = inv_freq,
                          .cos = cos,
                          .sin = sin,
                          .attention_scaling = scaling});
  }
};

TEST(RopeTableTest, AnglesAreSinglePrecisionProducts) {
  for (DType dtype : {DType::kF32, DType::kF64}) {
    const RopeTables tables(dtype, 40, 1.25);
    std::vector<double> cos, sin;
    for (int64_t t = 0; t < kRopeTokens; ++t) {
      for (int64_t i = 0; i < 20; ++i) {
        const float angle =
            static_cast<float>(tables.positions[t]) * static_cast<float>(tables.inv_freq[i]);
        cos.push_back(std::cos(static_cast<double>(angle)) * 1.25);
        sin.push_back(std::sin(static_cast<double>(angle)) * 1.25);
      }
    }
    op_testing::ExpectClose(tables.cos, cos, dtype == DType::kF64 ? 1e-15 : 1e-7, "cos");
    op_testing::ExpectClose(tables.sin, sin, dtype == DType::kF64 ? 1e-15 : 1e-7, "sin");
  }
}

TEST(RopeTest, RotatesStridedHeads) {
  for (DType dtype : op_testing::kFloatDTypes) {
    for (int64_t rotary_dim : {kRopeD, int64_t{16}}) {
      const DType table = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
      const RopeTables tables(table, rotary_dim, 0.8);
      const int64_t half = rotary_dim / 2;
      std::mt19937_64 rng(1);
      // Heads 1..2 of three in a fused row with more after it.
      Tensor fused(dtype, {kRopeTokens, kRopeHeads + 1, kRopeD}, 5);
      fused.Random(&rng);
      std::vector<double> want = fused.ToVector();
      for (int64_t t = 0; t < kRopeTokens; ++t) {
        for (int64_t h = 1; h < kRopeHeads; ++h) {
          double* x = want.data() + (t * (kRopeHeads + 1) + h) * kRopeD;
          for (int64_t i = 0; i < half; ++i) {
            const double c = tables.cos[t * half + i], s = tables.sin[t * half + i];
            const double first = x[i], second = x[half + i];
            x[i] = first * c - second * s;
            x[half + i] = second * c + first * s;
          }
        }
      }
      const RopeHeads heads[] = {{.x = fused.view().Slice(1, 1, kRopeHeads)}};
      Rope(CpuExec(),
           {.heads = heads, .cos = tables.cos, .sin = tables.sin, .rotary_dim = rotary_dim});
      op_testing::ExpectClose(fused, want, op_testing::Tolerance(dtype), "x");
    }
  }
}

// q in place, k to a buffer of its own, v only copied; the same as one after the other.
TEST(RopeTest, MovesSeveralAtOnce) {
  for (DType dtype : op_testing::kFloatDTypes) {
    const RopeTables tables(op_testing::StatisticsOf(dtype), 16, 1.0);
    std::mt19937_64 rng(4);
    Tensor q(dtype, {kRopeTokens, 4, kRopeD}, 3), k(dtype, {kRopeTokens, 2, kRopeD}), v = k;
    q.Random(&rng), k.Random(&rng), v.Random(&rng);
    Tensor want_q = q, want_k = k;
    for (Tensor* x : {&want_q, &want_k}) {
      const RopeHeads heads[] = {{.x = *x}};
      Rope(CpuExec(), {.heads = heads, .cos = tables.cos, .sin = tables.sin, .rotary_dim = 16});
    }
    const Tensor to_k(dtype, {kRopeTokens, 2, kRopeD}, 5), to_v(dtype, {kRopeTokens, 2, kRopeD});
    const std::vector<double> before = k.ToVector();
    const RopeHeads heads[] = {{.x = q}, {k, to_k}, {v, to_v, /*turned=*/false}};
    Rope(CpuExec(), {.heads = heads, .cos = tables.cos, .sin = tables.sin, .rotary_dim = 16});
    EXPECT_TRUE(q.bytes() == want_q.bytes());
    EXPECT_EQ(to_k.ToVector(), want_k.ToVector());
    EXPECT_EQ(to_v.ToVector(), v.ToVector());
    EXPECT_EQ(k.ToVector(), before);
    to_k.ExpectGuardsIntact();
  }
}

TEST(RopeTest, InverseIsTheBackward) {
  const RopeTables tables(DType::kF64, kRopeD, 0.8);
  std::mt19937_64 rng(2);
  Tensor x(DType::kF64, {kRopeTokens, kRopeHeads, kRopeD}), dy = x;
  x.Random(&rng), dy.Random(&rng);
  const auto loss = [&] {
    Tensor y = x;
    const RopeHeads heads[] = {{.x = y}};
    Rope(CpuExec(), {.heads = heads, .cos = tables.cos, .sin = tables.sin, .rotary_dim = kRopeD});
    return op_testing::Dot(y, dy);
  };
  const std::vector<double> want = op_testing::FiniteDifferences(&x, loss);
  const RopeHeads heads[] = {{.x = dy}};
  Rope(CpuExec(), {.heads = heads,
                   .cos = tables.cos,
                   .sin = tables.sin,
                   .rotary_dim = kRopeD,
                   .inverse = true});
  op_testing::ExpectClose(dy, want, 1e-8, "dx");
}

TEST(RopeTest, SameOnAnyThreadCount) {
  const RopeTables tables(DType::kF32, kRopeD, 1.0);
  std::mt19937_64 rng(3);
  Tensor x(DType::kF32, {kRopeTokens, kRopeHeads, kRopeD});
  x.Random(&rng);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    Tensor y = x;
    const RopeHeads heads[] = {{.x = y}};
    Rope(CpuExec(), {.heads = heads, .cos = tables.cos, .sin = tables.sin, .rotary_dim = kRopeD});
    return y.bytes();
  });
}

}  // namespace
}  // namespace attune
