// Every CUDA op against the CPU op on the same random inputs: dtypes, odd and packable shapes,
// strided views, poisoned outputs. Skipped, saying so, where there is no GPU.
#include "kernels/core/op_testing_cuda.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/dora/dora.h"
#include "kernels/dropout/dropout.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/embedding/embedding.h"
#include "kernels/fp8/fp8.h"
#include "kernels/gated_activation/gated_activation.h"
#include "kernels/matmul/matmul.h"
#include "kernels/nf4/nf4.h"
#include "kernels/qk_norm/qk_norm.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"
#include "kernels/rows/rows.h"

namespace attune {
namespace {

using namespace op_testing;  // NOLINT: the scaffolding of this file

constexpr Width kWidths[] = {{64, 0}, {1280, 8}, {37, 0}, {2051, 3}};

TEST_F(CudaOps, MatMul) {
  struct Case {
    int64_t m, n, k, pad;
  };
  for (const Case& c : {Case{64, 96, 128, 0}, Case{33, 17, 65, 3}, Case{1, 8, 5, 0},
                        Case{128, 64, 72, 8}, Case{7, 5, 0, 0}, Case{300, 16, 512, 0}}) {
    for (int mode = 0; mode < 3 * 8; ++mode) {
      const bool ta = mode & 1, tb = mode & 2, add = mode & 4;
      const DType in = mode / 8 == 0 ? DType::kF32 : DType::kBF16;
      const DType out = mode / 8 == 2 ? DType::kBF16 : DType::kF32;
      const Tensor a = ta ? Random(in, {c.k, c.m}, c.pad) : Random(in, {c.m, c.k}, c.pad);
      const Tensor b = tb ? Random(in, {c.n, c.k}, c.pad) : Random(in, {c.k, c.n}, c.pad);
      Tensor d = Random(out, {c.m, c.n}, c.pad);
      if (!add) d.Poison();
      ExpectGpuAsCpu("matmul mode " + std::to_string(mode) + " m " + std::to_string(c.m),
                     {{a}, {b}, {d, out == DType::kF32 ? 1e-5 : 1e-2}},
                     [&](const Exec& exec, const Views& v, Scratch& scratch) {
                       MatMulArgs args{.a = v[0],
                                       .b = v[1],
                                       .d = v[2],
                                       .trans_a = ta,
                                       .trans_b = tb,
                                       .alpha = 0.5,
                                       .beta = add ? 1.0 : 0.0};
                       args.workspace = scratch(MatMulWorkspaceBytes(exec, args));
                       MatMul(exec, args);
                     });
    }
  }
}

TEST_F(CudaOps, Nf4) {
  for (int64_t size : {64, 4096, 64 * 256 * 3 + 128, 64 * 256 * 20 + 1000, 1000, 77}) {
    for (DType dtype : kDTypes) {
      ExpectGpuAsCpu("quantize " + std::to_string(size),
                     {{Random(dtype, {size})},
                      {Tensor(DType::kU8, {Nf4PackedBytes(size)})},
                      {Tensor(DType::kF32, {Nf4Blocks(size)})}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       Nf4Quantize(exec, {.w = v[0], .packed = v[1], .absmax = v[2]});
                     });
    }
    const int64_t blocks = Nf4Blocks(size);
    Tensor absmax = Random(DType::kF32, {blocks});
    for (int64_t i = 0; i < blocks; ++i) absmax.Set(i, std::abs(absmax[i]) + 0.5);
    ExpectGpuAsCpu("double quantize " + std::to_string(size),
                   {{absmax},
                    {Tensor(DType::kU8, {blocks})},
                    {Tensor(DType::kF32, {Nf4Groups(blocks)})},
                    {Tensor(DType::kF32, {1})}},
                   [](const Exec& exec, const Views& v, Scratch&) {
                     Nf4DoubleQuantize(
                         exec, {.absmax = v[0], .codes = v[1], .absmax2 = v[2], .offset = v[3]});
                   });
  }
}

// More than all blocks of threads take at once, addresses that no pack can be read at, and values
// beside borders, without a size and without a sign.
TEST_F(CudaOps, Nf4QuantizeOfHardCases) {
  const auto quantize = [](int64_t begin) {
    return [begin](const Exec& exec, const Views& v, Scratch&) {
      Nf4Quantize(exec, {.w = v[0].Slice(0, begin, v[0].dim(0)),
                         .packed = v[1].Slice(0, begin, v[1].dim(0)),
                         .absmax = v[2]});
    };
  };
  const auto outputs = [](const Tensor& w, int64_t size) {
    return std::vector<Operand>{
        {w},
        {Tensor(DType::kU8, {Nf4PackedBytes(size) + w.view().size() - size})},
        {Tensor(DType::kF32, {Nf4Blocks(size)})}};
  };
  for (DType dtype : kDTypes) {
    const int64_t large = 64 * 200003 + 33, odd = 64 * 37 + 5;
    ExpectGpuAsCpu("many", outputs(Random(dtype, {large}), large), quantize(0));
    ExpectGpuAsCpu("not aligned", outputs(Random(dtype, {odd + 1}), odd), quantize(1));
    Tensor hard = Random(dtype, {64 * 48});
    for (int64_t i = 0; i < 16; ++i) {  // the borders times a maximum of 1, 2, ...
      for (int64_t j = 0; j < 15; ++j) {
        const float border = (Nf4Values()[j] + Nf4Values()[j + 1]) / 2.0f;
        for (int64_t k = 0; k < 4; ++k) {
          hard.Set(64 * i + 4 * j + k, (i + 1) * (border + (static_cast<double>(k) - 2) * 6e-8));
        }
      }
      hard.Set(64 * i + 63, i % 2 == 0 ? -(i + 1) : i + 1);
    }
    for (int64_t i = 0; i < 64; ++i) {
      hard.Set(64 * 16 + i, i % 2 == 0 ? 0.0 : -0.0);
      hard.Set(64 * 17 + i, static_cast<double>(i - 32) * 1e-39);
      hard.Set(64 * 18 + i, NAN);
    }
    hard.Set(64 * 19 + 7, NAN);
    hard.Set(64 * 20 + 8, HUGE_VAL);
    hard.Set(64 * 21 + 9, -HUGE_VAL);
    ExpectGpuAsCpu("hard", outputs(hard, hard.view().size()), quantize(0));
  }
}

TEST_F(CudaOps, Nf4Dequantize) {
  struct Case {
    int64_t n, k, pad, first_element, first_block;
  };
  for (const Case& c :
       {Case{16, 256, 0, 0, 0}, Case{40, 512, 16, 64, 300}, Case{7, 100, 0, 0, 0},
        Case{5, 37, 1, 13, 255}, Case{64, 4096, 0, 0, 0}, Case{40, 520, 8, 24, 300}}) {
    for (DType dtype : kDTypes) {
      const int64_t end = c.first_element + c.n * c.k, blocks = Nf4Blocks(end);
      Tensor packed(DType::kU8, {Nf4PackedBytes(end)}), codes(DType::kU8, {blocks});
      for (int64_t i = 0; i < packed.size(); ++i) packed.Set(i, static_cast<double>(rng_() % 256));
      for (int64_t i = 0; i < blocks; ++i) codes.Set(i, static_cast<double>(rng_() % 256));
      const Tensor absmax2 = Random(DType::kF32, {Nf4Groups(c.first_block % kNf4Group + blocks)});
      ExpectGpuAsCpu("dequantize",
                     {{packed},
                      {codes},
                      {absmax2},
                      {Random(DType::kF32, {1})},
                      {Tensor(dtype, {c.n, c.k}, c.pad)}},
                     [&](const Exec& exec, const Views& v, Scratch&) {
                       Nf4Dequantize(exec, {.packed = v[0],
                                            .codes = v[1],
                                            .absmax2 = v[2],
                                            .offset = v[3],
                                            .out = v[4],
                                            .first_block = c.first_block,
                                            .first_element = c.first_element});
                     });
      ExpectGpuAsCpu(
          "dequantize once",
          {{packed}, {Random(DType::kF32, {blocks})}, {Tensor(dtype, {c.n, c.k}, c.pad)}},
          [&](const Exec& exec, const Views& v, Scratch&) {
            Nf4Dequantize(
                exec,
                {.packed = v[0], .absmax = v[1], .out = v[2], .first_element = c.first_element});
          });
    }
  }
}

TEST_F(CudaOps, RmsNorm) {
  constexpr int64_t kM = 67;
  for (DType dtype : kDTypes) {
    for (DType weights : {dtype, DType::kF32}) {
      for (const Width& w : kWidths) {
        const auto x = [&] { return Random(dtype, {kM, w.columns}, w.padding); };
        const auto out = [&] { return Tensor(dtype, {kM, w.columns}, w.padding); };
        const double tolerance = Loose(dtype);
        for (const bool add : {false, true}) {
          ExpectGpuAsCpu("rms_norm forward " + Name(dtype, w),
                         {{x()},
                          {x()},
                          {out()},
                          {Random(weights, {w.columns})},
                          {out(), tolerance},
                          {Tensor(DType::kF32, {kM}), 2e-5}},
                         [&](const Exec& exec, const Views& v, Scratch&) {
                           RmsNormForwardArgs args{
                               .x = v[0], .w = v[3], .y = v[4], .rstd = v[5], .weight_offset = 1.0};
                           if (add) args.delta = v[1], args.sum = v[2];
                           RmsNormForward(exec, args);
                         });
        }
        ExpectGpuAsCpu("rms_norm rebuild " + Name(dtype, w),
                       {{x()},
                        {Random(DType::kF32, {kM})},
                        {Random(weights, {w.columns})},
                        {out(), tolerance}},
                       [&](const Exec& exec, const Views& v, Scratch&) {
                         RmsNormRebuild(exec, {.x = v[0], .rstd = v[1], .w = v[2], .y = v[3]});
                       });
        ExpectGpuAsCpu("rms_norm backward " + Name(dtype, w),
                       {{x()},
                        {x()},
                        {Random(DType::kF32, {kM})},
                        {Random(weights, {w.columns})},
                        {x()},
                        {out(), tolerance},
                        {Random(DType::kF32, {w.columns}), 2e-5}},
                       [&](const Exec& exec, const Views& v, Scratch& scratch) {
                         RmsNormBackwardArgs args{.dy = v[0],
                                                  .x = v[1],
                                                  .rstd = v[2],
                                                  .w = v[3],
                                                  .dresidual = v[4],
                                                  .dx = v[5],
                                                  .dw = v[6]};
                         args.workspace = scratch(RmsNormBackwardWorkspaceBytes(exec, args));
                         RmsNormBackward(exec, args);
                       });
      }
    }
  }
}

// Heads 1..13 of fused rows of 15, into and from buffers of their own.
// q and k: the first two heads of their buffers are nobody's.
TEST_F(CudaOps, QkNorm) {
  constexpr int64_t kT = 45, kHq = 13, kHk = 3;
  struct Case {
    int64_t head_dim, rotary;
  };
  enum { kX, kKx, kW, kKw, kCos, kSin, kY, kKy, kRstd, kKRstd, kDy, kKdy, kDx, kKdx };
  for (const Case& c : {Case{128, 128}, Case{256, 256}, Case{64, 64}, Case{512, 512}, Case{64, 20},
                        Case{40, 40}, Case{41, 34}, Case{96, 0}}) {
    for (DType dtype : kDTypes) {
      for (int64_t pad : {0, 3, 8}) {
        const std::string what = "qk norm " + std::to_string(c.head_dim) + ", turned " +
                                 std::to_string(c.rotary) + ", " + DTypeName(dtype);
        const auto inner = [](const TensorView& x) { return x.Slice(1, 1, x.dim(1) - 1); };
        const std::vector<Operand> forward{
            {Random(dtype, {kT, kHq + 2, c.head_dim}, pad)},
            {Random(dtype, {kT, kHk + 2, c.head_dim}, pad)},
            {Random(dtype, {c.head_dim})},
            {Random(dtype, {c.head_dim})},
            {Random(DType::kF32, {kT, c.rotary / 2})},
            {Random(DType::kF32, {kT, c.rotary / 2})},
            {Tensor(dtype, {kT, kHq, c.head_dim}, pad), Loose(dtype)},
            {Tensor(dtype, {kT, kHk, c.head_dim}, pad), Loose(dtype)},
            {Tensor(DType::kF32, {kT, kHq}), 1e-5},
            {Tensor(DType::kF32, {kT, kHk}), 1e-5}};
        const OpCall run_forward = [&](const Exec& exec, const Views& v, Scratch&) {
          const QkNormHeads heads[] = {{inner(v[kX]), v[kW], v[kY], v[kRstd]},
                                       {inner(v[kKx]), v[kKw], v[kKy], v[kKRstd]}};
          QkNormForward(exec, {.heads = heads,
                               .cos = v[kCos],
                               .sin = v[kSin],
                               .rotary_dim = c.rotary,
                               .weight_offset = 1.0});
        };
        ExpectGpuAsCpu(what, forward, run_forward);
        std::vector<Operand> backward;
        for (const Tensor& t : RunOnCpu(forward, run_forward)) backward.push_back({t});
        for (int64_t heads : {kHq, kHk}) {
          backward.push_back({Random(dtype, {kT, heads, c.head_dim}, 2 * pad)});
        }
        for (int64_t heads : {kHq, kHk}) {
          backward.push_back({Tensor(dtype, {kT, heads, c.head_dim}, pad), Loose(dtype)});
        }
        for (const size_t parts : {2, 1}) {  // q alone, too
          if (parts == 1) backward.pop_back();
          ExpectGpuAsCpu(
              what + ", backward", backward, [&](const Exec& exec, const Views& v, Scratch&) {
                const QkNormHeadsBackward heads[] = {
                    {v[kDy], inner(v[kX]), v[kRstd], v[kW], v[kDx]},
                    {v[kKdy], inner(v[kKx]), v[kKRstd], v[kKw], v[parts == 2 ? kKdx : 0]}};
                QkNormBackward(exec, {.heads = {heads, parts},
                                      .cos = v[kCos],
                                      .sin = v[kSin],
                                      .rotary_dim = c.rotary,
                                      .weight_offset = 1.0});
              });
        }
      }
    }
  }
}

TEST_F(CudaOps, Rope) {
  constexpr int64_t kT = 45, kH = 3;
  Tensor positions(DType::kI32, {kT});
  for (int64_t t = 0; t < kT; ++t) positions.Set(t, static_cast<double>(t * 997));
  for (int64_t rotary : {64, 20}) {
    Tensor inv_freq(DType::kF32, {rotary / 2});
    for (int64_t i = 0; i < rotary / 2; ++i) {
      inv_freq.Set(i, std::pow(10000.0, -2.0 * static_cast<double>(i) / rotary));
    }
    ExpectGpuAsCpu("rope table",
                   {{positions},
                    {inv_freq},
                    {Tensor(DType::kF32, {kT, rotary / 2}), 1e-6},
                    {Tensor(DType::kF32, {kT, rotary / 2}), 1e-6}},
                   [](const Exec& exec, const Views& v, Scratch&) {
                     RopeTable(exec, {.positions = v[0],
                                      .inv_freq = v[1],
                                      .cos = v[2],
                                      .sin = v[3],
                                      .attention_scaling = 1.1});
                   });
    for (DType dtype : kDTypes) {
      for (const bool inverse : {false, true}) {
        for (int64_t pad : {0, 3, 8}) {
          ExpectGpuAsCpu("rope",
                         {{Random(dtype, {kT, kH, 64}, pad), Loose(dtype)},
                          {Random(DType::kF32, {kT, rotary / 2})},
                          {Random(DType::kF32, {kT, rotary / 2})}},
                         [&](const Exec& exec, const Views& v, Scratch&) {
                           const RopeHeads heads[] = {{.x = v[0]}};
                           Rope(exec, {.heads = heads,
                                       .cos = v[1],
                                       .sin = v[2],
                                       .rotary_dim = rotary,
                                       .inverse = inverse});
                         });
          ExpectGpuAsCpu("rope of q, k, v into other buffers",
                         {{Random(dtype, {kT, kH + 4, 64}, pad)},
                          {Random(DType::kF32, {kT, rotary / 2})},
                          {Random(DType::kF32, {kT, rotary / 2})},
                          {Tensor(dtype, {kT, kH, 64}, 2 * pad), Loose(dtype)},
                          {Tensor(dtype, {kT, 2, 64}, pad), Loose(dtype)},
                          {Tensor(dtype, {kT, 2, 64})}},
                         [&](const Exec& exec, const Views& v, Scratch&) {
                           const RopeHeads heads[] = {
                               {v[0].Slice(1, 0, kH), v[3]},
                               {v[0].Slice(1, kH, kH + 2), v[4]},
                               {v[0].Slice(1, kH + 2, kH + 4), v[5], /*turned=*/false}};
                           Rope(exec, {.heads = heads,
                                       .cos = v[1],
                                       .sin = v[2],
                                       .rotary_dim = rotary,
                                       .inverse = inverse});
                         });
        }
      }
    }
  }
}

TEST_F(CudaOps, GatedActivation) {
  for (DType dtype : kDTypes) {
    for (Activation act : {Activation::kSilu, Activation::kGeluTanh, Activation::kGeluErf}) {
      for (const Width& w : kWidths) {
        const auto x = [&] { return Random(dtype, {19, w.columns}, w.padding, 2.0); };
        const auto out = [&] { return Tensor(dtype, {19, w.columns}, w.padding); };
        const double tolerance = Loose(dtype);
        ExpectGpuAsCpu("gated forward " + Name(dtype, w), {{x()}, {x()}, {out(), tolerance}},
                       [&](const Exec& exec, const Views& v, Scratch&) {
                         GatedActivationForward(
                             exec, {.gate = v[0], .up = v[1], .h = v[2], .activation = act});
                       });
        ExpectGpuAsCpu(
            "gated backward " + Name(dtype, w),
            {{x()}, {x()}, {x()}, {out(), tolerance}, {out(), tolerance}, {out(), tolerance}},
            [&](const Exec& exec, const Views& v, Scratch&) {
              GatedActivationBackward(exec, {.dh = v[0],
                                             .gate = v[1],
                                             .up = v[2],
                                             .dgate = v[3],
                                             .dup = v[4],
                                             .h = v[5],
                                             .activation = act});
            });
      }
    }
  }
}

TEST_F(CudaOps, EmbeddingAndRows) {
  for (DType dtype : kDTypes) {
    for (const Width& w : kWidths) {
      const auto x = [&](int64_t rows) { return Random(dtype, {rows, w.columns}, w.padding); };
      const auto out = [&](int64_t rows) { return Tensor(dtype, {rows, w.columns}, w.padding); };
      ExpectGpuAsCpu("embedding " + Name(dtype, w), {{Ints({3, 0, 10, 3, 7})}, {x(11)}, {out(5)}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       EmbeddingForward(exec,
                                        {.ids = v[0], .table = v[1], .y = v[2], .scale = 1.5});
                     });
      const Tensor index = Ints({3, -1, 8, 0, -1, 5});
      ExpectGpuAsCpu("gather " + Name(dtype, w), {{x(9)}, {index}, {out(6)}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       GatherRows(exec, {.x = v[0], .index = v[1], .y = v[2]});
                     });
      const Tensor ascending = Ints({0, 3, 5, 8, -1, -1});
      ExpectGpuAsCpu("scatter " + Name(dtype, w), {{x(6)}, {ascending}, {out(9)}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       ScatterRows(exec, {.y = v[0], .index = v[1], .x = v[2]});
                     });
    }
  }
}

// Ids that come once, often, and more often than a block lists; and the one that is left out.
TEST_F(CudaOps, EmbeddingBackward) {
  std::vector<int32_t> ids(2700);
  for (size_t t = 0; t < ids.size(); ++t) ids[t] = t % 3 == 0 ? 5 : static_cast<int32_t>(t % 1013);
  ids[7] = 1014;
  for (DType dtype : kDTypes) {
    for (const Width& w : kWidths) {
      ExpectGpuAsCpu(
          "embedding backward " + Name(dtype, w),
          {{Ints(ids)},
           {Random(dtype, {2700, w.columns}, w.padding)},
           {Random(DType::kF32, {1015, w.columns}, w.padding), 1e-6}},
          [](const Exec& exec, const Views& v, Scratch&) {
            EmbeddingBackward(
                exec, {.ids = v[0], .dy = v[1], .dtable = v[2], .scale = 1.5, .padding_id = 17});
          });
    }
  }
}

TEST_F(CudaOps, Dora) {
  for (const Width& w : kWidths) {
    ExpectGpuAsCpu("DoRA's factors " + Name(DType::kF32, w),
                   {{Random(DType::kF32, {9, w.columns}, w.padding)},
                    {Random(DType::kF32, {9})},
                    {Tensor(DType::kF32, {9}), 1e-6},
                    {Tensor(DType::kF32, {9}), 1e-6}},
                   [](const Exec& exec, const Views& v, Scratch&) {
                     DoraFactors(exec,
                                 {.v = v[0], .magnitude = v[1], .norm = v[2], .factor = v[3]});
                   });
    for (DType dtype : kDTypes) {
      const auto x = [&] { return Random(dtype, {70, w.columns}, w.padding); };
      for (const bool accumulate : {false, true}) {
        ExpectGpuAsCpu("scale columns " + Name(dtype, w),
                       {{x()}, {Random(DType::kF32, {w.columns})}, {x(), Loose(dtype)}},
                       [&](const Exec& exec, const Views& v, Scratch&) {
                         ScaleColumns(exec, {.x = v[0],
                                             .factor = v[1],
                                             .y = v[2],
                                             .offset = -1,
                                             .alpha = 0.5,
                                             .accumulate = accumulate});
                       });
      }
      Tensor norm = Random(DType::kF32, {w.columns});
      for (int64_t i = 0; i < norm.size(); ++i) norm.Set(i, i == 3 ? 0 : 1 + std::abs(norm[i]));
      ExpectGpuAsCpu("magnitudes' gradient " + Name(dtype, w),
                     {{x()}, {x()}, {norm}, {Random(DType::kF32, {w.columns}), 2e-5}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       DoraMagnitudeBackward(
                           exec,
                           {.dy = v[0], .u = v[1], .norm = v[2], .dmagnitude = v[3], .alpha = 0.5});
                     });
    }
  }
}

TEST_F(CudaOps, EmbeddingNoise) {
  for (DType dtype : kDTypes) {
    for (const Width& w : kWidths) {
      ExpectGpuAsCpu("embedding noise " + Name(dtype, w),
                     {{Random(dtype, {9, w.columns}, w.padding)},
                      {Ints({3})},
                      {Ints({0, 4, 4, 7, -1, -1})},
                      {Ints({17, 3})}},
                     [&](const Exec& exec, const Views& v, Scratch&) {
                       EmbeddingNoise(exec, {.x = v[0],
                                             .num_segments = v[1],
                                             .q_begin = v[2],
                                             .step_pack = v[3],
                                             .alpha = 5,
                                             .seed = 0x123456789abcdefULL});
                     });
    }
  }
}

// CrossEntropy of `logits`; `args` has what is not a view.
void ExpectCrossEntropyAsCpu(const std::string& name, const Tensor& logits,
                             const std::vector<int32_t>& targets, CrossEntropyArgs args) {
  const int64_t rows = logits.dim(0);
  ExpectGpuAsCpu(name,
                 {{logits, Loose(logits.dtype())},
                  {Ints(targets)},
                  {Tensor(DType::kF32, {rows}), 2e-5},
                  {Tensor(DType::kU8, {rows})},
                  {Tensor(DType::kF32, {1}).Constant(0.25)}},
                 [args](const Exec& exec, const Views& v, Scratch&) mutable {
                   args.logits = v[0], args.targets = v[1], args.loss = v[2];
                   args.correct = v[3], args.grad_scale = v[4];
                   CrossEntropy(exec, args);
                 });
}

// The wide ones take clusters of 2 to 8 blocks; the last two in f32, or at odd addresses, are
// longer than these hold.
TEST_F(CudaOps, CrossEntropy) {
  const Width widths[] = {{64, 0},     {1280, 8},   {37, 0},     {2051, 3},  {65544, 0},
                          {128256, 0}, {151936, 8}, {401008, 8}, {110001, 0}};
  for (DType dtype : kDTypes) {
    for (const Width& w : widths) {
      for (int variant = 0; variant < 4; ++variant) {
        const double softcap = variant & 1 ? 5.0 : 0.0, smoothing = variant & 2 ? 0.1 : 0.0;
        Tensor logits = Random(dtype, {6, w.columns}, w.padding, 3.0);
        if (smoothing == 0) logits.Set(2 * w.columns + 5, -HUGE_VAL);
        logits.Set(3 * w.columns + 1, 50.0);  // the target, twice the maximum
        logits.Set(3 * w.columns + 9, 50.0);
        logits.Set(4 * w.columns + 4, NAN);
        ExpectCrossEntropyAsCpu(
            "cross entropy " + Name(dtype, w), logits,
            {0, -1, 36, 9, 2, static_cast<int32_t>(w.columns) - 1},
            {.softcap = softcap, .label_smoothing = smoothing, .z_loss = smoothing / 100});
      }
    }
  }
}

// More rows than are worked on at once.
TEST_F(CudaOps, CrossEntropyOfManyRows) {
  for (DType dtype : kDTypes) {
    for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1500, 1288}, {150, 65544}}) {
      std::vector<int32_t> targets(static_cast<size_t>(rows));
      for (size_t t = 0; t < targets.size(); ++t) {
        targets[t] = t % 5 == 3 ? -1 : static_cast<int32_t>(t * 37 % 1288);
      }
      ExpectCrossEntropyAsCpu("cross entropy of " + std::to_string(rows) + " rows",
                              Random(dtype, {rows, columns}, 0, 3.0), targets, {});
    }
  }
}

TEST_F(CudaOps, Elementwise) {
  for (const Width& w : kWidths) {
    const auto x = [&](DType dtype) { return Random(dtype, {13, w.columns}, w.padding); };
    for (DType from : {DType::kF64, DType::kF32, DType::kBF16}) {
      for (DType to : {DType::kF64, DType::kF32, DType::kBF16}) {
        ExpectGpuAsCpu(
            "copy " + Name(from, w), {{x(from)}, {x(to).Poison()}},
            [](const Exec& exec, const Views& v, Scratch&) { Copy(exec, {.x = v[0], .y = v[1]}); });
        ExpectGpuAsCpu("add " + Name(from, w), {{x(from)}, {x(to), 1e-2}},
                       [](const Exec& exec, const Views& v, Scratch&) {
                         Add(exec, {.x = v[0], .y = v[1], .alpha = 0.3});
                       });
      }
      ExpectGpuAsCpu("scale " + Name(from, w), {{x(from)}, {Random(DType::kF64, {1})}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       Scale(exec, {.x = v[0], .alpha_device = v[1], .alpha = 0.7});
                     });
      ExpectGpuAsCpu("soft cap " + Name(from, w), {{x(from), 1e-2}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       SoftCap(exec, {.x = v[0], .cap = 1.5});
                     });
      ExpectGpuAsCpu("bias " + Name(from, w), {{Random(from, {w.columns})}, {x(from), 1e-2}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       Add(exec, {.x = v[0], .y = v[1], .alpha = 0.3});
                     });
      ExpectGpuAsCpu("sum " + Name(from, w), {{x(from)}, {Random(DType::kF64, {1}), 1e-11}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       SumToScalar(exec, {.x = v[0], .out = v[1], .accumulate = true});
                     });
      ExpectGpuAsCpu("fill " + Name(from, w), {{x(from)}},
                     [](const Exec& exec, const Views& v, Scratch&) {
                       Fill(exec, {.x = v[0], .value = 0.3});
                     });
    }
  }
}

TEST_F(CudaOps, DropoutDrawsTheSameMask) {
  const auto expect = [&](DType dtype, int64_t rows, const Width& w) {
    for (const bool accumulate : {false, true}) {
      ExpectGpuAsCpu("dropout " + Name(dtype, w),
                     {{Random(dtype, {rows, w.columns}, w.padding)},
                      {Random(dtype, {rows, w.columns}, w.padding)},
                      {Ints({17, 3})}},
                     [&](const Exec& exec, const Views& v, Scratch&) {
                       Dropout(exec, {.x = v[0],
                                      .y = v[1],
                                      .step_pack = v[2],
                                      .p = 0.3,
                                      .seed = 0x123456789abcdefULL,
                                      .layer = 5,
                                      .module = 2,
                                      .first_row = 1000003,
                                      .accumulate = accumulate});
                     });
    }
  };
  for (DType dtype : kDTypes) {
    for (const Width& w : kWidths) expect(dtype, 21, w);
    // A thread has several rows.
    expect(dtype, 3001, {2056, 8});
    expect(dtype, 1501, {515, 0});
  }
}

// Stacked parts in one call: more than one launch takes, and one that cannot be read in packs.
TEST_F(CudaOps, Nf4PartsTogether) {
  constexpr int64_t kRows[] = {144, 16, 304, 1, 64, 40};
  for (const int64_t K : {64, 192, 200, 1280}) {
    int64_t N = 0;
    std::vector<Operand> operands;
    for (const int64_t rows : kRows) {
      const int64_t blocks = Nf4Blocks(rows * K);
      Tensor packed(DType::kU8, {Nf4PackedBytes(rows * K)}), codes(DType::kU8, {blocks});
      for (int64_t i = 0; i < packed.size(); ++i) packed.Set(i, static_cast<double>(rng_() % 256));
      for (int64_t i = 0; i < blocks; ++i) codes.Set(i, static_cast<double>(rng_() % 256));
      const Tensor absmax2 = Random(DType::kF32, {Nf4Groups(blocks)});
      for (const Tensor& t : {packed, codes, absmax2, Random(DType::kF32, {1})}) {
        operands.push_back({t});
      }
      N += rows;
    }
    const size_t outputs = operands.size();
    Tensor scale(DType::kF32, {1});
    operands.push_back({scale.Constant(0.02)});
    operands.push_back({Tensor(DType::kBF16, {N, K}, 8)});
    operands.push_back({Tensor(DType::kF8E4M3, {N, K}, 64 - K % 16)});
    operands.push_back({Tensor(DType::kF8E4M3, {K, N}, 32 - N % 16)});
    ExpectGpuAsCpu("nf4 parts of " + std::to_string(K), operands,
                   [&](const Exec& exec, const Views& v, Scratch&) {
                     std::vector<Nf4DequantizeArgs> values;
                     std::vector<Nf4ToFp8Args> codes[2];
                     int64_t begin = 0, at = 0;
                     for (const int64_t rows : kRows) {
                       const int64_t end = begin + rows;
                       const TensorView to[] = {v[outputs + 1].Slice(0, begin, end),
                                                v[outputs + 2].Slice(0, begin, end),
                                                v[outputs + 3].Slice(1, begin, end)};
                       Nf4ToFp8Args args{.packed = v[at],
                                         .codes = v[at + 1],
                                         .absmax2 = v[at + 2],
                                         .offset = v[at + 3],
                                         .scale = v[outputs]};
                       values.push_back({.packed = args.packed,
                                         .codes = args.codes,
                                         .absmax2 = args.absmax2,
                                         .offset = args.offset,
                                         .out = to[0]});
                       for (const bool transposed : {false, true}) {
                         args.q = to[transposed ? 2 : 1];
                         args.transposed = transposed;
                         codes[transposed].push_back(args);
                       }
                       begin = end;
                       at += 4;
                     }
                     Nf4Dequantize(exec, values);
                     for (const auto& some : codes) Nf4ToFp8(exec, some);
                   });
  }
}

}  // namespace
}  // namespace attune
