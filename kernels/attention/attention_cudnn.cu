#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "kernels/attention/attention_cudnn.h"
#include "kernels/attention/cudnn_graph.h"
#include "kernels/core/cuda.cuh"
#include "kernels/core/cuda_libraries.h"

namespace attune {
namespace {

using Graph = CudnnGraph;
using Tensor = CudnnGraph::Tensor;

constexpr int64_t kMaxHeadDim = 256;
// What its engines want for themselves: 17 KB were seen.
constexpr int64_t kCudnnBytes = int64_t{1} << 20;

// ---- Which problems ----

struct Problem {
  int64_t segments, tokens, hq, hk, dqk, dv;
  int64_t v_stride, o_stride, d_o_stride;  // between tokens, in elements
  bool causal;
  int64_t window;
  float scale, softcap;
  bool backward;

  auto Key() const {
    return std::make_tuple(segments, tokens, hq, hk, dqk, dv, v_stride, o_stride, d_o_stride,
                           causal, window, softcap, backward);
  }
};

bool Compact(const TensorView& x) {
  return x.dim(0) <= 1 || (x.stride(0) == x.dim(1) * x.dim(2) && x.stride(1) == x.dim(2));
}
// Tokens may have any stride that keeps them aligned.
bool CompactHeads(const TensorView& x) {
  return x.stride(1) == x.dim(2) && x.stride(0) % 8 == 0;
}

template <typename Args>
bool TakesInputs(const Args& a) {
  const int64_t dqk = a.q.dim(2), dv = a.v.dim(2);
  return a.q.dtype == DType::kBF16 && a.segments.whole && a.q.dim(0) == a.k.dim(0) &&
         a.q.dim(0) > 1 && dqk % 8 == 0 && dv % 8 == 0 && dqk <= kMaxHeadDim && dv <= kMaxHeadDim &&
         (a.options.window == 0 || a.options.mask == AttentionMask::kCausal) && Compact(a.q) &&
         Compact(a.k) && CompactHeads(a.v) && CompactHeads(a.o);
}

template <typename Args>
Problem ProblemOf(const Args& a) {
  return {.segments = a.segments.k_begin.dim(0),
          .tokens = a.q.dim(0),
          .hq = a.q.dim(1),
          .hk = a.k.dim(1),
          .dqk = a.q.dim(2),
          .dv = a.v.dim(2),
          .v_stride = a.v.stride(0),
          .o_stride = a.o.stride(0),
          .d_o_stride = 0,
          .causal = a.options.mask == AttentionMask::kCausal,
          .window = a.options.window,
          .scale = static_cast<float>(a.options.scale),
          .softcap = static_cast<float>(a.options.softcap),
          .backward = false};
}
Problem ProblemOfBackward(const AttentionBackwardArgs& a) {
  Problem p = ProblemOf(a);
  p.d_o_stride = a.d_o.stride(0);
  p.backward = true;
  return p;
}

// ---- Lengths and offsets, and the rows that no segment owns ----

// Offsets of every ragged tensor, in elements: row i of (kRaggedKinds, S + 1).
enum Ragged {
  kRaggedQ,
  kRaggedK,
  kRaggedV,
  kRaggedDv,
  kRaggedO,
  kRaggedDo,
  kRaggedStats,
  kRaggedKinds
};

bool UsesOffsets(const Problem& p, int ragged) {
  return p.backward || (ragged != kRaggedDv && ragged != kRaggedDo);
}

struct Widths {
  int64_t of[kRaggedKinds];  // elements of a token
};
Widths WidthsOf(const Problem& p) {
  return {{p.hq * p.dqk, p.hk * p.dqk, p.v_stride, p.hk * p.dv, p.o_stride, p.d_o_stride, p.hq}};
}
// Offsets are 32 bits wide, also that of the end.
bool OffsetsFit(const Problem& p) {
  const Widths widths = WidthsOf(p);
  const int64_t widest = *std::max_element(std::begin(widths.of), std::end(widths.of));
  return p.tokens * widest <= std::numeric_limits<int32_t>::max();
}
int64_t Padded(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}
int64_t OffsetsBytes(const Problem& p) {
  return Padded(p.segments * 4) + Padded(kRaggedKinds * (p.segments + 1) * 4);
}

__global__ void OffsetsKernel(const int32_t* num_segments, const int32_t* q_begin, Widths widths,
                              int32_t* lengths, int32_t* offsets, int segments) {
  const int s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s > segments) return;
  const int used = *num_segments;
  const int begin = q_begin[min(s, used)];
  if (s < segments) lengths[s] = s < used ? q_begin[s + 1] - begin : 0;
  for (int kind = 0; kind < kRaggedKinds; ++kind) {
    offsets[kind * (segments + 1) + s] = static_cast<int32_t>(begin * widths.of[kind]);
  }
}

// Fills the rows from q_begin[num_segments] on of up to three matrices.
struct Tail {
  Bf16* data;
  int64_t stride, columns;
};
struct Tails {
  Tail of[3];
  float* stats;  // optional (T, heads), set to -inf
  int64_t heads;
};
__global__ __launch_bounds__(256) void TailKernel(const int32_t* num_segments,
                                                  const int32_t* q_begin, Tails tails,
                                                  int64_t tokens) {
  const int64_t begin = q_begin[*num_segments];
  for (int64_t t = begin + blockIdx.x; t < tokens; t += gridDim.x) {
    for (const Tail& tail : tails.of) {
      for (int64_t c = threadIdx.x; c < tail.columns; c += blockDim.x) {
        tail.data[t * tail.stride + c] = __float2bfloat16_rn(0.0f);
      }
    }
    if (tails.stats == nullptr) continue;
    for (int64_t h = threadIdx.x; h < tails.heads; h += blockDim.x) {
      tails.stats[t * tails.heads + h] = __int_as_float(0xff800000);
    }
  }
}

Tail TailOf(const TensorView& x) {
  return {Data<Bf16>(x), x.stride(0), x.dim(1) * x.dim(2)};
}

struct Offsets {
  int32_t* lengths;
  int32_t* of[kRaggedKinds];
};
Offsets WriteOffsets(const Exec& exec, const AttentionSegments& s, const Problem& p,
                     char* workspace) {
  Offsets out;
  out.lengths = reinterpret_cast<int32_t*>(workspace);
  int32_t* offsets = reinterpret_cast<int32_t*>(workspace + Padded(p.segments * 4));
  for (int i = 0; i < kRaggedKinds; ++i) out.of[i] = offsets + i * (p.segments + 1);
  const unsigned blocks = static_cast<unsigned>((p.segments + 1 + 127) / 128);
  OffsetsKernel<<<blocks, 128, 0, StreamOf(exec.stream)>>>(
      Data<const int32_t>(s.num_segments), Data<const int32_t>(s.q_begin), WidthsOf(p), out.lengths,
      offsets, static_cast<int>(p.segments));
  CUDA_CHECK(cudaGetLastError());
  return out;
}

void ClearTail(const Exec& exec, const AttentionSegments& s, const Tails& tails, int64_t tokens) {
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(tokens, 528));
  TailKernel<<<blocks, 256, 0, StreamOf(exec.stream)>>>(
      Data<const int32_t>(s.num_segments), Data<const int32_t>(s.q_begin), tails, tokens);
  CUDA_CHECK(cudaGetLastError());
}

// ---- The graphs ----

enum Id : int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kDo,
  kDq,
  kDk,
  kDv,
  kScale,
  kNone,
  kOne,
  kLengths,
  kWindow,
  kCap,
  kOffsets = 40,  // + Ragged
  kRowSums = 60,
  kDqSum,
  kDkHeads,
  kDvHeads
};

// Builds the nodes that both directions share.
class Builder {
 public:
  Builder(Graph* graph, const Problem& p) : g_(graph), p_(p) {
    lengths_ = g_->Counts(p.segments, kLengths);
    for (int i = 0; i < kRaggedKinds; ++i) {
      if (UsesOffsets(p, i)) offsets_[i] = g_->Counts(p.segments + 1, kOffsets + i);
    }
    none_ = g_->Scalar(kNone);
    scale_ = g_->Scalar(kScale);
    if (p.window > 0) window_ = g_->Scalar(kWindow);
    if (p.softcap > 0) cap_ = g_->Scalar(kCap);
  }

  const Problem& problem() const { return p_; }
  const Tensor& lengths() const { return lengths_; }
  const Tensor& scale() const { return scale_; }
  const Tensor& cap() const { return cap_; }

  // (T, heads, d) tokens `stride` apart, as (B, heads, Tmax, d) or with the last two exchanged.
  Tensor Tokens(int64_t id, Ragged ragged, int64_t heads, int64_t d, int64_t stride,
                bool transposed = false, cudnnDataType_t dtype = CUDNN_DATA_BFLOAT16) {
    const Graph::TensorOptions options{.dtype = dtype, .id = id, .ragged = &offsets_[ragged]};
    const int64_t B = p_.segments, T = p_.tokens;
    if (transposed) return g_->Strided({B, heads, d, T}, {T * stride, d, 1, stride}, options);
    return g_->Strided({B, heads, T, d}, {T * stride, d, stride, 1}, options);
  }
  // (T, Hq) f32 as (B, Hq, Tmax, 1).
  Tensor Statistics(int64_t id) {
    return g_->Strided({p_.segments, p_.hq, p_.tokens, 1}, {p_.tokens * p_.hq, 1, p_.hq, 1},
                       {.id = id, .ragged = &offsets_[kRaggedStats]});
  }
  Tensor Scores(cudnnDataType_t dtype = CUDNN_DATA_FLOAT) {
    return g_->Virtual({p_.segments, p_.hq, p_.tokens, p_.tokens}, dtype);
  }
  Tensor PerRow() { return g_->Virtual({p_.segments, p_.hq, p_.tokens, 1}); }

  Tensor Map(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor* b = nullptr) {
    const Tensor y = Scores();
    g_->Pointwise(mode, x, y, {.b = b});
    return y;
  }
  // scale * x, capped.  `uncapped`: the argument of tanh.
  Tensor Scaled(const Tensor& product, Tensor* uncapped) {
    Tensor x = Map(CUDNN_POINTWISE_MUL, product, &scale_);
    if (p_.softcap <= 0) return x;
    *uncapped = Map(CUDNN_POINTWISE_DIV, x, &cap_);
    return Map(CUDNN_POINTWISE_MUL, Map(CUDNN_POINTWISE_TANH_FWD, *uncapped), &cap_);
  }
  // x where both query and key are tokens of the segment, else -inf.
  Tensor MaskPadding(const Tensor& x) {
    const Tensor row = Index(x, 2, CUDNN_DATA_INT32), column = Index(x, 3, CUDNN_DATA_INT32);
    const Tensor a = Compare(CUDNN_POINTWISE_CMP_LT, row, lengths_);
    const Tensor b = Compare(CUDNN_POINTWISE_CMP_LT, column, lengths_);
    return Select(x, Compare(CUDNN_POINTWISE_LOGICAL_AND, a, b));
  }
  // x where the query sees the key, else -inf.
  Tensor MaskUnseen(Tensor x) {
    if (p_.causal) {
      const Tensor row = Index(x, 2, CUDNN_DATA_FLOAT), column = Index(x, 3, CUDNN_DATA_FLOAT);
      x = Select(x, Compare(CUDNN_POINTWISE_CMP_GE, row, column));
    }
    if (p_.window > 0) {  // column + window > row
      const Tensor row = Index(x, 2, CUDNN_DATA_FLOAT), column = Index(x, 3, CUDNN_DATA_FLOAT);
      const Tensor reach = Scores();
      g_->Pointwise(CUDNN_POINTWISE_ADD, column, reach, {.b = &window_, .axis = 3});
      x = Select(x, Compare(CUDNN_POINTWISE_CMP_GT, reach, row));
    }
    return x;
  }

 private:
  Tensor Index(const Tensor& x, int64_t axis, cudnnDataType_t precision) {
    const Tensor y = Scores(CUDNN_DATA_INT32);
    g_->Pointwise(CUDNN_POINTWISE_GEN_INDEX, x, y, {.precision = precision, .axis = axis});
    return y;
  }
  Tensor Compare(cudnnPointwiseMode_t mode, const Tensor& a, const Tensor& b) {
    const Tensor y = Scores(CUDNN_DATA_BOOLEAN);
    g_->Pointwise(mode, a, y, {.b = &b, .precision = CUDNN_DATA_BOOLEAN});
    return y;
  }
  Tensor Select(const Tensor& x, const Tensor& keep) {
    const Tensor y = Scores();
    g_->Pointwise(CUDNN_POINTWISE_BINARY_SELECT, x, y, {.b = &none_, .t = &keep});
    return y;
  }

  Graph* g_;
  Problem p_;
  Tensor lengths_, offsets_[kRaggedKinds], none_, scale_, window_, cap_;
};

void AddForward(Graph* g, const Problem& p) {
  Builder b(g, p);
  const Tensor* n = &b.lengths();
  const Tensor q = b.Tokens(kQ, kRaggedQ, p.hq, p.dqk, p.hq * p.dqk);
  const Tensor kt = b.Tokens(kK, kRaggedK, p.hk, p.dqk, p.hk * p.dqk, /*transposed=*/true);
  const Tensor v = b.Tokens(kV, kRaggedV, p.hk, p.dv, p.v_stride);
  const Tensor o = b.Tokens(kO, kRaggedO, p.hq, p.dv, p.o_stride);
  const Tensor stats = b.Statistics(kStats);
  const Tensor product = b.Scores();
  g->MatMul(q, kt, product, {.m = n, .n = n, .zero_padding = true});
  Tensor uncapped;
  const Tensor x = b.MaskUnseen(b.MaskPadding(b.Scaled(product, &uncapped)));
  const Tensor largest = b.PerRow(), sum = b.PerRow(), log_sum = b.PerRow();
  g->Reduce(CUDNN_REDUCE_TENSOR_MAX, x, largest);
  const Tensor e = b.Map(CUDNN_POINTWISE_EXP, b.Map(CUDNN_POINTWISE_SUB, x, &largest));
  g->Reduce(CUDNN_REDUCE_TENSOR_ADD, e, sum);
  g->Pointwise(CUDNN_POINTWISE_LOG, sum, log_sum, {});
  g->Pointwise(CUDNN_POINTWISE_ADD, largest, stats, {.b = &log_sum});
  const Tensor weights = b.Scores(CUDNN_DATA_BFLOAT16);
  g->Pointwise(CUDNN_POINTWISE_DIV, e, weights, {.b = &sum});
  g->MatMul(weights, v, o, {.m = n, .k = n});
}

// dk or dv: the transposed (keys, queries) matrix times (queries, d), summed over the heads of a
// group.
void AddKeyGradient(Graph* g, Builder* b, const Tensor& scores, const Tensor& rhs,
                    const Tensor& out, int64_t d, int64_t heads_id) {
  const Problem& p = b->problem();
  const int64_t B = p.segments, T = p.tokens;
  const Tensor transposed =
      g->Strided({B, p.hq, T, T}, {p.hq * T * T, T * T, 1, T}, {.dtype = CUDNN_DATA_BFLOAT16});
  g->Reshape(scores, transposed);
  const Tensor* n = &b->lengths();
  if (p.hq == p.hk) return g->MatMul(transposed, rhs, out, {.m = n, .k = n});
  // The offsets of k, which cuDNN takes in units of the stride.
  const Ragged ragged = heads_id == kDkHeads ? kRaggedK : kRaggedDv;
  const Tensor heads = b->Tokens(heads_id, ragged, p.hq, d, p.hq * d);
  g->MatMul(transposed, rhs, heads, {.m = n, .k = n});
  g->Reduce(CUDNN_REDUCE_TENSOR_ADD, heads, out);
}

void AddBackward(Graph* g, const Problem& p) {
  Builder b(g, p);
  const Tensor* n = &b.lengths();
  const Tensor one = g->Scalar(kOne);
  const Tensor q = b.Tokens(kQ, kRaggedQ, p.hq, p.dqk, p.hq * p.dqk);
  const Tensor kt = b.Tokens(kK, kRaggedK, p.hk, p.dqk, p.hk * p.dqk, /*transposed=*/true);
  const Tensor vt = b.Tokens(kV, kRaggedV, p.hk, p.dv, p.v_stride, /*transposed=*/true);
  const Tensor o = b.Tokens(kO, kRaggedO, p.hq, p.dv, p.o_stride);
  const Tensor d_o = b.Tokens(kDo, kRaggedDo, p.hq, p.dv, p.d_o_stride);
  const Tensor dq = b.Tokens(kDq, kRaggedQ, p.hq, p.dqk, p.hq * p.dqk);
  const Tensor dk = b.Tokens(kDk, kRaggedK, p.hk, p.dqk, p.hk * p.dqk);
  const Tensor dv = b.Tokens(kDv, kRaggedDv, p.hk, p.dv, p.hk * p.dv);
  const Tensor stats = b.Statistics(kStats);
  // delta = rowsum(o * d_o)
  const int64_t B = p.segments, T = p.tokens;
  const Tensor product_o =
      g->Strided({B, p.hq, T, p.dv}, {p.hq * T * p.dv, T * p.dv, p.hq * p.dv, 1}, {});
  const Tensor row_sum = b.PerRow(), delta = b.Statistics(kRowSums);
  g->Pointwise(CUDNN_POINTWISE_MUL, d_o, product_o, {.b = &o});
  g->Reduce(CUDNN_REDUCE_TENSOR_ADD, product_o, row_sum);
  g->Pointwise(CUDNN_POINTWISE_MUL, row_sum, delta, {.b = &one});
  // p = exp(z - lse)
  const Tensor product = b.Scores();
  g->MatMul(q, kt, product, {.m = n, .n = n});
  Tensor uncapped;
  const Tensor z = b.MaskPadding(b.Scaled(product, &uncapped));
  const Tensor weights =
      b.Map(CUDNN_POINTWISE_EXP, b.MaskUnseen(b.Map(CUDNN_POINTWISE_SUB, z, &stats)));
  AddKeyGradient(g, &b, weights, d_o, dv, p.dv, kDvHeads);
  // ds = p * (d_o v^T - delta), through the cap, scaled
  const Tensor dp = b.Scores();
  g->MatMul(d_o, vt, dp, {.m = n, .n = n});
  Tensor ds = b.Map(CUDNN_POINTWISE_MUL, b.Map(CUDNN_POINTWISE_SUB, dp, &delta), &weights);
  if (p.softcap > 0) {
    const Tensor through = b.Scores();
    g->Pointwise(CUDNN_POINTWISE_TANH_BWD, b.Map(CUDNN_POINTWISE_MUL, ds, &b.cap()), through,
                 {.b = &uncapped, .backward = true});
    ds = b.Map(CUDNN_POINTWISE_DIV, through, &b.cap());
  }
  ds = b.Map(CUDNN_POINTWISE_MUL, ds, &b.scale());
  AddKeyGradient(g, &b, ds, q, dk, p.dqk, kDkHeads);
  const Tensor k = g->Strided({B, p.hk, T, p.dqk}, {T * p.hk * p.dqk, p.dqk, p.hk * p.dqk, 1},
                              {.dtype = CUDNN_DATA_BFLOAT16});
  g->Reshape(kt, k);
  const Tensor sum = b.Tokens(kDqSum, kRaggedQ, p.hq, p.dqk, p.hq * p.dqk, false, CUDNN_DATA_FLOAT);
  g->MatMul(ds, k, sum, {.m = n, .k = n});
  g->Pointwise(CUDNN_POINTWISE_IDENTITY, sum, dq, {});
}

// ---- Plans, kept for the life of the process ----

cudnnHandle_t Handle() {
  static const cudnnHandle_t handle = [] {
    cudnnHandle_t out = nullptr;
    const cudnnStatus_t status = Cudnn().Create(&out);
    if (status != CUDNN_STATUS_SUCCESS) {
      CudaFailed(__FILE__, __LINE__, "cudnnCreate", Cudnn().GetErrorString(status));
    }
    return out;
  }();
  return handle;
}

// Null where cuDNN refuses.
const Graph* FindPlan(const Problem& p, int64_t workspace_bytes) {
  static std::mutex mutex;
  static auto* plans = new std::map<decltype(p.Key()), std::unique_ptr<Graph>>();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [it, is_new] = plans->try_emplace(p.Key());
  if (!is_new) return it->second.get();
  auto graph = std::make_unique<Graph>(Handle());
  p.backward ? AddBackward(graph.get(), p) : AddForward(graph.get(), p);
  std::string reason;
  if (!graph->Build(&reason)) {
    std::fprintf(stderr,
                 "attention: cuDNN refuses %s of %lld tokens, %lld/%lld heads of %lld: %s; "
                 "the own kernels run\n",
                 p.backward ? "the backward" : "the forward", static_cast<long long>(p.tokens),
                 static_cast<long long>(p.hq), static_cast<long long>(p.hk),
                 static_cast<long long>(p.dqk), reason.c_str());
    return nullptr;
  }
  if (graph->workspace_bytes() > workspace_bytes) {
    std::fprintf(stderr,
                 "attention: cuDNN wants %lld bytes of workspace, %lld are planned; the "
                 "own kernels run\n",
                 static_cast<long long>(graph->workspace_bytes()),
                 static_cast<long long>(workspace_bytes));
    return nullptr;
  }
  it->second = std::move(graph);
  return it->second.get();
}

// cuDNN reads scalars from the host while it enqueues.
struct Scalars {
  float scale, none, one, window, cap;
};
Scalars ScalarsOf(const Problem& p) {
  return {p.scale, -std::numeric_limits<float>::infinity(), 1.0f, static_cast<float>(p.window),
          p.softcap};
}

using Pointers = std::vector<std::pair<int64_t, void*>>;

template <typename Args>
Pointers CommonPointers(const Args& a, const Problem& p, const Offsets& offsets, Scalars* scalars) {
  Pointers out{{kQ, a.q.data},          {kK, a.k.data},
               {kV, a.v.data},          {kO, a.o.data},
               {kStats, a.lse.data},    {kScale, &scalars->scale},
               {kNone, &scalars->none}, {kLengths, offsets.lengths}};
  for (int i = 0; i < kRaggedKinds; ++i) {
    if (UsesOffsets(p, i)) out.emplace_back(kOffsets + i, offsets.of[i]);
  }
  if (p.window > 0) out.emplace_back(kWindow, &scalars->window);
  if (p.softcap > 0) out.emplace_back(kCap, &scalars->cap);
  return out;
}

void UseStream(const Exec& exec) {
  Cudnn().SetStream(Handle(), StreamOf(exec.stream));
}

struct BackwardBuffers {
  int64_t row_sums, dq_sum, dk_heads, dv_heads;
  int64_t Total() const { return row_sums + dq_sum + dk_heads + dv_heads + kCudnnBytes; }
};
BackwardBuffers BuffersOf(const Problem& p) {
  BackwardBuffers out{};
  out.row_sums = Padded(p.tokens * p.hq * 4);
  out.dq_sum = Padded(p.tokens * p.hq * p.dqk * 4);
  if (p.hq != p.hk) {
    out.dk_heads = Padded(p.tokens * p.hq * p.dqk * 2);
    out.dv_heads = Padded(p.tokens * p.hq * p.dv * 2);
  }
  return out;
}

}  // namespace

bool CudnnTakes(const AttentionForwardArgs& a) {
  return TakesInputs(a) && OffsetsFit(ProblemOf(a));
}

// It has a repeatable backward, too, no faster than ours and in 2 Hq Tq^2 bytes of workspace. Its
// sums by atomics give a wrong dq for heads that are no multiple of 64 (seen with 40).
bool CudnnTakes(const Exec& exec, const AttentionBackwardArgs& a) {
  return !exec.deterministic && a.q.dim(2) % 64 == 0 && TakesInputs(a) && CompactHeads(a.d_o) &&
         Compact(a.dq) && Compact(a.dk) && Compact(a.dv) && OffsetsFit(ProblemOfBackward(a));
}

int64_t CudnnForwardWorkspaceBytes(const AttentionForwardArgs& a) {
  return OffsetsBytes(ProblemOf(a)) + kCudnnBytes;
}

int64_t CudnnBackwardWorkspaceBytes(const AttentionBackwardArgs& a) {
  const Problem p = ProblemOfBackward(a);
  return OffsetsBytes(p) + BuffersOf(p).Total();
}

bool CudnnForward(const Exec& exec, const AttentionForwardArgs& a) {
  const Problem p = ProblemOf(a);
  const Graph* plan = FindPlan(p, kCudnnBytes);
  if (plan == nullptr) return false;
  const Offsets offsets = WriteOffsets(exec, a.segments, p, Data<char>(a.workspace));
  ClearTail(exec, a.segments, {{TailOf(a.o), {}, {}}, Data<float>(a.lse), p.hq}, p.tokens);
  Scalars scalars = ScalarsOf(p);
  UseStream(exec);
  plan->Execute(CommonPointers(a, p, offsets, &scalars), Data<char>(a.workspace) + OffsetsBytes(p));
  return true;
}

bool CudnnBackward(const Exec& exec, const AttentionBackwardArgs& a) {
  const Problem p = ProblemOfBackward(a);
  const BackwardBuffers buffers = BuffersOf(p);
  const Graph* plan = FindPlan(p, kCudnnBytes);
  if (plan == nullptr) return false;
  char* at = Data<char>(a.workspace);
  const Offsets offsets = WriteOffsets(exec, a.segments, p, at);
  at += OffsetsBytes(p);
  ClearTail(exec, a.segments, {{TailOf(a.dq), TailOf(a.dk), TailOf(a.dv)}, nullptr, 0}, p.tokens);
  Scalars scalars = ScalarsOf(p);
  Pointers pointers = CommonPointers(a, p, offsets, &scalars);
  const auto take = [&](int64_t id, int64_t bytes) {
    if (bytes == 0) return;
    pointers.emplace_back(id, at);
    at += bytes;
  };
  take(kRowSums, buffers.row_sums);
  take(kDqSum, buffers.dq_sum);
  take(kDkHeads, buffers.dk_heads);
  take(kDvHeads, buffers.dv_heads);
  const std::pair<int64_t, void*> more[] = {{kOne, &scalars.one},
                                            {kDo, a.d_o.data},
                                            {kDq, a.dq.data},
                                            {kDk, a.dk.data},
                                            {kDv, a.dv.data}};
  pointers.insert(pointers.end(), std::begin(more), std::end(more));
  UseStream(exec);
  plan->Execute(pointers, at);
  return true;
}

}  // namespace attune
