#include "kernels/elementwise/elementwise.h"

#include <cstring>

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

// Through the types' own conversions.
double Rounded(DType dtype, double value) {
  Tensor x(dtype, {1});
  x.Set(0, value);
  return x[0];
}

TEST(FillTest, WritesTheViewOnly) {
  for (DType dtype :
       {DType::kF64, DType::kF32, DType::kBF16, DType::kI64, DType::kI32, DType::kU8}) {
    const Tensor x(dtype, {5, 41}, 3), contiguous(dtype, {3, 5, 7});
    Fill(CpuExec(), {.x = x, .value = 7.0});
    Fill(CpuExec(), {.x = contiguous, .value = 7.0});
    EXPECT_EQ(x.ToVector(), std::vector<double>(x.size(), 7.0));
    EXPECT_EQ(contiguous.ToVector(), std::vector<double>(contiguous.size(), 7.0));
    x.ExpectGuardsIntact();
  }
}

TEST(CopyTest, ConvertsBetweenFloats) {
  std::mt19937_64 rng(1);
  for (DType from : op_testing::kFloatDTypes) {
    for (DType to : op_testing::kFloatDTypes) {
      for (int64_t padding : {0, 3}) {
        Tensor x(from, {7, 41}, padding), y(to, {7, 41}, 2 * padding);
        x.Random(&rng);
        Copy(CpuExec(), {.x = x, .y = y});
        for (int64_t i = 0; i < x.size(); ++i) EXPECT_EQ(y[i], Rounded(to, x[i]));
        y.ExpectGuardsIntact();
      }
    }
  }
}

TEST(CopyTest, LongContiguousRuns) {
  std::mt19937_64 rng(2);
  Tensor x(DType::kF32, {40001}), y(DType::kBF16, {40001});
  x.Random(&rng);
  Copy(CpuExec(), {.x = x, .y = y});
  for (int64_t i = 0; i < x.size(); ++i) EXPECT_EQ(y[i], Rounded(DType::kBF16, x[i]));
}

TEST(CopyTest, KeepsBitsOfTheSameDType) {
  Tensor x(DType::kF32, {3, 4}, 1), y(DType::kF32, {3, 4});
  const uint32_t signaling_nan = 0x7f800001u;
  for (int64_t i = 0; i < 12; ++i) x.Set(i, static_cast<double>(i));
  std::memcpy(x.view().data, &signaling_nan, 4);
  Copy(CpuExec(), {.x = x, .y = y});
  EXPECT_EQ(std::memcmp(y.view().data, &signaling_nan, 4), 0);
  EXPECT_EQ(y[11], 11.0);
}

TEST(CopyTest, ReadsHalfPrecision) {
  const uint16_t bits[4] = {0x3c00, 0xc248, 0x0001, 0x7c00};
  const TensorView x(const_cast<uint16_t*>(bits), DType::kF16, {4});
  const Tensor y(DType::kF32, {4});
  Copy(CpuExec(), {.x = x, .y = y});
  EXPECT_EQ(y.ToVector(), (std::vector<double>{1.0, -3.140625, std::pow(2.0, -24), INFINITY}));
}

TEST(AddTest, AccumulatesAcrossDTypes) {
  std::mt19937_64 rng(3);
  for (DType from : op_testing::kFloatDTypes) {
    for (DType to : op_testing::kFloatDTypes) {
      Tensor x(from, {7, 41}, 1), y(to, {7, 41}, 2);
      x.Random(&rng), y.Random(&rng);
      std::vector<double> want;
      for (int64_t i = 0; i < x.size(); ++i) want.push_back(y[i] - 0.75 * x[i]);
      Add(CpuExec(), {.x = x, .y = y, .alpha = -0.75});
      op_testing::ExpectClose(y, want, op_testing::Tolerance(to), "y");
    }
  }
}

TEST(ScaleTest, HostAndDeviceFactors) {
  std::mt19937_64 rng(4);
  for (DType dtype : op_testing::kFloatDTypes) {
    Tensor x(dtype, {7, 41}, 1), factor(DType::kF32, {1});
    x.Random(&rng), factor.Constant(0.5);
    std::vector<double> want;
    for (int64_t i = 0; i < x.size(); ++i) want.push_back(x[i] * 1.5);
    Scale(CpuExec(), {.x = x, .alpha_device = factor, .alpha = 3.0});
    op_testing::ExpectClose(x, want, op_testing::Tolerance(dtype), "x");
  }
}

TEST(AddTest, AddsARowToEveryRow) {
  std::mt19937_64 rng(7);
  for (DType from : op_testing::kFloatDTypes) {
    for (DType to : op_testing::kFloatDTypes) {
      for (int64_t padding : {0, 3}) {
        Tensor row(from, {41}), y(to, {7, 41}, padding);
        row.Random(&rng), y.Random(&rng);
        std::vector<double> want;
        for (int64_t i = 0; i < y.size(); ++i) want.push_back(y[i] + 0.5 * row[i % 41]);
        Add(CpuExec(), {.x = row, .y = y, .alpha = 0.5});
        const bool both = from == DType::kF64 && to == DType::kF64;
        op_testing::ExpectClose(y, want, both ? 1e-14 : to == DType::kBF16 ? 1e-2 : 1e-6, "y");
        y.ExpectGuardsIntact();
      }
    }
  }
}

TEST(SoftCapTest, MatchesReference) {
  std::mt19937_64 rng(8);
  for (DType dtype : op_testing::kFloatDTypes) {
    Tensor x(dtype, {7, 41}, 1);
    x.Random(&rng, 20.0), x.Set(3, 1e4), x.Set(4, -1e4);
    std::vector<double> want;
    for (int64_t i = 0; i < x.size(); ++i) want.push_back(30.0 * std::tanh(x[i] / 30.0));
    SoftCap(CpuExec(), {.x = x, .cap = 30.0});
    op_testing::ExpectClose(x, want, op_testing::Tolerance(dtype), "x");
    x.ExpectGuardsIntact();
  }
}

TEST(SumToScalarTest, SumsAndAccumulates) {
  std::mt19937_64 rng(5);
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kU8}) {
    for (DType out_dtype : {DType::kF32, DType::kF64}) {
      Tensor x(dtype, {5, 5000}, 3), out(out_dtype, {1});
      double want = 0.0;
      for (int64_t i = 0; i < x.size(); ++i) {
        x.Set(i, static_cast<double>(rng() % 100));
        want += x[i];
      }
      SumToScalar(CpuExec(), {.x = x, .out = out});
      EXPECT_EQ(out[0], Rounded(out_dtype, want));
      SumToScalar(CpuExec(), {.x = x, .out = out, .accumulate = true});
      EXPECT_EQ(out[0], Rounded(out_dtype, 2.0 * want));
    }
  }
  const Tensor empty(DType::kF32, {0}), out(DType::kF32, {1});
  SumToScalar(CpuExec(), {.x = empty, .out = out});
  EXPECT_EQ(out[0], 0.0);
}

TEST(ElementwiseThreadsTest, SameOnAnyThreadCount) {
  std::mt19937_64 rng(6);
  Tensor x(DType::kF32, {100003}), sum(DType::kF32, {1});
  x.Random(&rng);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    Tensor y = x;
    Add(CpuExec(), {.x = x, .y = y, .alpha = 0.3});
    SumToScalar(CpuExec(), {.x = y, .out = sum});
    std::vector<uint8_t> all = y.bytes();
    all.insert(all.end(), sum.bytes().begin(), sum.bytes().end());
    return all;
  });
}

TEST(ElementwiseDeathTest, RefusesIntegerArithmetic) {
  const Tensor x(DType::kI32, {3}), y(DType::kF32, {3});
  EXPECT_DEATH(Copy(CpuExec(), {.x = x, .y = y}), "CHECK failed");
  EXPECT_DEATH(Scale(CpuExec(), {.x = x}), "CHECK failed");
}

}  // namespace
}  // namespace attune
