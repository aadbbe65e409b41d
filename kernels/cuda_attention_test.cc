// Attention on CUDA against the CPU's: cuDNN, the kernels on the tensor cores and the plain ones;
// packings, masks, offsets, softcaps, strides. Skipped, saying so, where there is no GPU.
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cudnn.h"
#include "kernels/core/op_testing_cuda.h"

namespace attune {
namespace {

using namespace op_testing;  // NOLINT: the scaffolding of this file

struct AttentionCase {
  int64_t hq, hk, dqk, dv;
  AttentionMask mask = AttentionMask::kCausal;
  int64_t window = 0;
  double softcap = 0.0;

  std::string Name() const {
    std::string name = "Heads" + std::to_string(hq) + "Of" + std::to_string(hk) + "Dims" +
                       std::to_string(dqk) + "And" + std::to_string(dv);
    if (mask == AttentionMask::kBidirectional) name += "Bidirectional";
    if (window > 0) name += "Window" + std::to_string(window);
    if (softcap > 0) name += "Cap" + std::to_string(static_cast<int>(softcap));
    return name;
  }
};
void PrintTo(const AttentionCase& c, std::ostream* out) {
  *out << c.Name();
}

// Of one call's tokens. Entries behind the last segment are capacity.
struct Packing {
  std::string name;
  int64_t tokens = 0;
  std::vector<int32_t> q_begin, k_begin, k_length, q_offset;
  int32_t count = 0;
  bool whole = false;
};
Packing Documents(const std::string& name, int32_t first, const std::vector<int32_t>& lengths,
                  int32_t unowned, bool whole = false) {
  Packing out{.name = name, .count = static_cast<int32_t>(lengths.size()), .whole = whole};
  int32_t at = first;
  for (int32_t length : lengths) {
    out.q_begin.push_back(at);
    out.k_begin.push_back(at);
    out.k_length.push_back(length);
    out.q_offset.push_back(0);
    at += length;
  }
  out.q_begin.push_back(at);
  for (int i = 0; i < 2; ++i) {
    out.q_begin.push_back(0);
    out.k_begin.push_back(0);
    out.k_length.push_back(0);
    out.q_offset.push_back(0);
  }
  out.tokens = at + unowned;
  return out;
}
// Unowned rows before and after, an empty segment, a chunk with keys before it.
Packing Chunks() {
  return {.name = "chunks",
          .tokens = 150,
          .q_begin = {2, 60, 60, 61, 140, 0},
          .k_begin = {2, 60, 60, 61, 0},
          .k_length = {58, 0, 1, 85, 0},
          .q_offset = {0, 0, 0, 6, 0},
          .count = 4};
}

// How q, k, v and their gradients lie in memory, and o and d_o.
struct Layout {
  bool fused = false;   // side by side in one buffer
  int64_t padding = 0;  // elements between rows
  int64_t o_padding = 0;
};

struct Call {
  AttentionCase c;
  Packing packing;
  Layout layout = {};
  DType dtype = DType::kBF16;
  bool deterministic = true;

  std::string Name() const {
    return "attention of " + packing.name + ", " + DTypeName(dtype) + ", " + c.Name() +
           (layout.fused ? ", fused" : "") + ", padding " + std::to_string(layout.padding) + "/" +
           std::to_string(layout.o_padding) + (deterministic ? "" : ", any order");
  }
};

// Indices of the operands. A fused buffer is the first of its three.
enum : size_t { kCount, kQBegin, kKBegin, kKLength, kQOffset, kQ, kK, kV, kO, kLse };
enum : size_t { kDo = kLse + 1, kDq, kDk, kDv };

template <typename Args>
void SetShared(const Call& s, const Views& v, Args* args) {
  const int64_t hq = s.c.hq, hk = s.c.hk;
  const bool fused = s.layout.fused;
  args->q = fused ? v[kQ].Slice(1, 0, hq) : v[kQ];
  args->k = fused ? v[kQ].Slice(1, hq, hq + hk) : v[kK];
  args->v = fused ? v[kQ].Slice(1, hq + hk, hq + 2 * hk) : v[kV];
  args->o = v[kO];
  args->lse = v[kLse];
  args->segments = {v[kCount], v[kQBegin], v[kKBegin], v[kKLength], v[kQOffset], s.packing.whole};
  args->options = {s.c.mask, s.c.window, 1.0 / std::sqrt(s.c.dqk), s.c.softcap};
}
OpCall ForwardOf(const Call& s) {
  return [s](const Exec& exec, const Views& v, Scratch& scratch) {
    AttentionForwardArgs args;
    SetShared(s, v, &args);
    args.workspace = scratch(AttentionForwardWorkspaceBytes(exec, args));
    AttentionForward(exec, args);
  };
}
OpCall BackwardOf(const Call& s) {
  return [s](const Exec& with_stream, const Views& v, Scratch& scratch) {
    Exec exec = with_stream;
    exec.deterministic = s.deterministic;
    const int64_t hq = s.c.hq, hk = s.c.hk;
    AttentionBackwardArgs args;
    SetShared(s, v, &args);
    args.d_o = v[kDo];
    args.dq = s.layout.fused ? v[kDq].Slice(1, 0, hq) : v[kDq];
    args.dk = s.layout.fused ? v[kDq].Slice(1, hq, hq + hk) : v[kDk];
    args.dv = s.layout.fused ? v[kDq].Slice(1, hq + hk, hq + 2 * hk) : v[kDv];
    args.workspace = scratch(AttentionBackwardWorkspaceBytes(exec, args));
    AttentionBackward(exec, args);
  };
}

class CudaAttention : public CudaOps {
 protected:
  // Random rows, and NaN in those that no segment owns: they are not to be looked at.
  Tensor Input(const Call& s, int64_t heads, int64_t d, int64_t padding, bool keys) {
    Tensor out = Random(s.dtype, {s.packing.tokens, heads, d}, padding);
    std::vector<bool> owned(s.packing.tokens);
    for (int32_t i = 0; i < s.packing.count; ++i) {
      const int32_t begin = keys ? s.packing.k_begin[i] : s.packing.q_begin[i];
      const int32_t end = keys ? begin + s.packing.k_length[i] : s.packing.q_begin[i + 1];
      std::fill(owned.begin() + begin, owned.begin() + end, true);
    }
    for (int64_t t = 0; t < s.packing.tokens; ++t) {
      for (int64_t c = 0; !owned[t] && c < heads * d; ++c) out.Set(t * heads * d + c, NAN);
    }
    return out;
  }
  std::vector<Operand> ForwardOperands(const Call& s, double o_tolerance = 2e-2,
                                       double lse_tolerance = 2e-5) {
    const auto& [c, packing, layout, dtype, deterministic] = s;
    std::vector<Operand> out{{Ints({packing.count})},
                             {Ints(packing.q_begin)},
                             {Ints(packing.k_begin)},
                             {Ints(packing.k_length)},
                             {Ints(packing.q_offset)}};
    if (layout.fused) {  // of segments whose keys are their queries' tokens
      CHECK(c.dqk == c.dv);
      out.push_back({Input(s, c.hq + 2 * c.hk, c.dqk, layout.padding, /*keys=*/true)});
      for (int i = 0; i < 2; ++i) out.push_back({Ints({0})});
    } else {
      out.push_back({Input(s, c.hq, c.dqk, layout.padding, /*keys=*/false)});
      out.push_back({Input(s, c.hk, c.dqk, layout.padding, /*keys=*/true)});
      out.push_back({Input(s, c.hk, c.dv, layout.padding, /*keys=*/true)});
    }
    out.push_back({Tensor(dtype, {packing.tokens, c.hq, c.dv}, layout.o_padding), o_tolerance});
    out.push_back({Tensor(DType::kF32, {packing.tokens, c.hq}), lse_tolerance});
    return out;
  }
  // `forward` as the CPU has filled it.
  std::vector<Operand> BackwardOperands(const Call& s, const std::vector<Tensor>& forward,
                                        double tolerance) {
    const auto& [c, packing, layout, dtype, deterministic] = s;
    std::vector<Operand> out;
    for (const Tensor& t : forward) out.push_back({t});
    out.push_back({Input(s, c.hq, c.dv, layout.o_padding, /*keys=*/false)});
    const auto gradient = [&](int64_t h, int64_t d) {
      out.push_back({Tensor(dtype, {packing.tokens, h, d}, layout.padding), tolerance});
    };
    if (layout.fused) {
      gradient(c.hq + 2 * c.hk, c.dqk);
    } else {
      gradient(c.hq, c.dqk);
      gradient(c.hk, c.dqk);
      gradient(c.hk, c.dv);
    }
    return out;
  }
  void ExpectAsCpu(const Call& s, double tolerance, double lse_tolerance = 2e-5,
                   bool repeatable = true) {
    const std::vector<Operand> forward = ForwardOperands(s, tolerance, lse_tolerance);
    ExpectGpuAsCpu(s.Name() + ", forward", forward, ForwardOf(s));
    ExpectGpuAsCpu(s.Name() + ", backward",
                   BackwardOperands(s, RunOnCpu(forward, ForwardOf(s)), tolerance), BackwardOf(s),
                   repeatable);
  }
};

constexpr AttentionMask kBidirectional = AttentionMask::kBidirectional,
                        kCausal = AttentionMask::kCausal;

TEST_F(CudaAttention, Attention) {
  for (const AttentionCase& c :
       {AttentionCase{4, 2, 64, 64}, AttentionCase{4, 1, 40, 24, kBidirectional},
        AttentionCase{3, 3, 128, 128, kCausal, 17}, AttentionCase{2, 1, 192, 128, kCausal, 0, 3.0},
        AttentionCase{2, 2, 33, 33, kBidirectional, 9}, AttentionCase{2, 1, 320, 320}}) {
    for (DType dtype : kDTypes) {
      ExpectAsCpu(
          {.c = c, .packing = Chunks(), .layout = {.padding = 16, .o_padding = 16}, .dtype = dtype},
          dtype == DType::kF32 ? 3e-5 : 2e-2);
    }
  }
}

// What the kernels on the tensor cores take, in packings that cut their tiles. A test for each:
// under a tool that follows every access all of them together take long.
class CudaAttentionOnTensorCores : public CudaAttention,
                                   public testing::WithParamInterface<AttentionCase> {};

TEST_P(CudaAttentionOnTensorCores, AsCpu) {
  const AttentionCase& c = GetParam();
  std::vector<int32_t> tiny;
  for (int32_t i = 0; i < 100; ++i) tiny.push_back(1 + i * 7 % 13);
  for (const Packing& packing : {Documents("documents", 5, {70, 1, 0, 64, 200, 145}, 15),
                                 Documents("tiny documents", 0, tiny, 9)}) {
    ExpectAsCpu({.c = c, .packing = packing}, 2e-2);
    if (c.dqk != c.dv) continue;
    ExpectAsCpu({.c = c,
                 .packing = packing,
                 .layout = {.fused = true, .padding = 16, .o_padding = c.dqk == 80 ? 3 : 8}},
                2e-2);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaAttentionOnTensorCores,
    testing::Values(AttentionCase{4, 4, 64, 64}, AttentionCase{4, 1, 80, 80},
                    AttentionCase{8, 1, 96, 96, kCausal, 17}, AttentionCase{8, 2, 128, 128},
                    AttentionCase{4, 1, 128, 128, kBidirectional},
                    AttentionCase{4, 4, 128, 128, kCausal, 100, 5.0},
                    AttentionCase{4, 2, 256, 256, kCausal, 33, 50.0},
                    AttentionCase{2, 1, 256, 256, kBidirectional},
                    AttentionCase{2, 1, 256, 256, kCausal},
                    AttentionCase{2, 2, 33, 33, kBidirectional, 150}, AttentionCase{4, 2, 40, 24},
                    AttentionCase{2, 1, 100, 192, kCausal, 5, 2.0}),
    [](const testing::TestParamInfo<AttentionCase>& info) { return info.param.Name(); });

TEST_F(CudaAttention, AttentionOfALongDocument) {
  for (const AttentionCase& c :
       {AttentionCase{4, 1, 128, 128}, AttentionCase{2, 1, 256, 256, kCausal, 600, 50.0},
        AttentionCase{2, 2, 64, 64, kBidirectional}}) {
    ExpectAsCpu({.c = c, .packing = Documents("a document", 0, {2050}, 0)}, 2e-2);
  }
}

// Where both take it, and too long for the CPU.
TEST_F(CudaAttention, AttentionAsCudnn) {
  Call call{.c = {8, 2, 128, 128}, .packing = Documents("a document", 0, {8200}, 0)};
  Call by_cudnn = call;
  by_cudnn.packing.whole = true;
  by_cudnn.deterministic = false;
  const std::vector<Operand> forward = ForwardOperands(call);
  const std::vector<Tensor> want = RunOnGpu(forward, ForwardOf(by_cudnn));
  const std::vector<Tensor> got = RunOnGpu(forward, ForwardOf(call));
  const auto expect_close = [](const Tensor& a, const Tensor& b, double tolerance) {
    double worst = 0.0, largest = 0.0;
    for (int64_t i = 0; i < a.size(); ++i) {
      const double error = std::abs(a[i] - b[i]);
      worst = std::isfinite(error) ? std::max(worst, error) : HUGE_VAL;
      largest = std::max(largest, std::abs(b[i]));
    }
    EXPECT_LE(worst, tolerance * largest);
  };
  expect_close(got[kO], want[kO], 1e-2);
  expect_close(got[kLse], want[kLse], 1e-5);
  const std::vector<Operand> backward = BackwardOperands(call, got, 0.0);
  const std::vector<Tensor> want_gradients = RunOnGpu(backward, BackwardOf(by_cudnn));
  const std::vector<Tensor> gradients = RunOnGpu(backward, BackwardOf(call));
  for (size_t i : {kDq, kDk, kDv}) expect_close(gradients[i], want_gradients[i], 1e-2);
}

// The same bits alone, and behind and before other documents.
TEST_F(CudaAttention, AttentionOfADocumentHangsOnNoOther) {
  constexpr int32_t kLength = 300;
  for (const int64_t d : {128, 256}) {
    const AttentionCase c{4, 2, d, d};
    const Call alone{.c = c, .packing = Documents("a document", 0, {kLength}, 0)};
    const Call packed{.c = c, .packing = Documents("documents", 3, {90, kLength, 150}, 0)};
    constexpr int64_t kAt = 93;
    std::vector<Operand> one = ForwardOperands(alone), many = ForwardOperands(packed);
    const auto rows_of = [](const Tensor& t) { return t.size() / t.dim(0); };
    const auto copy = [&](const Tensor& from, Tensor* to) {
      for (int64_t i = 0; i < from.size(); ++i) to->Set(kAt * rows_of(from) + i, from[i]);
    };
    for (size_t i : {kQ, kK, kV}) copy(one[i].tensor, &many[i].tensor);
    const auto expect_same = [&](const Tensor& a, const Tensor& b, const std::string& what) {
      int64_t different = 0;
      for (int64_t i = 0; i < a.size(); ++i) different += a[i] != b[kAt * rows_of(a) + i];
      EXPECT_EQ(different, 0) << what << " of " << d;
    };
    const std::vector<Tensor> o_alone = RunOnGpu(one, ForwardOf(alone));
    const std::vector<Tensor> o_packed = RunOnGpu(many, ForwardOf(packed));
    expect_same(o_alone[kO], o_packed[kO], "o");
    expect_same(o_alone[kLse], o_packed[kLse], "lse");
    one = BackwardOperands(alone, o_alone, 0.0);
    many = BackwardOperands(packed, o_packed, 0.0);
    copy(one[kDo].tensor, &many[kDo].tensor);
    const std::vector<Tensor> g_alone = RunOnGpu(one, BackwardOf(alone));
    const std::vector<Tensor> g_packed = RunOnGpu(many, BackwardOf(packed));
    for (size_t i : {kDq, kDk, kDv}) expect_same(g_alone[i], g_packed[i], "a gradient");
  }
}

// Whole segments with compact rows, which cuDNN takes: uneven documents, an empty one, a tail that
// belongs to none; with and without the deterministic backward.
TEST_F(CudaAttention, AttentionOfWholeSegments) {
  const Packing packing = Documents("whole segments", 0, {70, 0, 1, 119}, 10, /*whole=*/true);
  for (const AttentionCase& c :
       {AttentionCase{4, 2, 64, 64}, AttentionCase{8, 2, 128, 128}, AttentionCase{3, 1, 40, 40},
        AttentionCase{4, 2, 80, 80}, AttentionCase{2, 2, 96, 96}, AttentionCase{4, 2, 256, 256},
        AttentionCase{4, 4, 128, 128, kCausal, 17}, AttentionCase{4, 2, 128, 128, kCausal, 33, 3.0},
        AttentionCase{4, 2, 256, 256, kCausal, 33, 50.0},
        AttentionCase{4, 1, 256, 256, kCausal, 0, 50.0},
        AttentionCase{4, 4, 64, 64, kBidirectional}}) {
    for (const bool deterministic : {true, false}) {
      for (const int64_t padding : {0, 16}) {
        ExpectAsCpu({.c = c,
                     .packing = packing,
                     .layout = {.o_padding = padding},
                     .deterministic = deterministic},
                    2.5e-2, 1e-3, /*repeatable=*/deterministic || c.dqk % 64 != 0);
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
    EXPECT_EQ(CudnnTakes({.deterministic = false}, args), forward);
    EXPECT_FALSE(CudnnTakes({.deterministic = true}, args));
    return forward;
  };
  EXPECT_TRUE(takes((1 << 19) - 1));
  EXPECT_FALSE(takes(1 << 19));
}

}  // namespace
}  // namespace attune
