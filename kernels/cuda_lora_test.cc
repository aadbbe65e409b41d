// The ops of adapters on CUDA against the CPU's. Skipped, saying so, where there is no GPU.
#include "kernels/core/op_testing_cuda.h"
#include "kernels/lora/gated_lora_backward.h"
#include "kernels/lora/gated_lora_forward.h"
#include "kernels/lora/lora.h"
#include "kernels/lora/lora_backward.h"
#include "kernels/lora/normed_gradient.h"

namespace attune {
namespace {

using namespace op_testing;  // NOLINT: the scaffolding of this file

class CudaLora : public CudaOps {};

TEST_F(CudaLora, LoraExtend) {
  for (DType dtype : kDTypes) {
    for (int64_t r : {3, 16}) {
      for (int which = 0; which < 3; ++which) {
        const int64_t K = 40, N = 50, E = LoraExtension(2, r);
        ExpectGpuAsCpu("lora",
                       {{Random(dtype, {r, K})},
                        {Random(dtype, {20, r})},
                        {Random(dtype, {r, K})},
                        {Random(dtype, {25, r})},
                        {Tensor(dtype, {N + E, K + E}, which == 0 ? 4 : 8)}},
                       [&](const Exec& exec, const Views& v, Scratch&) {
                         const LoraExtendPart parts[] = {{v[0], v[1], 2}, {v[2], v[3], 23}};
                         LoraExtend(exec, {.parts = parts,
                                           .w = v[4],
                                           .scale = 0.25,
                                           .beside = which != 1,
                                           .below = which != 2});
                       });
      }
    }
  }
}

// More at once than one launch takes, in sizes that differ; in packs of 16 bytes and not.
TEST_F(CudaLora, LoraExtendAll) {
  constexpr int64_t kMany = 130;
  for (DType dtype : kDTypes) {
    for (int64_t r : {3, 16}) {
      const int64_t E = LoraExtension(1, r);
      std::vector<Operand> operands;
      for (int64_t i = 0; i < kMany; ++i) {
        const int64_t K = 8 + 8 * (i % 7), N = 5 + i % 40;
        operands.push_back({Random(dtype, {r, K})});
        operands.push_back({Random(dtype, {N, r})});
        operands.push_back({Tensor(dtype, {N + E, K + E}, 8)});
      }
      ExpectGpuAsCpu("many, rank " + std::to_string(r) + ", " + DTypeName(dtype), operands,
                     [&](const Exec& exec, const Views& v, Scratch&) {
                       std::vector<LoraExtendPart> parts;
                       for (int64_t i = 0; i < kMany; ++i) {
                         parts.push_back({v[3 * i], v[3 * i + 1]});
                       }
                       std::vector<LoraExtendArgs> all;
                       for (int64_t i = 0; i < kMany; ++i) {
                         all.push_back({.parts = {&parts[i], 1},
                                        .w = v[3 * i + 2],
                                        .scale = 0.5 + static_cast<double>(i),
                                        .beside = i % 3 != 1,
                                        .below = i % 3 != 2});
                       }
                       LoraExtendAll(exec, {.all = all});
                     });
    }
  }
}

// Parts of a row of dy with a gap before each, ds behind them; what the one pass takes (columns and
// ranks in multiples of 8, ends of strips and tiles, two lots of rows) and what it leaves to the
// products.
TEST_F(CudaLora, LoraBackward) {
  struct Case {
    int64_t T, r, gap, padding;
    std::vector<int64_t> rows;  // of the parts
  };
  for (const Case& c :
       {Case{64, 16, 0, 0, {1024}}, Case{1, 16, 8, 0, {40}}, Case{33, 1, 16, 8, {1000, 77}},
        Case{47, 24, 16, 8, {1000, 72}}, Case{150, 3, 8, 0, {2048, 1024, 1024}},
        Case{500, 8, 0, 8, {3000}}, Case{257, 16, 8, 0, {1416, 1416}},
        Case{2049, 16, 0, 0, {4096, 1024, 1024}}, Case{100, 17, 8, 0, {519, 8}},
        Case{100, 16, 8, 0, {519, 8}}, Case{301, 32, 0, 8, {1032, 504}},
        Case{77, 48, 8, 0, {264, 2000}}, Case{130, 64, 0, 0, {1000, 16, 256, 24}},
        Case{400000, 16, 0, 0, {8}}, Case{20, 65, 0, 0, {96}}, Case{20, 16, 3, 0, {96, 40}},
        Case{20, 16, 0, 3, {96}}}) {
    for (DType dtype : kDTypes) {
      if (dtype == DType::kF32 && c.T > 300) continue;
      const int64_t parts = static_cast<int64_t>(c.rows.size());
      const int64_t E = LoraExtension(parts, c.r);
      int64_t N = 0;
      std::vector<int64_t> begin;
      for (int64_t rows : c.rows) {
        begin.push_back(N + c.gap);
        N += c.gap + (rows + 7) / 8 * 8;
      }
      std::vector<Operand> operands{{Random(dtype, {c.T, N + E}, c.padding), Loose(dtype)},
                                    {Random(dtype, {c.T, E}, 8)}};
      for (int64_t rows : c.rows) {
        operands.push_back({Random(dtype, {rows, c.r}, 0, 0.1)});
        operands.push_back({Random(DType::kF32, {rows, c.r}), 2e-5});
      }
      ExpectGpuAsCpu("lora backward of " + std::to_string(c.T) + " rows, rank " +
                         std::to_string(c.r) + ", " + std::to_string(parts) + " parts, " +
                         DTypeName(dtype),
                     operands, [&](const Exec& exec, const Views& v, Scratch& scratch) {
                       std::vector<LoraBackwardPart> views;
                       for (int64_t i = 0; i < parts; ++i) {
                         views.push_back({v[2 + 2 * i], v[3 + 2 * i], begin[i]});
                       }
                       LoraBackwardArgs args{.parts = views,
                                             .dy = v[0].Slice(1, 0, N),
                                             .s = v[1],
                                             .ds = v[0].Slice(1, N, N + E),
                                             .scale = 0.7,
                                             .db_scale = 1.3};
                       args.workspace = scratch(LoraBackwardWorkspaceBytes(exec, args));
                       LoraBackward(exec, args);
                     });
    }
  }
}

// What the one pass takes (ends of strips and tiles, one block and many, both widths of ranks,
// every activation) and what it leaves to the ops that it is made of; in bf16 the rows have those
// ops' bits either way.
TEST_F(CudaLora, GatedLoraBackward) {
  struct Case {
    int64_t T, F, r, padding;
    Activation activation = Activation::kSilu;
    bool fp8 = false;
  };
  for (const Case& c :
       {Case{64, 512, 16, 0}, Case{1, 16, 8, 8}, Case{33, 1040, 16, 8, Activation::kGeluTanh},
        Case{47, 528, 24, 8, Activation::kGeluErf}, Case{500, 1536, 8, 0, Activation::kSilu, true},
        Case{257, 4096, 16, 8}, Case{2049, 2064, 16, 0}, Case{301, 784, 32, 16},
        Case{5000, 128, 32, 0}, Case{100, 24, 16, 8}, Case{20, 96, 12, 0}, Case{20, 96, 40, 0},
        Case{20, 96, 16, 3}, Case{130, 1024, 16, 0, Activation::kSilu, true},
        // Around a tile's 64 rows, a panel's 64 columns and a strip's 512 or 384.
        Case{63, 496, 16, 0}, Case{65, 576, 8, 8}, Case{128, 384, 32, 0},
        Case{129, 400, 24, 8, Activation::kGeluTanh}, Case{191, 368, 32, 8},
        // Blocks with two strips, which begin in the middle of one, and with some tiles of one.
        Case{10, 70000, 8, 0}, Case{5, 60000, 32, 0}, Case{2049, 2000, 32, 0},
        Case{26000, 80, 16, 0}, Case{26000, 144, 32, 0}}) {
    for (DType dtype : kDTypes) {
      if (dtype == DType::kF32 && (c.T > 300 || c.F > 5000)) continue;
      const int64_t E = LoraExtension(2, c.r), F = c.F;
      const double loose = Loose(dtype);
      const Operand rows = {Random(dtype, {c.T, 2 * F + E}, c.padding), loose};
      const Operand dh = {Random(dtype, {c.T, F}, c.padding), HUGE_VAL};
      std::vector<Operand> operands = {rows,
                                       dh,
                                       {Random(dtype, {c.T, E}, 8)},
                                       {Random(dtype, {F, c.r}, 0, 0.1)},
                                       {Random(DType::kF32, {F, c.r}), loose},
                                       {Random(dtype, {F, c.r}, 0, 0.1)},
                                       {Random(DType::kF32, {F, c.r}), loose},
                                       {Random(dtype, {c.T, c.r + 8}, 8)},
                                       {Random(DType::kF32, {c.r, F}), loose},
                                       {Tensor(DType::kF8E4M3, {c.T, 2 * F}, 16), HUGE_VAL},
                                       {Tensor(DType::kF32, {c.T}), HUGE_VAL},
                                       rows,
                                       dh};
      const std::string name = "gated lora backward of " + std::to_string(c.T) + " x " +
                               std::to_string(F) + ", rank " + std::to_string(c.r) + ", " +
                               DTypeName(dtype);
      const auto call = [&](const Exec& exec, const Views& v, Scratch& scratch) {
        const LoraBackwardPart parts[] = {{v[3], v[4], 0}, {v[5], v[6], F}};
        GatedLoraBackwardArgs args{.dh = v[1],
                                   .activation = c.activation,
                                   .lora = {.parts = parts,
                                            .dy = v[0].Slice(1, 0, 2 * F),
                                            .s = v[2],
                                            .ds = v[0].Slice(1, 2 * F, 2 * F + E),
                                            .scale = 0.7,
                                            .db_scale = 1.3},
                                   .down_ds = v[7],
                                   .down_da = v[8],
                                   .down_da_scale = 0.9};
        if (c.fp8) args.fp8 = {v[9], v[10]};
        args.workspace = scratch(GatedLoraBackwardWorkspaceBytes(exec, args));
        GatedLoraBackward(exec, args);
        const TensorView gate = v[11].Slice(1, 0, F), up = v[11].Slice(1, F, 2 * F);
        GatedActivationBackward(exec, {.dh = v[12],
                                       .gate = gate,
                                       .up = up,
                                       .dgate = gate,
                                       .dup = up,
                                       .activation = c.activation});
      };
      ExpectGpuAsCpu(name, operands, call);
      const std::vector<Tensor> got = RunOnGpu(operands, call);
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t n = 0; n < 2 * F; ++n) {
          const int64_t i = t * (2 * F + E) + n;
          ASSERT_EQ(got[0][i], got[11][i]) << name << ", row " << t << ", column " << n;
        }
      }
      if (!c.fp8) continue;
      // The codes are those of the rows.
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t n = 0; n < 2 * F; ++n) {
          const double value = got[0][t * (2 * F + E) + n], scale = got[10][t];
          EXPECT_LE(std::abs(got[9][t * 2 * F + n] * scale - value),
                    std::max(std::abs(value) / 16, scale / 512) * 1.0001)
              << name << ", row " << t << ", column " << n;
        }
      }
    }
  }
}

// The same, forward; h may take the place of gate.
TEST_F(CudaLora, GatedLoraForward) {
  struct Case {
    int64_t T, F, r, padding;
    Activation activation = Activation::kSilu;
    bool in_place = false;
  };
  for (const Case& c :
       {Case{64, 512, 16, 0}, Case{1, 16, 8, 8}, Case{33, 1040, 16, 8, Activation::kGeluTanh},
        Case{47, 528, 24, 8, Activation::kGeluErf, true}, Case{500, 1536, 8, 0},
        Case{257, 4096, 16, 8, Activation::kSilu, true}, Case{2049, 2064, 16, 0},
        Case{301, 784, 32, 16}, Case{5000, 128, 32, 0}, Case{100, 24, 16, 8}, Case{20, 96, 12, 0},
        Case{20, 96, 40, 0}, Case{20, 96, 16, 3}}) {
    for (DType dtype : kDTypes) {
      if (dtype == DType::kF32 && c.T > 300) continue;
      const int64_t E = LoraExtension(1, c.r), F = c.F;
      const double loose = Loose(dtype);
      const Operand rows = {Random(dtype, {c.T, 2 * F}, c.padding), c.in_place ? loose : kSameBits};
      const std::vector<Operand> operands = {rows,
                                             {Random(dtype, {c.r, F}, 0, 0.1)},
                                             {Tensor(dtype, {c.T, F + E}, c.padding), loose},
                                             {Tensor(dtype, {c.T, E}, 8), loose},
                                             {rows.tensor, kSameBits},
                                             {Tensor(dtype, {c.T, F}), loose}};
      const std::string name = "gated lora forward of " + std::to_string(c.T) + " x " +
                               std::to_string(F) + ", rank " + std::to_string(c.r) + ", " +
                               DTypeName(dtype);
      const auto call = [&](const Exec& exec, const Views& v, Scratch& scratch) {
        GatedLoraForwardArgs args{.rows = v[0],
                                  .h = c.in_place ? v[0].Slice(1, 0, F) : v[2].Slice(1, 0, F),
                                  .a = v[1],
                                  .s = c.in_place ? v[3] : v[2].Slice(1, F, F + E),
                                  .activation = c.activation};
        args.workspace = scratch(GatedLoraForwardWorkspaceBytes(exec, args));
        GatedLoraForward(exec, args);
        GatedActivationForward(exec, {.gate = v[4].Slice(1, 0, F),
                                      .up = v[4].Slice(1, F, 2 * F),
                                      .h = v[5],
                                      .activation = c.activation});
      };
      ExpectGpuAsCpu(name, operands, call);
      const std::vector<Tensor> got = RunOnGpu(operands, call);
      const Tensor& h = got[c.in_place ? 0 : 2];
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t n = 0; n < F; ++n) {
          ASSERT_EQ(h[t * h.dim(1) + n], got[5][t * F + n]) << name << ", row " << t;
        }
      }
    }
  }
}

TEST_F(CudaLora, NormedGradient) {
  struct Case {
    int64_t T, J, C, padding;
  };
  for (const Case& c : {Case{64, 32, 128, 0}, Case{1, 3, 37, 1}, Case{333, 48, 1280, 8},
                        Case{2049, 16, 200, 0}, Case{100, 20, 51, 5}, Case{700, 24, 2056, 8},
                        Case{1, 16, 2048, 0}, Case{1025, 48, 1800, 8}, Case{1600, 64, 2048, 0}}) {
    for (DType dtype : kDTypes) {
      ExpectGpuAsCpu("normed gradient of " + std::to_string(c.T) + ", " + DTypeName(dtype),
                     {{Random(dtype, {c.T, c.J}, c.padding)},
                      {Random(dtype, {c.T, c.C}, c.padding)},
                      {Random(DType::kF32, {c.T})},
                      {Random(dtype, {c.C})},
                      {Random(DType::kF32, {c.J, c.C}, c.padding), 2e-5}},
                     [&](const Exec& exec, const Views& v, Scratch& scratch) {
                       NormedGradientArgs args{.ds = v[0],
                                               .x = v[1],
                                               .rstd = v[2],
                                               .w = v[3],
                                               .da = v[4],
                                               .weight_offset = 1.0,
                                               .scale = 0.5};
                       args.workspace = scratch(NormedGradientWorkspaceBytes(exec, args));
                       NormedGradient(exec, args);
                     });
    }
  }
}

}  // namespace
}  // namespace attune
