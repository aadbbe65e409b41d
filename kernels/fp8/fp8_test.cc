#include "kernels/fp8/fp8.h"

#include "kernels/core/op_testing.h"
#include "kernels/matmul/matmul.h"
#include "kernels/nf4/nf4.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

constexpr DType kF8 = DType::kF8E4M3;

// Every code's value by the format's definition, and every float rounds to the nearest of them.
TEST(Fp8Test, RoundsToTheNearestValue) {
  std::vector<float> values;
  for (int code = 0; code < 127; ++code) {
    Float8E4M3 x;
    x.bits = static_cast<uint8_t>(code);
    const int exponent = code >> 3, mantissa = code & 7;
    const double want =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    EXPECT_EQ(static_cast<float>(x), want) << code;
    EXPECT_EQ(Float8E4M3(static_cast<float>(x)).bits, code);
    EXPECT_EQ(Float8E4M3(-static_cast<float>(x)).bits, code | 0x80);
    values.push_back(static_cast<float>(x));
  }
  EXPECT_EQ(values.back(), Float8E4M3::kMax);
  std::mt19937_64 rng(1);
  std::uniform_real_distribution<float> exponents(-12.0f, 9.0f);
  for (int i = 0; i < 20000; ++i) {
    const float v = i % 4 == 0 ? (values[i % 126] + values[i % 126 + 1]) / 2  // ties
                               : std::exp2(exponents(rng));
    const float got = static_cast<float>(Float8E4M3(v));
    for (float other : values) {
      EXPECT_LE(std::fabs(got - v), std::fabs(other - v)) << v;
      if (other != got && std::fabs(got - v) == std::fabs(other - v)) {
        EXPECT_EQ(Float8E4M3(v).bits % 2, 0) << v;
      }
    }
  }
  EXPECT_EQ(static_cast<float>(Float8E4M3(1e6f)), Float8E4M3::kMax);
  EXPECT_EQ(static_cast<float>(Float8E4M3(-HUGE_VALF)), -Float8E4M3::kMax);
  EXPECT_TRUE(std::isnan(static_cast<float>(Float8E4M3(NAN))));
}

Tensor Room(double room) {
  return Tensor(DType::kF32, {1}).Constant(room);
}

// The product of quantised operands is near that of the values: base as near as 8 bits are, the
// adapter's share nearly as near as bf16.
TEST(Fp8Test, OneProductHoldsBaseAndAdapter) {
  constexpr int64_t kM = 33, kK = 48, kN = 40, kR = 5, kE = 2 * kR, kX = Fp8Extension(kE);
  static_assert(kX == 32);
  std::mt19937_64 rng(2);
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (const bool base : {true, false}) {
      const auto random = [&](std::initializer_list<int64_t> shape, double deviation) {
        return Tensor(dtype, shape, 3).Random(&rng, deviation);
      };
      const Tensor x = random({kM, kK + kE}, 3.0);
      Tensor w = random({kN, kK}, 0.02);
      if (!base) {  // only the adapter is left: rows of x keep their scale
        w.Constant(0.0);
        w.Set(0, 0.06);
      }
      const Tensor a0 = Tensor(dtype, {kR, kK}).Random(&rng, 0.1),
                   a1 = Tensor(dtype, {kR, kK}).Random(&rng, 0.1),
                   b0 = Tensor(dtype, {15, kR}).Random(&rng, 0.01),
                   b1 = Tensor(dtype, {20, kR}).Random(&rng, 0.01);
      const Tensor q(kF8, {kM, kK + kX}), q_scale(DType::kF32, {kM});
      const Tensor w8(kF8, {kN, kK + kX}, 16), w8_t(kF8, {kK, kN + kX}, 16);
      Tensor scale(DType::kF32, {kN + kK});
      scale.Constant(0.0);
      const Tensor room = Room(kFp8MostRoom);
      Fp8Quantize(CpuExec(), {.x = x, .e = kE, .room = room, .q = q, .scale = q_scale});
      Fp8WeightScale(CpuExec(), {.w = w, .scale = scale});
      const LoraExtendPart parts[] = {{a0, b0, 2}, {a1, b1, 18}};
      for (const bool transposed : {false, true}) {
        const TensorView& codes = transposed ? w8_t : w8;
        const int64_t columns = transposed ? kN : kK;
        Fp8QuantizeWeight(
            CpuExec(),
            {.w = w, .scale = scale, .q = codes.Slice(1, 0, columns), .transposed = transposed});
        Fp8Extend(CpuExec(), {.parts = parts,
                              .scale = scale,
                              .room = room,
                              .q = codes.Slice(1, columns, columns + kX),
                              .transposed = transposed,
                              .factor = 2.0});
      }
      const Tensor d(DType::kF32, {kM, kN}, 1);
      MatMul(CpuExec(), {.a = q,
                         .b = w8,
                         .d = d,
                         .trans_b = true,
                         .alpha = 0.5,
                         .a_scale = q_scale,
                         .b_scale = scale.view().Slice(0, 0, kN)});
      double error = 0, size = 0;
      for (int64_t m = 0; m < kM; ++m) {
        for (int64_t n = 0; n < kN; ++n) {
          double want = 0;
          for (int64_t k = 0; k < kK; ++k) want += x[m * (kK + kE) + k] * w[n * kK + k];
          for (int64_t j = 0; j < kR; ++j) {
            const double s0 = x[m * (kK + kE) + kK + j], s1 = x[m * (kK + kE) + kK + kR + j];
            if (n >= 2 && n < 17) want += 2 * s0 * b0[(n - 2) * kR + j];
            if (n >= 18 && n < 38) want += 2 * s1 * b1[(n - 18) * kR + j];
          }
          error += std::pow(d[m * kN + n] - 0.5 * want, 2);
          size += std::pow(0.5 * want, 2);
        }
      }
      EXPECT_LT(std::sqrt(error / size), base ? 0.05 : 0.01) << DTypeName(dtype);
      EXPECT_GT(std::sqrt(error / size), base ? 0.01 : 0.0) << DTypeName(dtype);
      // W^T has the codes of W, and A^T its three columns beside it.
      for (int64_t k = 0; k < kK; ++k) {
        for (int64_t n = 0; n < kN; ++n) {
          EXPECT_EQ(w8_t[k * (kN + kX) + n], w8[n * (kK + kX) + k]);
        }
        for (int64_t j = 0; j < kE; ++j) {
          const Tensor& a = j < kR ? a0 : a1;
          const double want = kFp8MostRoom * a[(j % kR) * kK + k] / scale[0];
          const int64_t at = k * (kN + kX) + kN;
          EXPECT_EQ(w8_t[at + j], w8_t[at + kE + j]);
          EXPECT_NEAR(w8_t[at + j] + w8_t[at + 2 * kE + j], want, std::fabs(want) / 200 + 2e-3);
        }
        for (int64_t j = 3 * kE; j < kX; ++j) EXPECT_EQ(w8_t[k * (kN + kX) + kN + j], 0.0);
      }
      for (const Tensor* t : {&q, &w8, &w8_t, &d}) t->ExpectGuardsIntact();
    }
  }
}

// The adapter's codes put beside those of x give the bits of both at once, also where s is so large
// that the row has to be encoded again, and are worth s: nothing saturates.
TEST(Fp8Test, TheAdapterMayComeLater) {
  constexpr int64_t kM = 40, kK = 50, kE = 7, kX = Fp8Extension(kE);
  std::mt19937_64 rng(5);
  for (const auto& [dtype, room_value] :
       {std::pair{DType::kF32, 4.0}, {DType::kBF16, 4.0}, {DType::kF32, 0x1p-9}}) {
    const Tensor room = Room(room_value);
    Tensor x = Tensor(dtype, {kM, kK + kE}, 3).Random(&rng, 2.0);
    for (int64_t m = 0; m < kM; ++m) {  // s from much smaller to much larger than x
      for (int64_t j = 0; j < kE; ++j) {
        const int64_t at = m * (kK + kE) + kK + j;
        x.Set(at, x[at] * std::exp2(static_cast<double>(m - 20)));
      }
    }
    for (int64_t c = 0; c < kK + kE; ++c) x.Set(3 * (kK + kE) + c, 0.0);
    for (int64_t c = 0; c < kK; ++c) x.Set(4 * (kK + kE) + c, 0.0);
    const Tensor want(kF8, {kM, kK + kX}, 4), got(kF8, {kM, kK + kX}, 4);
    const Tensor want_scale(DType::kF32, {kM}), got_scale(DType::kF32, {kM});
    Fp8Quantize(CpuExec(), {.x = x, .e = kE, .room = room, .q = want, .scale = want_scale});
    Fp8Quantize(CpuExec(), Fp8QuantizeOf(x.view().Slice(1, 0, kK), {got, got_scale}));
    const std::vector<double> before = got_scale.ToVector();
    Fp8QuantizeAdapter(CpuExec(), {.x = x, .e = kE, .room = room, .q = got, .scale = got_scale});
    EXPECT_EQ(got.bytes(), want.bytes());
    EXPECT_EQ(got_scale.bytes(), want_scale.bytes());
    int again = 0;
    for (int64_t m = 0; m < kM; ++m) {
      again += got_scale[m] > before[m] ? 1 : 0;
      for (int64_t j = 0; j < kE; ++j) {
        const int64_t at = m * (kK + kX) + kK + j;
        const double s = x[m * (kK + kE) + kK + j];
        const double value = room_value * got_scale[m] * (got[at] + got[at + kE]);
        EXPECT_NEAR(value, s, std::fabs(s) / 200 + got_scale[m] * 4e-3);
        EXPECT_EQ(got[at], got[at + 2 * kE]);
      }
    }
    EXPECT_GT(again, room_value == 4 ? 10 : 20);
    EXPECT_LT(again, room_value == 4 ? 25 : 35);
  }
}

// B and A of any size beside W: as near as always, both ways.
TEST(Fp8Test, AnAdapterLargerThanItsWeightDoesNotSaturate) {
  constexpr int64_t kM = 20, kK = 48, kN = 40, kR = 4, kX = Fp8Extension(kR);
  std::mt19937_64 rng(8);
  for (const double size : {1e-3, 1.0, 1e3, 1e9}) {
    for (const bool transposed : {false, true}) {
      SCOPED_TRACE(std::to_string(size) + (transposed ? ", turned" : ""));
      const int64_t in = transposed ? kN : kK, out = kN + kK - in;
      const Tensor w = Tensor(DType::kF32, {kN, kK}).Random(&rng, 0.02),
                   a = Tensor(DType::kF32, {kR, kK}).Random(&rng, size),
                   b = Tensor(DType::kF32, {kN, kR}).Random(&rng, size),
                   x = Tensor(DType::kF32, {kM, in + kR}).Random(&rng, 1.0);
      Tensor scale(DType::kF32, {kN + kK});
      scale.Constant(0.0);
      Fp8WeightScale(CpuExec(), {.w = w, .scale = scale});
      const Tensor rooms(DType::kF32, {2});
      const LoraExtendPart part = {a, b, 0};
      const Fp8AdapterRoomArgs of_both = {
          .parts = {&part, 1}, .scale = scale, .factor = -3.0, .room = rooms};
      Fp8AdapterRoom(CpuExec(), {&of_both, 1});
      const TensorView room = rooms.view().Slice(0, transposed, transposed + 1);
      EXPECT_EQ(rooms[transposed] == kFp8MostRoom, size < 0.01);
      const Tensor codes(kF8, {out, in + kX}, 16), q(kF8, {kM, in + kX}, 16);
      const Tensor q_scale(DType::kF32, {kM}), d(DType::kF32, {kM, out});
      Fp8QuantizeWeight(
          CpuExec(),
          {.w = w, .scale = scale, .q = codes.view().Slice(1, 0, in), .transposed = transposed});
      Fp8Extend(CpuExec(), {.parts = {&part, 1},
                            .scale = scale,
                            .room = room,
                            .q = codes.view().Slice(1, in, in + kX),
                            .transposed = transposed,
                            .factor = -3.0});
      Fp8Quantize(CpuExec(), {.x = x, .e = kR, .room = room, .q = q, .scale = q_scale});
      MatMul(CpuExec(), {.a = q,
                         .b = codes,
                         .d = d,
                         .trans_b = true,
                         .a_scale = q_scale,
                         .b_scale = scale.view().Slice(0, 0, out)});
      double error = 0, norm = 0;
      for (int64_t m = 0; m < kM; ++m) {
        const int64_t row = m * (in + kR);
        for (int64_t o = 0; o < out; ++o) {
          double want = 0;
          for (int64_t i = 0; i < in; ++i) {
            want += x[row + i] * w[transposed ? i * kK + o : o * kK + i];
          }
          for (int64_t j = 0; j < kR; ++j) {
            want += x[row + in + j] * (transposed ? a[j * kK + o] : -3.0 * b[o * kR + j]);
          }
          error += std::pow(d[m * out + o] - want, 2);
          norm += std::pow(want, 2);
        }
      }
      EXPECT_LT(std::sqrt(error / norm), size < 0.01 ? 0.05 : 0.01);
    }
  }
}

// Of NF4 the same codes as of its values, both ways, whatever the shape.
TEST(Fp8Test, CodesOfNf4AreThoseOfItsValues) {
  std::mt19937_64 rng(3);
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{24, 64}, {7, 50}, {5, 200}}) {
    const int64_t blocks = Nf4Blocks(N * K);
    const Tensor w = Tensor(DType::kF32, {N, K}).Random(&rng, 0.02);
    const Tensor packed(DType::kU8, {Nf4PackedBytes(N * K)}), absmax(DType::kF32, {blocks}),
        values(DType::kF32, {N, K}), codes(DType::kU8, {blocks}),
        absmax2(DType::kF32, {Nf4Groups(blocks)}), offset(DType::kF32, {1});
    Nf4Quantize(CpuExec(), {.w = w, .packed = packed, .absmax = absmax});
    Nf4DoubleQuantize(CpuExec(),
                      {.absmax = absmax, .codes = codes, .absmax2 = absmax2, .offset = offset});
    Nf4Dequantize(
        CpuExec(),
        {.packed = packed, .codes = codes, .absmax2 = absmax2, .offset = offset, .out = values});
    Tensor scale(DType::kF32, {1});
    scale.Constant(0.0);
    Fp8WeightScale(CpuExec(), {.w = values, .scale = scale});
    for (const bool transposed : {false, true}) {
      const int64_t rows = transposed ? K : N, columns = transposed ? N : K;
      const Tensor want(kF8, {rows, columns}), got(kF8, {rows, columns}, 5);
      Fp8QuantizeWeight(CpuExec(),
                        {.w = values, .scale = scale, .q = want, .transposed = transposed});
      Nf4ToFp8(CpuExec(), {.packed = packed,
                           .codes = codes,
                           .absmax2 = absmax2,
                           .offset = offset,
                           .scale = scale,
                           .q = got,
                           .transposed = transposed});
      EXPECT_EQ(got.ToVector(), want.ToVector()) << N << " x " << K;
      got.ExpectGuardsIntact();
    }
  }
}

// Rows of zeros give zeros; NaN stays NaN.
TEST(Fp8Test, RowsOfZerosAndNaN) {
  Tensor x(DType::kF32, {3, 16});
  x.Constant(0.0);
  for (int64_t c = 0; c < 16; ++c) x.Set(16 + c, c == 3 ? NAN : 1.0);
  x.Set(32, -5.0);
  const Tensor q(kF8, {3, 16}), scale(DType::kF32, {3});
  Fp8Quantize(CpuExec(), {.x = x, .q = q, .scale = scale});
  EXPECT_EQ(scale[0], 0.0);
  for (int64_t c = 0; c < 16; ++c) EXPECT_EQ(q[c], 0.0);
  EXPECT_TRUE(std::isnan(q[16 + 3]));
  EXPECT_NEAR(q[16] * scale[1], 1.0, 1e-6);
  EXPECT_EQ(q[32], -448.0);
}

}  // namespace
}  // namespace attune
