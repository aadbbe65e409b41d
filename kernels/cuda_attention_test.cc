// Attention on CUDA against the CPU's: cuDNN and the kernels of our own, whole segments and none,
// masks, offsets, softcaps. Skipped, saying so, where there is no GPU.
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cudnn.h"
#include "kernels/core/op_testing_cuda.h"

namespace attune {
namespace {

using namespace op_testing;  // NOLINT: the scaffolding of this file

class CudaAttention : public CudaOps {};

struct AttentionCase {
  int64_t hq, hk, dqk, dv;
  AttentionMask mask;
  int64_t window;
  double softcap;
};

TEST_F(CudaAttention, Attention) {
  constexpr int64_t kT = 150;
  // Unowned rows before and after, an empty segment, a chunk with keys before it.
  const Tensor count = Ints({4}), q_begin = Ints({2, 60, 60, 61, 140, 0}),
               k_begin = Ints({2, 60, 60, 61, 0}), k_length = Ints({58, 0, 1, 85, 0}),
               q_offset = Ints({0, 0, 0, 6, 0});
  for (const AttentionCase& c :
       {AttentionCase{4, 2, 64, 64, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{4, 1, 40, 24, AttentionMask::kBidirectional, 0, 0.0},
        AttentionCase{3, 3, 128, 128, AttentionMask::kCausal, 17, 0.0},
        AttentionCase{2, 1, 192, 128, AttentionMask::kCausal, 0, 3.0},
        AttentionCase{2, 2, 33, 33, AttentionMask::kBidirectional, 9, 0.0}}) {
    for (DType dtype : kDTypes) {
      const double tolerance = dtype == DType::kF32 ? 3e-5 : 2e-2;
      const auto random = [&](int64_t h, int64_t d) { return Random(dtype, {kT, h, d}, 16); };
      const auto out = [&](int64_t h, int64_t d) { return Tensor(dtype, {kT, h, d}, 16); };
      const AttentionOptions options{c.mask, c.window, 1.0 / std::sqrt(c.dqk), c.softcap};
      const std::vector<Operand> forward{{count},
                                         {q_begin},
                                         {k_begin},
                                         {k_length},
                                         {q_offset},
                                         {random(c.hq, c.dqk)},
                                         {random(c.hk, c.dqk)},
                                         {random(c.hk, c.dv)},
                                         {out(c.hq, c.dv), tolerance},
                                         {Tensor(DType::kF32, {kT, c.hq}), 2e-5}};
      const OpCall run_forward = [&](const Exec& exec, const Views& v, Scratch& scratch) {
        AttentionForwardArgs args{.q = v[5],
                                  .k = v[6],
                                  .v = v[7],
                                  .o = v[8],
                                  .lse = v[9],
                                  .segments = {v[0], v[1], v[2], v[3], v[4]},
                                  .options = options};
        args.workspace = scratch(AttentionForwardWorkspaceBytes(exec, args));
        AttentionForward(exec, args);
      };
      ExpectGpuAsCpu("attention forward", forward, run_forward);
      const std::vector<Tensor> saved = RunOnCpu(forward, run_forward);
      std::vector<Operand> backward;
      for (const Tensor& t : saved) backward.push_back({t});
      backward.push_back({random(c.hq, c.dv)});
      backward.push_back({out(c.hq, c.dqk), tolerance});
      backward.push_back({out(c.hk, c.dqk), tolerance});
      backward.push_back({out(c.hk, c.dv), tolerance});
      ExpectGpuAsCpu("attention backward", backward,
                     [&](const Exec& exec, const Views& v, Scratch& scratch) {
                       AttentionBackwardArgs args{.q = v[5],
                                                  .k = v[6],
                                                  .v = v[7],
                                                  .o = v[8],
                                                  .lse = v[9],
                                                  .d_o = v[10],
                                                  .dq = v[11],
                                                  .dk = v[12],
                                                  .dv = v[13],
                                                  .segments = {v[0], v[1], v[2], v[3], v[4]},
                                                  .options = options};
                       args.workspace = scratch(AttentionBackwardWorkspaceBytes(exec, args));
                       AttentionBackward(exec, args);
                     });
    }
  }
}

// Whole segments with compact rows, which cuDNN takes: uneven documents, an empty one, a tail that
// belongs to none; with and without the deterministic backward.
TEST_F(CudaAttention, AttentionOfWholeSegments) {
  constexpr int64_t kT = 200;
  const Tensor count = Ints({4}), q_begin = Ints({0, 70, 70, 71, 190, 0, 0}),
               k_begin = Ints({0, 70, 70, 71, 0, 0}), k_length = Ints({70, 0, 1, 119, 0, 0}),
               q_offset = Ints({0, 0, 0, 0, 0, 0});
  for (const AttentionCase& c :
       {AttentionCase{4, 2, 64, 64, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{8, 2, 128, 128, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{3, 1, 40, 40, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{4, 2, 80, 80, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{2, 2, 96, 96, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{4, 2, 256, 256, AttentionMask::kCausal, 0, 0.0},
        AttentionCase{4, 4, 128, 128, AttentionMask::kCausal, 17, 0.0},
        AttentionCase{4, 2, 128, 128, AttentionMask::kCausal, 33, 3.0},
        AttentionCase{4, 2, 256, 256, AttentionMask::kCausal, 33, 50.0},
        AttentionCase{4, 1, 256, 256, AttentionMask::kCausal, 0, 50.0},
        AttentionCase{4, 4, 64, 64, AttentionMask::kBidirectional, 0, 0.0}}) {
    for (const bool deterministic : {true, false}) {
      for (int64_t padding : {0, 16}) {
        const DType dtype = DType::kBF16;
        const auto random = [&](int64_t h, int64_t d, int64_t pad = 0) {
          return Random(dtype, {kT, h, d}, pad);
        };
        const auto out = [&](int64_t h, int64_t d, int64_t pad = 0) {
          return Tensor(dtype, {kT, h, d}, pad);
        };
        const AttentionOptions options{c.mask, c.window, 1.0 / std::sqrt(c.dqk), c.softcap};
        const auto segments = [](const Views& v) {
          return AttentionSegments{v[0], v[1], v[2], v[3], v[4], /*whole=*/true};
        };
        const std::vector<Operand> forward{{count},
                                           {q_begin},
                                           {k_begin},
                                           {k_length},
                                           {q_offset},
                                           {random(c.hq, c.dqk)},
                                           {random(c.hk, c.dqk)},
                                           {random(c.hk, c.dv)},
                                           {out(c.hq, c.dv, padding), 2e-2},
                                           {Tensor(DType::kF32, {kT, c.hq}), 1e-3}};
        const OpCall run_forward = [&](const Exec& exec, const Views& v, Scratch& scratch) {
          AttentionForwardArgs args{.q = v[5],
                                    .k = v[6],
                                    .v = v[7],
                                    .o = v[8],
                                    .lse = v[9],
                                    .segments = segments(v),
                                    .options = options};
          args.workspace = scratch(AttentionForwardWorkspaceBytes(exec, args));
          AttentionForward(exec, args);
        };
        const std::string what = "attention of whole segments, d " + std::to_string(c.dqk) +
                                 ", window " + std::to_string(c.window) + ", padding " +
                                 std::to_string(padding) + (deterministic ? ", fixed order" : "");
        ExpectGpuAsCpu(what + ", forward", forward, run_forward);
        std::vector<Operand> backward;
        for (const Tensor& t : RunOnCpu(forward, run_forward)) backward.push_back({t});
        backward.push_back({random(c.hq, c.dv, padding)});
        backward.push_back({out(c.hq, c.dqk), 2.5e-2});
        backward.push_back({out(c.hk, c.dqk), 2.5e-2});
        backward.push_back({out(c.hk, c.dv), 2.5e-2});
        ExpectGpuAsCpu(
            what + ", backward", backward,
            [&](const Exec& with_stream, const Views& v, Scratch& scratch) {
              Exec exec = with_stream;
              exec.deterministic = deterministic;
              AttentionBackwardArgs args{.q = v[5],
                                         .k = v[6],
                                         .v = v[7],
                                         .o = v[8],
                                         .lse = v[9],
                                         .d_o = v[10],
                                         .dq = v[11],
                                         .dk = v[12],
                                         .dv = v[13],
                                         .segments = segments(v),
                                         .options = options};
              args.workspace = scratch(AttentionBackwardWorkspaceBytes(exec, args));
              AttentionBackward(exec, args);
            },
            /*repeatable=*/deterministic || c.dqk % 64 != 0);
      }
    }
  }
}

// Its offsets are counts of elements in 32 bits: 2^31 elements of q are one too many.
TEST(CudnnAttention, IsNotAskedWhereOffsetsWouldOverflow) {
  const auto takes = [](int64_t tokens) {
    const TensorView q(nullptr, DType::kBF16, {tokens, 32, 128});
    const TensorView kv(nullptr, DType::kBF16, {tokens, 8, 128});
    const AttentionSegments segments{.k_begin = TensorView(nullptr, DType::kI32, {1}),
                                     .whole = true};
    const bool forward =
        CudnnTakes(AttentionForwardArgs{.q = q, .k = kv, .v = kv, .o = q, .segments = segments});
    AttentionBackwardArgs args{.q = q, .k = kv, .v = kv, .o = q, .d_o = q, .dq = q, .dk = kv};
    args.dv = kv;
    args.segments = segments;
    EXPECT_EQ(CudnnTakes(args), forward);
    return forward;
  };
  EXPECT_TRUE(takes((1 << 19) - 1));
  EXPECT_FALSE(takes(1 << 19));
}

}  // namespace
}  // namespace attune
