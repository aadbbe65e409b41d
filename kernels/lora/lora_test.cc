#include "kernels/lora/lora.h"

#include "kernels/core/op_testing.h"
#include "kernels/lora/gated_lora_backward.h"
#include "kernels/lora/lora_backward.h"
#include "kernels/lora/normed_gradient.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::ExpectClose;
using op_testing::kFloatDTypes;
using op_testing::StatisticsOf;
using op_testing::Tensor;
using op_testing::Tolerance;

// Every element against its definition; what lies between the parts is zero, W and the corner stay.
TEST(LoraExtendTest, PutsBBesideAndABelow) {
  constexpr int64_t kR = 3, kK = 10, kN = 14, kE = 8;
  static_assert(LoraExtension(2, kR) == kE && LoraExtension(3, 16) == 48);
  std::mt19937_64 rng(7);
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    const auto random = [&](std::initializer_list<int64_t> shape) {
      return Tensor(dtype, shape).Random(&rng);
    };
    const Tensor a0 = random({kR, kK}), b0 = random({4, kR}), a1 = random({kR, kK}),
                 b1 = random({6, kR});
    const Tensor w(dtype, {kN + kE, kK + kE}, 5);
    const std::vector<double> before = w.ToVector();
    const LoraExtendPart parts[] = {{a0, b0, 1}, {a1, b1, 8}};
    LoraExtend(CpuExec(), {.parts = parts, .w = w, .scale = 0.5});
    const std::vector<double> got = w.ToVector(), va0 = a0.ToVector(), va1 = a1.ToVector(),
                              vb0 = b0.ToVector(), vb1 = b1.ToVector();
    for (int64_t n = 0; n < kN + kE; ++n) {
      for (int64_t c = 0; c < kK + kE; ++c) {
        const double value = got[n * (kK + kE) + c];
        if ((n < kN) == (c < kK)) {  // W and the corner
          const double old = before[n * (kK + kE) + c];
          EXPECT_TRUE(value == old || (std::isnan(value) && std::isnan(old)));
          continue;
        }
        double want = 0;
        if (c >= kK) {
          const int64_t j = c - kK;
          if (j < kR && n >= 1 && n < 5) want = 0.5 * vb0[(n - 1) * kR + j];
          if (j >= kR && j < 2 * kR && n >= 8) want = 0.5 * vb1[(n - 8) * kR + j - kR];
        } else {
          const int64_t j = n - kN;
          if (j < kR) want = va0[j * kK + c];
          if (j >= kR && j < 2 * kR) want = va1[(j - kR) * kK + c];
        }
        EXPECT_EQ(value, want) << n << ", " << c;
      }
    }
    w.ExpectGuardsIntact();
    // Either of the two alone.
    for (const bool beside : {false, true}) {
      const Tensor one(dtype, {kN + kE, kK + kE});
      LoraExtend(CpuExec(),
                 {.parts = parts, .w = one, .scale = 0.5, .beside = beside, .below = !beside});
      for (int64_t n = 0; n < kN + kE; ++n) {
        for (int64_t c = 0; c < kK + kE; ++c) {
          const double value = one[n * (kK + kE) + c];
          const bool written = beside ? n < kN && c >= kK : n >= kN && c < kK;
          EXPECT_TRUE(written ? value == got[n * (kK + kE) + c] : std::isnan(value));
        }
      }
    }
  }
}

// Two parts with columns before, between and behind them, and ds behind dy in the same rows.
TEST(LoraBackwardTest, IsTheTwoProductsOfEachPart) {
  constexpr int64_t kT = 21, kR = 3, kN = 40, kE = 8, kBegin[] = {1, 20}, kRows[] = {13, 19};
  std::mt19937_64 rng(11);
  for (DType dtype : kFloatDTypes) {
    const auto random = [&](std::initializer_list<int64_t> shape, int64_t padding = 0) {
      return Tensor(dtype, shape, padding).Random(&rng);
    };
    const Tensor rows = random({kT, kN + kE}, 3), s = random({kT, kE}, 5);
    const Tensor b[] = {random({kRows[0], kR}), random({kRows[1], kR})};
    Tensor db[] = {Tensor(StatisticsOf(dtype), {kRows[0], kR}),
                   Tensor(StatisticsOf(dtype), {kRows[1], kR})};
    const std::vector<double> dy = rows.ToVector(), vs = s.ToVector();
    std::vector<double> want_rows = dy, want_db[2];
    for (int p = 0; p < 2; ++p) {
      want_db[p] = db[p].Random(&rng).ToVector();
      for (int64_t t = 0; t < kT; ++t) {
        for (int64_t j = 0; j < kR; ++j) {
          double sum = 0;
          for (int64_t n = 0; n < kRows[p]; ++n) {
            const double d = dy[t * (kN + kE) + kBegin[p] + n];
            sum += d * b[p][n * kR + j];
            want_db[p][n * kR + j] += 0.5 * d * vs[t * kE + p * kR + j];
          }
          want_rows[t * (kN + kE) + kN + p * kR + j] = 2.0 * sum;
        }
      }
    }
    for (int64_t t = 0; t < kT; ++t) {
      for (int64_t j = 2 * kR; j < kE; ++j) want_rows[t * (kN + kE) + kN + j] = 0.0;
    }
    const LoraBackwardPart parts[] = {{b[0], db[0], kBegin[0]}, {b[1], db[1], kBegin[1]}};
    LoraBackwardArgs args{.parts = parts,
                          .dy = rows.view().Slice(1, 0, kN),
                          .s = s,
                          .ds = rows.view().Slice(1, kN, kN + kE),
                          .scale = 2.0,
                          .db_scale = 0.5};
    const Tensor workspace = op_testing::Bytes(LoraBackwardWorkspaceBytes(CpuExec(), args));
    args.workspace = workspace;
    LoraBackward(CpuExec(), args);
    ExpectClose(rows, want_rows, Tolerance(dtype), "ds");
    for (int p = 0; p < 2; ++p) {
      ExpectClose(db[p], want_db[p], Tolerance(StatisticsOf(dtype)), "db");
    }
  }
}

// By the ops that it is made of; h is where dh was.
TEST(GatedLoraBackwardTest, IsGateAdaptersAndTheGradientOfADown) {
  constexpr int64_t kT = 9, kF = 20, kR = 3, kE = 8;
  std::mt19937_64 rng(12);
  for (DType dtype : kFloatDTypes) {
    const DType statistics = StatisticsOf(dtype);
    const auto random = [&](DType of, std::initializer_list<int64_t> shape, int64_t padding = 0) {
      return Tensor(of, shape, padding).Random(&rng);
    };
    Tensor rows = random(dtype, {kT, 2 * kF + kE}, 3), dh = random(dtype, {kT, kF}, 2);
    const Tensor s = random(dtype, {kT, kE}), b_gate = random(dtype, {kF, kR}),
                 b_up = random(dtype, {kF, kR}), down_ds = random(dtype, {kT, kR + 2});
    Tensor db_gate = random(statistics, {kF, kR}), db_up = random(statistics, {kF, kR}),
           down_da = random(statistics, {kR, kF});
    Tensor want_rows = rows, want_dh = dh, want_db_gate = db_gate, want_db_up = db_up;
    const TensorView gate = want_rows.view().Slice(1, 0, kF),
                     up = want_rows.view().Slice(1, kF, 2 * kF);
    GatedActivationBackward(CpuExec(), {.dh = want_dh,
                                        .gate = gate,
                                        .up = up,
                                        .dgate = gate,
                                        .dup = up,
                                        .h = want_dh,
                                        .activation = Activation::kGeluTanh});
    const LoraBackwardPart want_parts[] = {{b_gate, want_db_gate, 0}, {b_up, want_db_up, kF}};
    LoraBackwardArgs lora{.parts = want_parts,
                          .dy = want_rows.view().Slice(1, 0, 2 * kF),
                          .s = s,
                          .ds = want_rows.view().Slice(1, 2 * kF, 2 * kF + kE),
                          .scale = 2.0,
                          .db_scale = 0.5};
    const Tensor lora_workspace = op_testing::Bytes(LoraBackwardWorkspaceBytes(CpuExec(), lora));
    lora.workspace = lora_workspace;
    LoraBackward(CpuExec(), lora);
    std::vector<double> want_da = down_da.ToVector();
    for (int64_t j = 0; j < kR; ++j) {
      for (int64_t n = 0; n < kF; ++n) {
        for (int64_t t = 0; t < kT; ++t) {
          want_da[j * kF + n] += 0.25 * down_ds[t * (kR + 2) + j] * want_dh[t * kF + n];
        }
      }
    }
    const LoraBackwardPart parts[] = {{b_gate, db_gate, 0}, {b_up, db_up, kF}};
    GatedLoraBackwardArgs args{.dh = dh,
                               .activation = Activation::kGeluTanh,
                               .lora = {.parts = parts,
                                        .dy = rows.view().Slice(1, 0, 2 * kF),
                                        .s = s,
                                        .ds = rows.view().Slice(1, 2 * kF, 2 * kF + kE),
                                        .scale = 2.0,
                                        .db_scale = 0.5},
                               .down_ds = down_ds,
                               .down_da = down_da,
                               .down_da_scale = 0.25};
    const Tensor workspace = op_testing::Bytes(GatedLoraBackwardWorkspaceBytes(CpuExec(), args));
    args.workspace = workspace;
    GatedLoraBackward(CpuExec(), args);
    EXPECT_EQ(rows.ToVector(), want_rows.ToVector());
    EXPECT_EQ(db_gate.ToVector(), want_db_gate.ToVector());
    EXPECT_EQ(db_up.ToVector(), want_db_up.ToVector());
    ExpectClose(down_da, want_da, Tolerance(statistics), "da of down");
    rows.ExpectGuardsIntact();
    dh.ExpectGuardsIntact();
  }
}

// Against the sum with the norm's output itself, in double; two rows lie apart.
TEST(NormedGradientTest, IsTheProductWithTheNormsOutput) {
  constexpr int64_t kT = 37, kJ = 6, kC = 21;
  std::mt19937_64 rng(13);
  for (DType dtype : kFloatDTypes) {
    const Tensor ds = Tensor(dtype, {kT, kJ}, 2).Random(&rng), w = Tensor(dtype, {kC}).Random(&rng);
    const Tensor x = Tensor(dtype, {kT, kC}, 3).Random(&rng);
    const Tensor rstd = Tensor(StatisticsOf(dtype), {kT}).Random(&rng);
    const Tensor da = Tensor(StatisticsOf(dtype), {kJ, kC}, 4).Random(&rng);
    std::vector<double> want = da.ToVector();
    for (int64_t j = 0; j < kJ; ++j) {
      for (int64_t c = 0; c < kC; ++c) {
        for (int64_t t = 0; t < kT; ++t) {
          want[j * kC + c] += 0.5 * ds[t * kJ + j] * x[t * kC + c] * rstd[t] * (w[c] + 1.0);
        }
      }
    }
    NormedGradientArgs args{
        .ds = ds, .x = x, .rstd = rstd, .w = w, .da = da, .weight_offset = 1.0, .scale = 0.5};
    const Tensor workspace = op_testing::Bytes(NormedGradientWorkspaceBytes(CpuExec(), args));
    args.workspace = workspace;
    NormedGradient(CpuExec(), args);
    // bf16: rstd o ds is rounded once.
    ExpectClose(da, want, dtype == DType::kBF16 ? 1e-2 : Tolerance(StatisticsOf(dtype)), "da");
    da.ExpectGuardsIntact();
  }
}

}  // namespace
}  // namespace attune
