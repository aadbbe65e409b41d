// MatMul against a plain loop in double: every transposition, dtype and odd shape, strided rows,
// both the library and our own loop.
#include "kernels/matmul/matmul.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::Tensor;

struct Case {
  int64_t m, n, k;
  bool trans_a, trans_b;
  double alpha, beta;
};

std::vector<double> Reference(const Case& c, const Tensor& a, const Tensor& b, const Tensor& d) {
  std::vector<double> out(c.m * c.n);
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0.0;
      for (int64_t p = 0; p < c.k; ++p) {
        sum += a[c.trans_a ? p * c.m + i : i * c.k + p] * b[c.trans_b ? j * c.k + p : p * c.n + j];
      }
      out[i * c.n + j] = c.alpha * sum + (c.beta != 0.0 ? d[i * c.n + j] : 0.0);
    }
  }
  return out;
}

void RunMatMul(const MatMulArgs& args_in) {
  MatMulArgs args = args_in;
  MatMulArgs planned = args;
  for (TensorView* x : {&planned.a, &planned.b, &planned.d}) *x = op_testing::Planned(*x);
  const int64_t bytes = MatMulWorkspaceBytes(op_testing::PlanExec(), planned);
  EXPECT_EQ(bytes, MatMulWorkspaceBytes(op_testing::CpuExec(), args));
  const Tensor workspace = op_testing::Bytes(bytes);
  args.workspace = planned.workspace = workspace;
  MatMul(op_testing::PlanExec(), planned);
  MatMul(op_testing::CpuExec(), args);
  workspace.ExpectGuardsIntact();
}

void CheckCase(const Case& c, DType in, DType out, bool strided, std::mt19937_64* rng) {
  SCOPED_TRACE(testing::Message() << DTypeName(in) << "->" << DTypeName(out) << " " << c.m << "x"
                                  << c.n << "x" << c.k << " trans " << c.trans_a << c.trans_b
                                  << " alpha " << c.alpha << " beta " << c.beta);
  Tensor a(in, {c.trans_a ? c.k : c.m, c.trans_a ? c.m : c.k}, strided ? 5 : 0);
  Tensor b(in, {c.trans_b ? c.n : c.k, c.trans_b ? c.k : c.n}, strided ? 3 : 0);
  Tensor d(out, {c.m, c.n}, strided ? 7 : 0);
  a.Random(rng), b.Random(rng);
  if (c.beta != 0.0) d.Random(rng);
  const std::vector<double> want = Reference(c, a, b, d);
  RunMatMul({.a = a,
             .b = b,
             .d = d,
             .trans_a = c.trans_a,
             .trans_b = c.trans_b,
             .alpha = c.alpha,
             .beta = c.beta});
  // bf16 outputs are rounded once: half a unit in the last place of the largest element.
  const double tolerance = out == DType::kF64 ? 1e-13 : out == DType::kF32 ? 3e-6 : 4e-3;
  op_testing::ExpectClose(d, want, tolerance, "product");
}

void CheckAll() {
  std::mt19937_64 rng(1);
  const std::pair<DType, DType> dtypes[] = {{DType::kF64, DType::kF64},
                                            {DType::kF32, DType::kF32},
                                            {DType::kBF16, DType::kBF16},
                                            {DType::kBF16, DType::kF32}};
  const int64_t shapes[][3] = {{1, 1, 1},     {1, 41, 7},   {41, 1, 13},   {5, 3, 1},
                               {49, 65, 129}, {7, 130, 40}, {100, 33, 257}};
  for (const auto& [in, out] : dtypes) {
    for (const auto& s : shapes) {
      for (int flags = 0; flags < 4; ++flags) {
        const bool trans_a = flags & 1, trans_b = flags & 2;
        CheckCase({s[0], s[1], s[2], trans_a, trans_b, 1.0, 0.0}, in, out, false, &rng);
        CheckCase({s[0], s[1], s[2], trans_a, trans_b, 0.5, 1.0}, in, out, true, &rng);
      }
    }
  }
}

class PlainGuard {
 public:
  PlainGuard() { SetCpuMatMulPlain(true); }
  ~PlainGuard() { SetCpuMatMulPlain(false); }
};

TEST(MatMulTest, MatchesReference) {
  CheckAll();
}

TEST(MatMulTest, PlainLoopMatchesReference) {
  const PlainGuard plain;
  CheckAll();
}

TEST(MatMulTest, EmptyExtents) {
  std::mt19937_64 rng(2);
  for (DType dtype : op_testing::kFloatDTypes) {
    for (double beta : {0.0, 1.0}) {
      CheckCase({3, 5, 0, false, false, 1.0, beta}, dtype, dtype, true, &rng);
      CheckCase({0, 5, 4, false, true, 1.0, beta}, dtype, dtype, false, &rng);
      CheckCase({3, 0, 4, true, false, 1.0, beta}, dtype, dtype, false, &rng);
    }
  }
}

TEST(MatMulTest, PlainLoopIsTheSameOnAnyThreadCount) {
  const PlainGuard plain;
  std::mt19937_64 rng(3);
  Tensor a(DType::kF32, {150, 300}), b(DType::kF32, {200, 300}), d(DType::kF32, {150, 200});
  a.Random(&rng), b.Random(&rng);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    d.Poison();
    RunMatMul({.a = a, .b = b, .d = d, .trans_b = true});
    return d.bytes();
  });
}

// d = a slice of columns, as the fused q, k, v product of a shard writes it.
TEST(MatMulTest, WritesIntoAColumnSlice) {
  std::mt19937_64 rng(4);
  Tensor a(DType::kF32, {6, 10}), b(DType::kF32, {10, 4}), wide(DType::kF32, {6, 12});
  a.Random(&rng), b.Random(&rng), wide.Constant(-1.0);
  const TensorView d = wide.view().Slice(1, 3, 7);
  RunMatMul({.a = a, .b = b, .d = d});
  const std::vector<double> want = Reference({6, 4, 10, false, false, 1.0, 0.0}, a, b, wide);
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t j = 0; j < 12; ++j) {
      const bool inside = j >= 3 && j < 7;
      EXPECT_NEAR(wide[i * 12 + j], inside ? want[i * 4 + j - 3] : -1.0, 1e-5);
    }
  }
}

TEST(MatMulDeathTest, RefusesShapesThatDoNotMatch) {
  const Tensor a(DType::kF32, {3, 4}), b(DType::kF32, {5, 6}), d(DType::kF32, {3, 6});
  EXPECT_DEATH(MatMul(op_testing::PlanExec(), {.a = a, .b = b, .d = d}), "CHECK failed");
}

}  // namespace
}  // namespace attune
