// 8-bit codes on CUDA against the CPU's, from rows, from the ops that make rows, and from NF4.
// Skipped, saying so, where there is no GPU.
#include "kernels/core/op_testing_cuda.h"
#include "kernels/fp8/fp8.h"
#include "kernels/gated_activation/gated_activation.h"
#include "kernels/matmul/matmul.h"
#include "kernels/nf4/nf4.h"
#include "kernels/rms_norm/rms_norm.h"

namespace attune {
namespace {

using namespace op_testing;  // NOLINT: the scaffolding of this file

class CudaFp8 : public CudaOps {};

// Adds to `operands` an op's codes of (rows, columns), and what Fp8Quantize makes of the rows that
// it wrote; `call` makes both. They are the same; returns all operands.
std::vector<Tensor> ExpectCodesOfRows(const std::string& what, std::vector<Operand> operands,
                                      int64_t rows, int64_t columns, int64_t padding,
                                      const OpCall& call) {
  const size_t at = operands.size();
  for (const int64_t behind : {padding, int64_t{0}}) {
    operands.push_back({Tensor(DType::kF8E4M3, {rows, columns}, behind)});
    operands.push_back({Tensor(DType::kF32, {rows})});
  }
  const std::vector<Tensor> got = RunOnGpu(operands, call);
  EXPECT_EQ(got[at].ToVector(), got[at + 2].ToVector()) << what << ": codes";
  EXPECT_EQ(got[at + 1].bytes(), got[at + 3].bytes()) << what << ": scales";
  for (const Tensor& t : got) t.ExpectGuardsIntact();
  return got;
}

// Widths of rows that fit into a warp's registers, a block's, shared memory, or none of these.
constexpr Width kRowWidths[] = {{64, 0},   {1024, 8}, {1280, 8}, {4096, 16},
                                {8192, 0}, {9216, 8}, {37, 0},   {2051, 3}};

// The codes that ops make beside their rows are those of the rows, and these are the same as
// without codes.
TEST_F(CudaFp8, RmsNormCodes) {
  for (DType dtype : kDTypes) {
    for (const Width& w : kRowWidths) {
      const int64_t M = 23, C = w.columns;
      const Operand out = {Tensor(dtype, {M, C}, w.padding)}, rstd = {Tensor(DType::kF32, {M})};
      const std::vector<Operand> operands = {{Random(dtype, {M, C}, w.padding)},
                                             {Random(dtype, {M, C}, w.padding)},
                                             {Random(dtype, {C})},
                                             out,
                                             out,
                                             rstd,
                                             out,
                                             out,
                                             rstd};
      for (const bool add : {false, true}) {
        const std::vector<Tensor> got = ExpectCodesOfRows(
            "rms_norm " + Name(dtype, w), operands, M, C, 32 - C % 16,
            [&](const Exec& exec, const Views& v, Scratch&) {
              RmsNormForwardArgs args{.x = v[0], .w = v[2], .y = v[4], .rstd = v[5]};
              if (add) args.delta = v[1], args.sum = v[3];
              RmsNormForward(exec, args);
              if (add) args.sum = v[6];
              args.y = v[7], args.rstd = v[8], args.fp8 = {v[9], v[10]};
              RmsNormForward(exec, args);
              Fp8Quantize(exec, {.x = v[7], .q = v[11], .scale = v[12]});
            });
        for (int i : {3, 4, 5}) EXPECT_EQ(got[i].bytes(), got[i + 3].bytes()) << i;
      }
      const std::vector<Tensor> got = ExpectCodesOfRows(
          "rebuild " + Name(dtype, w), operands, M, C, 32 - C % 16,
          [&](const Exec& exec, const Views& v, Scratch&) {
            RmsNormForward(exec, {.x = v[0], .w = v[2], .y = v[4], .rstd = v[5]});
            RmsNormRebuild(exec,
                           {.x = v[0], .rstd = v[5], .w = v[2], .y = v[7], .fp8 = {v[9], v[10]}});
            Fp8Quantize(exec, {.x = v[7], .q = v[11], .scale = v[12]});
          });
      EXPECT_EQ(got[4].bytes(), got[7].bytes());
    }
  }
}

TEST_F(CudaFp8, GatedActivationCodes) {
  std::vector<Width> widths(std::begin(kRowWidths), std::end(kRowWidths));
  widths.push_back({14336, 8});
  widths.push_back({30000, 8});   // backward fits in bf16 only
  widths.push_back({120000, 0});  // never fits
  for (DType dtype : kDTypes) {
    for (const Width& w : widths) {
      // More of the middling rows than all clusters have at once, several times.
      const int64_t F = w.columns, M = F == 14336 ? 330 : 11;
      const auto x = [&](int64_t columns) {
        return Operand{Random(dtype, {M, columns}, w.padding, 2.0)};
      };
      const Operand out = {Tensor(dtype, {M, F}, w.padding)};
      const Operand out2 = {Tensor(dtype, {M, 2 * F}, w.padding)};
      std::vector<Tensor> got = ExpectCodesOfRows(
          "gated forward " + Name(dtype, w), {x(2 * F), out, out}, M, F, 32 - F % 16,
          [&](const Exec& exec, const Views& v, Scratch&) {
            GatedActivationForwardArgs args{
                .gate = v[0].Slice(1, 0, F), .up = v[0].Slice(1, F, 2 * F), .h = v[1]};
            GatedActivationForward(exec, args);
            args.h = v[2], args.fp8 = {v[3], v[4]};
            GatedActivationForward(exec, args);
            Fp8Quantize(exec, {.x = v[2], .q = v[5], .scale = v[6]});
          });
      EXPECT_EQ(got[1].bytes(), got[2].bytes());
      // In place the second time, as a block has it.
      got = ExpectCodesOfRows(
          "gated backward " + Name(dtype, w), {x(2 * F), x(F), out2, out}, M, 2 * F,
          32 - 2 * F % 16, [&](const Exec& exec, const Views& v, Scratch&) {
            const auto gate = [&](int i) { return v[i].Slice(1, 0, F); };
            const auto up = [&](int i) { return v[i].Slice(1, F, 2 * F); };
            GatedActivationBackwardArgs args{.dh = v[1],
                                             .gate = gate(0),
                                             .up = up(0),
                                             .dgate = gate(2),
                                             .dup = up(2),
                                             .h = v[3]};
            GatedActivationBackward(exec, args);
            args.dgate = gate(0), args.dup = up(0), args.h = v[1], args.fp8 = {v[4], v[5]};
            GatedActivationBackward(exec, args);
            Fp8Quantize(exec, {.x = v[0], .q = v[6], .scale = v[7]});
          });
      EXPECT_EQ(got[0].ToVector(), got[2].ToVector());
      EXPECT_EQ(got[1].ToVector(), got[3].ToVector());
    }
  }
}

// The codes have the same bits; a product of them is summed with fewer.
TEST_F(CudaFp8, Fp8) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t e : {0, 6, 32}) {
      for (const int64_t K : {40, 1024, 4096, 5001, 40000, 80000}) {
        const int64_t M = 9, X = Fp8Extension(e);
        Tensor x = Random(dtype, {M, K + e}, 8);
        for (int64_t i = 0; i < e; ++i) {  // rows with small, larger, and too large s; of zeros
          for (const int64_t m : {2, 3, 4}) {
            const int64_t at = m * (K + e) + K + i;
            x.Set(at, x[at] * (m == 2 ? 0.1 : m == 3 ? 10.0 : 1000.0));
          }
        }
        for (int64_t c = 0; c < K; ++c) x.Set(5 * (K + e) + c, 0.0), x.Set(6 * (K + e) + c, 0.0);
        for (int64_t c = K; c < K + e; ++c) x.Set(6 * (K + e) + c, 0.0);
        ExpectGpuAsCpu(
            "fp8 rows",
            {{x},
             {Tensor(DType::kF8E4M3, {M, K + X}, 16)},
             {Tensor(DType::kF32, {M})},
             {Tensor(DType::kF8E4M3, {M, K + X}, 16)},
             {Tensor(DType::kF32, {M})},
             {Tensor(DType::kF32, {1}).Constant(K == 1024 ? 0x1p-7 : 4.0)}},
            [&](const Exec& exec, const Views& v, Scratch&) {
              Fp8Quantize(exec, {.x = v[0], .e = e, .room = v[5], .q = v[1], .scale = v[2]});
              Fp8Quantize(exec, Fp8QuantizeOf(v[0].Slice(1, 0, K), {v[3], v[4]}));
              Fp8QuantizeAdapter(exec, {.x = v[0], .e = e, .room = v[5], .q = v[3], .scale = v[4]});
            });
      }
    }
    for (const auto& [r, size] : {std::pair<int64_t, double>{3, 0.01}, {16, 0.01}, {16, 30.0}}) {
      const int64_t K = 112, N = 80, X = Fp8Extension(2 * r), M = 50;
      Tensor scale(DType::kF32, {K});
      ExpectGpuAsCpu(
          "fp8 weight",
          {{Random(dtype, {N, K}, 8, 0.02)},
           {scale.Constant(0.0)},
           {Tensor(DType::kF8E4M3, {N, K + X}, 16)},
           {Tensor(DType::kF8E4M3, {K, N + X}, 16)},
           {Random(dtype, {r, K})},
           {Random(dtype, {20, r}, 0, size)},
           {Random(dtype, {r, K})},
           {Random(dtype, {25, r}, 0, size)},
           {Random(dtype, {M, K + 2 * r}, 0, 3.0)},
           {Tensor(DType::kF8E4M3, {M, K + X})},
           {Tensor(DType::kF32, {M})},
           {Tensor(dtype, {M, N}, 8), 4e-3},
           {Tensor(DType::kF32, {2})}},
          [&, r = r](const Exec& exec, const Views& v, Scratch& scratch) {
            Fp8WeightScale(exec, {.w = v[0], .scale = v[1]});
            const LoraExtendPart parts[] = {{v[4], v[5], 2}, {v[6], v[7], 40}};
            const Fp8AdapterRoomArgs rooms = {
                .parts = parts, .scale = v[1], .factor = 0.5, .room = v[12]};
            Fp8AdapterRoom(exec, {&rooms, 1});
            for (const bool transposed : {false, true}) {
              const TensorView& q = v[transposed ? 3 : 2];
              const int64_t columns = transposed ? N : K;
              Fp8QuantizeWeight(exec, {.w = v[0],
                                       .scale = v[1],
                                       .q = q.Slice(1, 0, columns),
                                       .transposed = transposed});
              Fp8Extend(exec, {.parts = parts,
                               .scale = v[1],
                               .room = v[12].Slice(0, transposed, transposed + 1),
                               .q = q.Slice(1, columns, columns + X),
                               .transposed = transposed,
                               .factor = 0.5});
            }
            Fp8Quantize(
                exec,
                {.x = v[8], .e = 2 * r, .room = v[12].Slice(0, 0, 1), .q = v[9], .scale = v[10]});
            MatMulArgs product{.a = v[9],
                               .b = v[2],
                               .d = v[11],
                               .trans_b = true,
                               .a_scale = v[10],
                               .b_scale = v[1].Slice(0, 0, N)};
            product.workspace = scratch(MatMulWorkspaceBytes(exec, product));
            MatMul(exec, product);
          });
    }
  }
}

// Of more weights than one launch takes, with parts of any size.
TEST_F(CudaFp8, AdapterRoom) {
  for (DType dtype : kDTypes) {
    std::vector<Operand> operands;
    for (int i = 0; i < 33; ++i) {
      operands.push_back({Random(dtype, {1 + i % 5, 300 + 8 * i})});
      operands.push_back({Random(dtype, {20 * i + 3, 1 + i % 5}, 0, std::exp2(i - 10))});
      operands.push_back({Random(dtype, {1 + i % 5, 300 + 8 * i}, 0, 0.01)});
      operands.push_back({Random(dtype, {5000, 1 + i % 5}, 0, std::exp2(i - 10))});
      operands.push_back({Tensor(DType::kF32, {1}).Constant(0.002)});
      operands.push_back({Tensor(DType::kF32, {2})});
    }
    ExpectGpuAsCpu("rooms", operands, [](const Exec& exec, const Views& v, Scratch&) {
      std::vector<std::array<LoraExtendPart, 2>> parts;
      std::vector<Fp8AdapterRoomArgs> all;
      parts.reserve(v.size() / 6);
      for (size_t i = 0; i < v.size(); i += 6) {
        parts.push_back({{{v[i], v[i + 1], 0}, {v[i + 2], v[i + 3], v[i + 1].dim(0)}}});
        all.push_back({.parts = parts.back(), .scale = v[i + 4], .factor = -2.0, .room = v[i + 5]});
      }
      Fp8AdapterRoom(exec, all);
    });
  }
}

TEST_F(CudaFp8, Nf4ToFp8) {
  for (const auto& [N, K] :
       {std::pair<int64_t, int64_t>{24, 64}, {7, 50}, {300, 192}, {132, 1056}, {528, 1280}}) {
    for (const bool transposed : {false, true}) {
      for (const bool twice : {false, true}) {
        const int64_t blocks = Nf4Blocks(N * K), rows = transposed ? K : N, columns = N + K - rows;
        Tensor scale(DType::kF32, {1});
        ExpectGpuAsCpu("nf4 to fp8",
                       {{Random(DType::kF32, {N, K}, 0, 0.02)},
                        {Tensor(DType::kU8, {Nf4PackedBytes(N * K)})},
                        {Tensor(DType::kF32, {blocks})},
                        {Tensor(DType::kU8, {blocks})},
                        {Tensor(DType::kF32, {Nf4Groups(blocks)})},
                        {Tensor(DType::kF32, {1}).Constant(0.015)},
                        {scale.Constant(0.003)},
                        {Tensor(DType::kF8E4M3, {rows, columns}, 32 - columns % 16)}},
                       [&](const Exec& exec, const Views& v, Scratch&) {
                         Nf4Quantize(exec, {.w = v[0], .packed = v[1], .absmax = v[2]});
                         Nf4DoubleQuantize(exec, {.absmax = v[2],
                                                  .codes = v[3],
                                                  .absmax2 = v[4],
                                                  .offset = v[5],
                                                  .offset_given = true});
                         Nf4ToFp8Args args{
                             .packed = v[1], .scale = v[6], .q = v[7], .transposed = transposed};
                         if (twice) {
                           args.codes = v[3];
                           args.absmax2 = v[4];
                           args.offset = v[5];
                         } else {
                           args.absmax = v[2];
                         }
                         Nf4ToFp8(exec, args);
                       });
      }
    }
  }
}

}  // namespace
}  // namespace attune
