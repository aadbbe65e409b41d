// A plan for a GPU is made on any machine: shapes are checked and workspaces sized without the CUDA
// backend, and nothing is read or written.
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/attention/attention.h"
#include "kernels/core/op_testing.h"
#include "kernels/lora/gated_lora_backward.h"
#include "kernels/matmul/matmul.h"
#include "kernels/optimizer/optimizer.h"
#include "kernels/rms_norm/rms_norm.h"

namespace attune {
namespace {

Exec CudaPlan() {
  Exec exec;
  exec.device = DeviceKind::kCuda;
  exec.plan = true;
  return exec;
}
TensorView Planned(DType dtype, std::initializer_list<int64_t> shape) {
  return TensorView(nullptr, dtype, shape);
}

TEST(CudaPlan, MatMulWantsOneFixedPool) {
  MatMulArgs args{.a = Planned(DType::kBF16, {8, 16}),
                  .b = Planned(DType::kBF16, {4, 16}),
                  .d = Planned(DType::kBF16, {8, 4}),
                  .trans_b = true};
  args.workspace = Planned(DType::kU8, {MatMulWorkspaceBytes(CudaPlan(), args)});
  EXPECT_EQ(args.workspace.bytes(), int64_t{32} << 20);
  MatMul(CudaPlan(), args);
}

// The sums of each of 132 blocks' shares of each strip of 1024 columns, and of a strip and row; but
// no more than for some of the rows.
TEST(CudaPlan, LoraBackwardKnowsItsSums) {
  const int64_t N = 14336, r = 16, strips = 2 * N / 1024;
  const LoraBackwardPart parts[] = {
      {Planned(DType::kBF16, {N, r}), Planned(DType::kF32, {N, r}), 0},
      {Planned(DType::kBF16, {N, r}), Planned(DType::kF32, {N, r}), N}};
  for (const int64_t T : {int64_t{16384}, int64_t{1} << 20}) {
    LoraBackwardArgs args{.parts = parts,
                          .dy = Planned(DType::kBF16, {T, 2 * N}),
                          .s = Planned(DType::kBF16, {T, 2 * r}),
                          .ds = Planned(DType::kBF16, {T, 2 * r})};
    args.workspace = Planned(DType::kU8, {LoraBackwardWorkspaceBytes(CudaPlan(), args)});
    const int64_t sums = 4 * r * ((132 + strips - 1) * 1024 + strips * T);
    EXPECT_EQ(args.workspace.bytes(), std::min(sums, int64_t{96} << 20));
    LoraBackward(CudaPlan(), args);
  }
}

// The sums of each of 132 blocks' shares of each strip of 512 columns, and of a strip and row.
TEST(CudaPlan, GatedLoraBackwardKnowsItsSums) {
  const int64_t T = 16384, F = 14336, r = 16, strips = F / 512;
  const LoraBackwardPart parts[] = {
      {Planned(DType::kBF16, {F, r}), Planned(DType::kF32, {F, r}), 0},
      {Planned(DType::kBF16, {F, r}), Planned(DType::kF32, {F, r}), F}};
  GatedLoraBackwardArgs args{.dh = Planned(DType::kBF16, {T, F}),
                             .lora = {.parts = parts,
                                      .dy = Planned(DType::kBF16, {T, 2 * F}),
                                      .s = Planned(DType::kBF16, {T, 2 * r}),
                                      .ds = Planned(DType::kBF16, {T, 2 * r})},
                             .down_ds = Planned(DType::kBF16, {T, r}),
                             .down_da = Planned(DType::kF32, {r, F})};
  args.workspace = Planned(DType::kU8, {GatedLoraBackwardWorkspaceBytes(CudaPlan(), args)});
  EXPECT_EQ(args.workspace.bytes(), 4 * ((132 + strips - 1) * 3 * 512 * r + strips * T * 2 * r));
  GatedLoraBackward(CudaPlan(), args);
}

TEST(CudaPlan, RmsNormSumsTheWeightGradientOverRuns) {
  RmsNormBackwardArgs args{.dy = Planned(DType::kBF16, {64, 48}),
                           .x = Planned(DType::kBF16, {64, 48}),
                           .rstd = Planned(DType::kF32, {64}),
                           .w = Planned(DType::kBF16, {48}),
                           .dx = Planned(DType::kBF16, {64, 48})};
  EXPECT_EQ(RmsNormBackwardWorkspaceBytes(CudaPlan(), args), 0);
  args.dw = Planned(DType::kF32, {48});
  args.workspace = Planned(DType::kU8, {RmsNormBackwardWorkspaceBytes(CudaPlan(), args)});
  EXPECT_EQ(args.workspace.bytes(), 2 * 48 * 4);
  RmsNormBackward(CudaPlan(), args);
}

TEST(CudaPlan, GradNormKeepsASumPerPiece) {
  const TensorView grads[] = {Planned(DType::kF32, {8193}), Planned(DType::kF32, {5})};
  GradNormArgs args{.grads = grads, .norm_sq = Planned(DType::kF64, {1})};
  args.workspace = Planned(DType::kU8, {GradNormWorkspaceBytes(CudaPlan(), args)});
  EXPECT_EQ(args.workspace.bytes(), 3 * 8);
  GradNorm(CudaPlan(), args);
}

TEST(CudaPlan, AdafactorKeepsSumsOfTiles) {
  const auto tensor = [](std::initializer_list<int64_t> shape, int64_t rows) {
    return AdafactorTensor{.param = Planned(DType::kF32, shape),
                           .grad = Planned(DType::kF32, shape),
                           .v_row = Planned(DType::kF32, {rows}),
                           .v_column = Planned(DType::kF32, {130})};
  };
  const AdafactorTensor tensors[] = {tensor({300, 130}, 300), tensor({200000, 130}, 200000),
                                     tensor({7}, 7)};
  AdafactorArgs args{.tensors = tensors};
  args.workspace = Planned(DType::kU8, {AdafactorWorkspaceBytes(CudaPlan(), args)});
  // Of rows, columns, averages, directions and parameters: 2 x 19 tiles, 2 x 4082, and one.
  EXPECT_EQ(args.workspace.bytes() / 8, (2 * 300 + 19 * 130 + 10 + 38 + 38) +
                                            (2 * 200000 + 4082 * 130 + 6250 + 8164 + 8164) +
                                            (1 + 7 + 1 + 1 + 1));
  Adafactor(CudaPlan(), args);
}

TEST(CudaPlan, AttentionBackwardKeepsARowOfSums) {
  const TensorView q = Planned(DType::kBF16, {20, 4, 32}), k = Planned(DType::kBF16, {20, 2, 32});
  const TensorView lse = Planned(DType::kF32, {20, 4}), ints = Planned(DType::kI32, {3});
  const AttentionSegments segments{Planned(DType::kI32, {1}), Planned(DType::kI32, {4}), ints, ints,
                                   ints};
  AttentionForwardArgs forward{
      .q = q, .k = k, .v = k, .o = q, .lse = lse, .segments = segments, .options = {}};
  forward.workspace = Planned(DType::kU8, {AttentionForwardWorkspaceBytes(CudaPlan(), forward)});
  EXPECT_EQ(forward.workspace.bytes(), 4);
  AttentionForward(CudaPlan(), forward);
  AttentionBackwardArgs backward{.q = q,
                                 .k = k,
                                 .v = k,
                                 .o = q,
                                 .lse = lse,
                                 .d_o = q,
                                 .dq = q,
                                 .dk = k,
                                 .dv = k,
                                 .segments = segments,
                                 .options = {}};
  backward.workspace = Planned(DType::kU8, {AttentionBackwardWorkspaceBytes(CudaPlan(), backward)});
  EXPECT_EQ(backward.workspace.bytes(), 4 * 20 * 4 + 8);
  AttentionBackward(CudaPlan(), backward);
}

}  // namespace
}  // namespace attune
