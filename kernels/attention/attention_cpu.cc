// Attention on the CPU, in the manner of FlashAttention: blocks of queries against blocks of keys
// with a running maximum and sum.
//
// A block holds kRows rows: the query heads that share a key head, times as many queries as fit,
// so that each packed block of keys serves all of them. Row r is query r % queries of head
// r / queries. Blocks start at the segment's begin, so a segment's sums are the same wherever it is
// packed. Forward's unit of work is (segment, block of queries, key head, chunk of its heads);
// backward's is (segment, key head), since dk and dv sum over all its queries. Threads take units
// in turn, and share nothing but inputs.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention/attention.h"
#include "kernels/core/dispatch.h"
#include "kernels/core/gemm_block.h"
#include "kernels/core/simd.h"

namespace attune {
namespace {

constexpr int64_t kRows = 48;
constexpr int64_t kKeys = 64;

struct Segment {
  int64_t q_begin, q_length, k_begin, k_length, q_offset;
};

Segment SegmentAt(const AttentionSegments& s, int64_t i) {
  const int32_t* q_begin = s.q_begin.As<int32_t>();
  return {q_begin[i], q_begin[i + 1] - q_begin[i], s.k_begin.As<int32_t>()[i],
          s.k_length.As<int32_t>()[i], s.q_offset.As<int32_t>()[i]};
}

// The number of segments, all of which lie inside the tensors.
int64_t CheckedCount(const AttentionSegments& s, int64_t tq, int64_t tk) {
  const int64_t count = *s.num_segments.As<int32_t>();
  CHECK(0 <= count && count <= s.k_begin.dim(0));
  for (int64_t i = 0; i < count; ++i) {
    const Segment seg = SegmentAt(s, i);
    CHECK(seg.q_begin >= 0 && seg.q_length >= 0 && seg.q_begin + seg.q_length <= tq);
    CHECK(seg.k_begin >= 0 && seg.k_length >= 0 && seg.k_begin + seg.k_length <= tk);
  }
  return count;
}

// The key positions that a query at position p sees: [begin, end), empty if end <= begin.
struct Range {
  int64_t begin, end;
};
Range VisibleKeys(const AttentionOptions& o, int64_t p, int64_t k_length) {
  Range r{0, k_length};
  if (o.mask == AttentionMask::kCausal) {
    r.end = std::min(k_length, p + 1);
  } else if (o.window > 0) {
    r.end = std::min(k_length, p + o.window);
  }
  if (o.window > 0) r.begin = std::max<int64_t>(0, p - o.window + 1);
  return r;
}

// A block of rows, and its place.
struct Block {
  int64_t query;    // of its first, in the segment
  int64_t queries;  // number
  int64_t head;     // the first query head
  int64_t heads;    // number
  int64_t rows() const { return queries * heads; }
};

struct Grouping {
  int64_t group;    // query heads per key head
  int64_t heads;    // in one block
  int64_t queries;  // in one block
  int64_t chunks;   // blocks of heads per group
  explicit Grouping(int64_t group_in)
      : group(group_in),
        heads(std::min(group_in, kRows)),
        queries(kRows / heads),
        chunks((group_in + heads - 1) / heads) {}
  Block At(int64_t key_head, int64_t chunk, int64_t query, int64_t q_length) const {
    return {query, std::min(queries, q_length - query), key_head * group + chunk * heads,
            std::min(heads, group - chunk * heads)};
  }
};

// ---- Rows in and out ----

// out[j] = x[j] * scale, with zeros from n to width.
template <typename T>
ATTUNE_CLONES void LoadRow(const T* x, AccumulatorOf<T> scale, int64_t n, AccumulatorOf<T>* out,
                           int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = ToAccumulator(x[j]) * scale;
  for (int64_t j = n; j < width; ++j) out[j] = 0;
}

template <typename T>
ATTUNE_CLONES void StoreRow(const AccumulatorOf<T>* x, AccumulatorOf<T> scale, int64_t n, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = T(x[j] * scale);
}

// out[d][j] = x[j][d] for j < n, zero for n <= j < kKeys.
template <typename T>
ATTUNE_CLONES void LoadTransposed(const T* x, int64_t stride, int64_t n, int64_t d_size,
                                  AccumulatorOf<T>* out) {
  for (int64_t d = 0; d < d_size; ++d) {
    AccumulatorOf<T>* line = out + d * kKeys;
    for (int64_t j = 0; j < n; ++j) line[j] = ToAccumulator(x[j * stride + d]);
    for (int64_t j = n; j < kKeys; ++j) line[j] = 0;
  }
}

template <typename T>
ATTUNE_CLONES AccumulatorOf<T> DotRow(const T* a, const T* b, int64_t n) {
  LaneSum<AccumulatorOf<T>> sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      sum.lane[l] += ToAccumulator(a[i + l]) * ToAccumulator(b[i + l]);
    }
  }
  for (int l = 0; i + l < n; ++l) sum.lane[l] += ToAccumulator(a[i + l]) * ToAccumulator(b[i + l]);
  return sum.Total();
}

// ---- Scores ----

template <typename A>
void CapRow(A* s, A softcap) {
  for (int64_t j = 0; j < kKeys; ++j) s[j] = softcap * std::tanh(s[j] / softcap);
}

// One row of scores against keys [begin, end) of the block: s becomes exp(s - new maximum), 0 at
// hidden keys. Updates the row's maximum and sum; returns the factor for what was summed before.
template <typename A>
ATTUNE_CLONES A SoftmaxRow(A* s, int64_t begin, int64_t end, A* row_max, A* row_sum) {
  A largest = *row_max;
  for (int64_t j = begin; j < end; ++j) largest = s[j] > largest ? s[j] : largest;
  LaneSum<A> sum;
  for (int64_t j = 0; j < kKeys; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const A p = begin <= j + l && j + l < end ? Exp(s[j + l] - largest) : A(0);
      s[j + l] = p;
      sum.lane[l] += p;
    }
  }
  const A factor = Exp(*row_max - largest);
  *row_max = largest;
  *row_sum = *row_sum * factor + sum.Total();
  return factor;
}

// p becomes the probabilities, dp the gradient of the scores.
template <typename A>
ATTUNE_CLONES void BackwardRow(A* p, A* dp, int64_t begin, int64_t end, A lse, A delta) {
#pragma omp simd
  for (int64_t j = 0; j < kKeys; ++j) {
    const A value = begin <= j && j < end ? Exp(p[j] - lse) : A(0);
    // Not value * ...: a hidden key's product may be infinite.
    dp[j] = begin <= j && j < end ? value * (dp[j] - delta) : A(0);
    p[j] = value;
  }
}

template <typename A>
ATTUNE_CLONES void ScaleRow(A* x, A factor, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

// ---- Memory ----

template <typename A>
struct ForwardScratch {
  A *q, *kt, *v, *s, *o, *row_max, *row_sum;
  static int64_t Elements(int64_t dqk, int64_t dv) {
    return kRows * GemmPadded(dqk) + dqk * kKeys + kKeys * GemmPadded(dv) + kRows * kKeys +
           kRows * GemmPadded(dv) + 2 * kRows;
  }
  ForwardScratch(A* base, int64_t dqk, int64_t dv) {
    q = base;
    kt = q + kRows * GemmPadded(dqk);
    v = kt + dqk * kKeys;
    s = v + kKeys * GemmPadded(dv);
    o = s + kRows * kKeys;
    row_max = o + kRows * GemmPadded(dv);
    row_sum = row_max + kRows;
  }
};

template <typename A>
struct BackwardScratch {
  A *q, *d_o, *kt, *k, *vt, *p, *ds, *dq, *lse, *delta;
  static int64_t Elements(int64_t dqk, int64_t dv) {
    return (2 * kRows + kKeys) * GemmPadded(dqk) + kRows * GemmPadded(dv) + (dqk + dv) * kKeys +
           2 * kRows * kKeys + 2 * kRows;
  }
  BackwardScratch(A* base, int64_t dqk, int64_t dv) {
    q = base;
    d_o = q + kRows * GemmPadded(dqk);
    kt = d_o + kRows * GemmPadded(dv);
    k = kt + dqk * kKeys;
    vt = k + kKeys * GemmPadded(dqk);
    p = vt + dv * kKeys;
    ds = p + kRows * kKeys;
    dq = ds + kRows * kKeys;
    lse = dq + kRows * GemmPadded(dqk);
    delta = lse + kRows;
  }
};

template <typename T>
T* At(const TensorView& x, int64_t token, int64_t head) {
  return x.As<T>() + token * x.stride(0) + head * x.stride(1);
}

// ---- Forward ----

template <typename T>
void ForwardBlock(const AttentionForwardArgs& a, const Segment& seg, const Block& block,
                  int64_t key_head, const ForwardScratch<AccumulatorOf<T>>& scratch) {
  using A = AccumulatorOf<T>;
  const int64_t dqk = a.q.dim(2), dv = a.v.dim(2), rows = block.rows();
  const int64_t q_width = GemmPadded(dqk), v_width = GemmPadded(dv);
  const A softcap = static_cast<A>(a.options.softcap);
  const int64_t token = seg.q_begin + block.query, position = seg.q_offset + block.query;
  for (int64_t r = 0; r < rows; ++r) {
    LoadRow(At<T>(a.q, token + r % block.queries, block.head + r / block.queries),
            static_cast<A>(a.options.scale), dqk, scratch.q + r * q_width, q_width);
    scratch.row_max[r] = -std::numeric_limits<A>::infinity();
    scratch.row_sum[r] = 0;
  }
  std::fill(scratch.o, scratch.o + rows * v_width, A(0));

  const int64_t first = VisibleKeys(a.options, position, seg.k_length).begin;
  const int64_t last = VisibleKeys(a.options, position + block.queries - 1, seg.k_length).end;
  for (int64_t j0 = first / kKeys * kKeys; j0 < last; j0 += kKeys) {
    const int64_t keys = std::min(kKeys, last - j0);
    LoadTransposed(At<T>(a.k, seg.k_begin + j0, key_head), a.k.stride(0), keys, dqk, scratch.kt);
    for (int64_t j = 0; j < keys; ++j) {
      LoadRow(At<T>(a.v, seg.k_begin + j0 + j, key_head), A(1), dv, scratch.v + j * v_width,
              v_width);
    }
    GemmBlock(GemmBlockArgs<A>{rows, kKeys, dqk, scratch.q, q_width, 1, scratch.kt, kKeys,
                               scratch.s, kKeys, false});
    for (int64_t r = 0; r < rows; ++r) {
      A* s = scratch.s + r * kKeys;
      const Range seen = VisibleKeys(a.options, position + r % block.queries, seg.k_length);
      const int64_t begin = std::clamp<int64_t>(seen.begin - j0, 0, keys);
      const int64_t end = std::clamp<int64_t>(seen.end - j0, 0, keys);
      if (begin >= end) {
        std::fill(s, s + kKeys, A(0));
        continue;
      }
      if (softcap > 0) CapRow(s, softcap);
      const A factor = SoftmaxRow(s, begin, end, scratch.row_max + r, scratch.row_sum + r);
      if (factor != A(1)) ScaleRow(scratch.o + r * v_width, factor, v_width);
    }
    GemmBlock(GemmBlockArgs<A>{rows, v_width, keys, scratch.s, kKeys, 1, scratch.v, v_width,
                               scratch.o, v_width, true});
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = token + r % block.queries, head = block.head + r / block.queries;
    const A sum = scratch.row_sum[r];
    StoreRow(scratch.o + r * v_width, sum == A(0) ? A(0) : A(1) / sum, dv, At<T>(a.o, t, head));
    a.lse.As<A>()[head * a.lse.dim(1) + t] = scratch.row_max[r] + std::log(sum);
  }
}

template <typename T>
void ClearRows(const TensorView& x, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < x.dim(1); ++h) {
      std::fill(At<T>(x, t, h), At<T>(x, t, h) + x.dim(2), T(AccumulatorOf<T>(0)));
    }
  }
}

template <typename T>
void ClearUnownedQueries(const AttentionForwardArgs& a, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  ClearRows<T>(a.o, begin, end);
  for (int64_t h = 0; h < a.lse.dim(0); ++h) {
    std::fill(a.lse.As<A>() + h * a.lse.dim(1) + begin, a.lse.As<A>() + h * a.lse.dim(1) + end,
              -std::numeric_limits<A>::infinity());
  }
}

// As many threads as the workspace was sized for, at most those that there are now.
int ThreadsThatFit(int64_t bytes, int64_t bytes_per_thread) {
  return static_cast<int>(
      std::min<int64_t>(bytes / bytes_per_thread, std::max(omp_get_max_threads(), 1)));
}

constexpr int64_t AlignUp(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

template <typename T>
int64_t ForwardThreadBytes(const AttentionForwardArgs& a) {
  using A = AccumulatorOf<T>;
  return AlignUp(ForwardScratch<A>::Elements(a.q.dim(2), a.v.dim(2)) * sizeof(A));
}

template <typename T>
void Forward(const AttentionForwardArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t tq = a.q.dim(0), tk = a.k.dim(0), key_heads = a.k.dim(1);
  const int64_t segments = CheckedCount(a.segments, tq, tk);
  const int32_t* q_begin = a.segments.q_begin.As<int32_t>();
  ClearUnownedQueries<T>(a, 0, segments > 0 ? q_begin[0] : tq);
  ClearUnownedQueries<T>(a, segments > 0 ? q_begin[segments] : tq, tq);
  const Grouping grouping(a.q.dim(1) / key_heads);
  const int64_t bytes = ForwardThreadBytes<T>(a);
  const int threads = ThreadsThatFit(a.workspace.bytes(), bytes);
#pragma omp parallel num_threads(threads)
  {
    char* base = static_cast<char*>(a.workspace.data) + omp_get_thread_num() * bytes;
    const ForwardScratch<A> scratch(reinterpret_cast<A*>(base), a.q.dim(2), a.v.dim(2));
    const int64_t team = omp_get_num_threads();
    int64_t turn = omp_get_thread_num();
    for (int64_t s = 0; s < segments; ++s) {
      const Segment seg = SegmentAt(a.segments, s);
      for (int64_t query = 0; query < seg.q_length; query += grouping.queries) {
        for (int64_t unit = 0; unit < key_heads * grouping.chunks; ++unit) {
          if (turn-- != 0) continue;
          turn = team - 1;
          const int64_t key_head = unit / grouping.chunks;
          ForwardBlock<T>(a, seg,
                          grouping.At(key_head, unit % grouping.chunks, query, seg.q_length),
                          key_head, scratch);
        }
      }
    }
  }
}

// ---- Backward ----

// Loads what the rows of a block need, and clears dq.
template <typename T>
void LoadQueries(const AttentionBackwardArgs& a, const Segment& seg, const Block& block,
                 const BackwardScratch<AccumulatorOf<T>>& scratch) {
  using A = AccumulatorOf<T>;
  const int64_t dqk = a.q.dim(2), dv = a.v.dim(2);
  const int64_t q_width = GemmPadded(dqk), v_width = GemmPadded(dv);
  for (int64_t r = 0; r < block.rows(); ++r) {
    const int64_t t = seg.q_begin + block.query + r % block.queries;
    const int64_t head = block.head + r / block.queries;
    LoadRow(At<T>(a.q, t, head), static_cast<A>(a.options.scale), dqk, scratch.q + r * q_width,
            q_width);
    LoadRow(At<T>(a.d_o, t, head), A(1), dv, scratch.d_o + r * v_width, v_width);
    scratch.lse[r] = a.lse.As<A>()[head * a.lse.dim(1) + t];
    scratch.delta[r] = DotRow(At<T>(a.d_o, t, head), At<T>(a.o, t, head), dv);
  }
  std::fill(scratch.dq, scratch.dq + block.rows() * q_width, A(0));
}

// From scores in scratch.p and dP in scratch.ds: probabilities and gradients of the scores.
template <typename A>
void DifferentiateScores(const AttentionOptions& options, const Segment& seg, const Block& block,
                         int64_t j0, int64_t keys, const BackwardScratch<A>& scratch) {
  const A softcap = static_cast<A>(options.softcap);
  for (int64_t r = 0; r < block.rows(); ++r) {
    A* p = scratch.p + r * kKeys;
    A* ds = scratch.ds + r * kKeys;
    const int64_t position = seg.q_offset + block.query + r % block.queries;
    const Range seen = VisibleKeys(options, position, seg.k_length);
    const int64_t begin = std::clamp<int64_t>(seen.begin - j0, 0, keys);
    const int64_t end = std::clamp<int64_t>(seen.end - j0, 0, keys);
    if (softcap == 0) {
      BackwardRow(p, ds, begin, end, scratch.lse[r], scratch.delta[r]);
      continue;
    }
    CapRow(p, softcap);
    A slope[kKeys];
    for (int64_t j = 0; j < kKeys; ++j) slope[j] = A(1) - (p[j] / softcap) * (p[j] / softcap);
    BackwardRow(p, ds, begin, end, scratch.lse[r], scratch.delta[r]);
    for (int64_t j = begin; j < end; ++j) ds[j] *= slope[j];
  }
}

// Adds the block's part to dk and dv (rows of the segment, padded), and writes its dq.
template <typename T>
void BackwardBlock(const AttentionBackwardArgs& a, const Segment& seg, const Block& block,
                   int64_t key_head, const BackwardScratch<AccumulatorOf<T>>& scratch,
                   AccumulatorOf<T>* dk, AccumulatorOf<T>* dv_sum) {
  using A = AccumulatorOf<T>;
  const int64_t dqk = a.q.dim(2), dv = a.v.dim(2), rows = block.rows();
  const int64_t q_width = GemmPadded(dqk), v_width = GemmPadded(dv);
  LoadQueries<T>(a, seg, block, scratch);
  const int64_t position = seg.q_offset + block.query;
  const int64_t first = VisibleKeys(a.options, position, seg.k_length).begin;
  const int64_t last = VisibleKeys(a.options, position + block.queries - 1, seg.k_length).end;
  for (int64_t j0 = first / kKeys * kKeys; j0 < last; j0 += kKeys) {
    const int64_t keys = std::min(kKeys, last - j0);
    const T* k = At<T>(a.k, seg.k_begin + j0, key_head);
    LoadTransposed(k, a.k.stride(0), keys, dqk, scratch.kt);
    LoadTransposed(At<T>(a.v, seg.k_begin + j0, key_head), a.v.stride(0), keys, dv, scratch.vt);
    for (int64_t j = 0; j < keys; ++j) {
      LoadRow(k + j * a.k.stride(0), A(1), dqk, scratch.k + j * q_width, q_width);
    }
    GemmBlock(GemmBlockArgs<A>{rows, kKeys, dqk, scratch.q, q_width, 1, scratch.kt, kKeys,
                               scratch.p, kKeys, false});
    GemmBlock(GemmBlockArgs<A>{rows, kKeys, dv, scratch.d_o, v_width, 1, scratch.vt, kKeys,
                               scratch.ds, kKeys, false});
    DifferentiateScores(a.options, seg, block, j0, keys, scratch);
    GemmBlock(GemmBlockArgs<A>{keys, v_width, rows, scratch.p, 1, kKeys, scratch.d_o, v_width,
                               dv_sum + j0 * v_width, v_width, true});
    GemmBlock(GemmBlockArgs<A>{keys, q_width, rows, scratch.ds, 1, kKeys, scratch.q, q_width,
                               dk + j0 * q_width, q_width, true});
    GemmBlock(GemmBlockArgs<A>{rows, q_width, keys, scratch.ds, kKeys, 1, scratch.k, q_width,
                               scratch.dq, q_width, true});
  }
  for (int64_t r = 0; r < rows; ++r) {
    StoreRow(
        scratch.dq + r * q_width, static_cast<A>(a.options.scale), dqk,
        At<T>(a.dq, seg.q_begin + block.query + r % block.queries, block.head + r / block.queries));
  }
}

template <typename T>
void BackwardUnit(const AttentionBackwardArgs& a, const Segment& seg, int64_t key_head,
                  const Grouping& grouping, const BackwardScratch<AccumulatorOf<T>>& scratch,
                  AccumulatorOf<T>* dk_sums, AccumulatorOf<T>* dv_sums) {
  using A = AccumulatorOf<T>;
  const int64_t q_width = GemmPadded(a.q.dim(2)), v_width = GemmPadded(a.v.dim(2));
  const int64_t row = key_head * a.k.dim(0) + seg.k_begin;
  A* dk = dk_sums + row * q_width;
  A* dv = dv_sums + row * v_width;
  std::fill(dk, dk + seg.k_length * q_width, A(0));
  std::fill(dv, dv + seg.k_length * v_width, A(0));
  for (int64_t query = 0; query < seg.q_length; query += grouping.queries) {
    for (int64_t chunk = 0; chunk < grouping.chunks; ++chunk) {
      BackwardBlock<T>(a, seg, grouping.At(key_head, chunk, query, seg.q_length), key_head, scratch,
                       dk, dv);
    }
  }
  for (int64_t j = 0; j < seg.k_length; ++j) {
    StoreRow(dk + j * q_width, A(1), a.k.dim(2), At<T>(a.dk, seg.k_begin + j, key_head));
    StoreRow(dv + j * v_width, A(1), a.v.dim(2), At<T>(a.dv, seg.k_begin + j, key_head));
  }
}

// Workspace: sums of dk (Hk, Tk, padded Dqk), of dv (Hk, Tk, padded Dv), then scratch per thread.
template <typename T>
struct BackwardLayout {
  int64_t dk_bytes, dv_bytes, thread_bytes;
  explicit BackwardLayout(const AttentionBackwardArgs& a) {
    using A = AccumulatorOf<T>;
    const int64_t rows = a.k.dim(0) * a.k.dim(1);
    dk_bytes = AlignUp(rows * GemmPadded(a.q.dim(2)) * sizeof(A));
    dv_bytes = AlignUp(rows * GemmPadded(a.v.dim(2)) * sizeof(A));
    thread_bytes = AlignUp(BackwardScratch<A>::Elements(a.q.dim(2), a.v.dim(2)) * sizeof(A));
  }
};

template <typename T>
void Backward(const AttentionBackwardArgs& a) {
  using A = AccumulatorOf<T>;
  const int64_t tq = a.q.dim(0), tk = a.k.dim(0), key_heads = a.k.dim(1);
  const int64_t segments = CheckedCount(a.segments, tq, tk);
  const int32_t* q_begin = a.segments.q_begin.As<int32_t>();
  ClearRows<T>(a.dq, 0, segments > 0 ? q_begin[0] : tq);
  ClearRows<T>(a.dq, segments > 0 ? q_begin[segments] : tq, tq);
  ClearRows<T>(a.dk, 0, tk);
  ClearRows<T>(a.dv, 0, tk);
  const Grouping grouping(a.q.dim(1) / key_heads);
  const BackwardLayout<T> layout(a);
  char* base = static_cast<char*>(a.workspace.data);
  A* dk_sums = reinterpret_cast<A*>(base);
  A* dv_sums = reinterpret_cast<A*>(base + layout.dk_bytes);
  char* scratch_base = base + layout.dk_bytes + layout.dv_bytes;
  const int threads =
      ThreadsThatFit(a.workspace.bytes() - layout.dk_bytes - layout.dv_bytes, layout.thread_bytes);
#pragma omp parallel num_threads(threads)
  {
    const BackwardScratch<A> scratch(
        reinterpret_cast<A*>(scratch_base + omp_get_thread_num() * layout.thread_bytes), a.q.dim(2),
        a.v.dim(2));
    const int64_t team = omp_get_num_threads();
    int64_t turn = omp_get_thread_num();
    for (int64_t s = 0; s < segments; ++s) {
      const Segment seg = SegmentAt(a.segments, s);
      for (int64_t key_head = 0; key_head < key_heads; ++key_head) {
        if (turn-- != 0) continue;
        turn = team - 1;
        BackwardUnit<T>(a, seg, key_head, grouping, scratch, dk_sums, dv_sums);
      }
    }
  }
}

}  // namespace

int64_t AttentionForwardWorkspaceBytesCpu(const Exec& exec, const AttentionForwardArgs& a) {
  int64_t bytes = 0;
  DispatchFloat(a.q.dtype, [&]<typename T>() { bytes = ForwardThreadBytes<T>(a); });
  return bytes * omp_get_max_threads();
}

void AttentionForwardCpu(const Exec& exec, const AttentionForwardArgs& a) {
  DispatchFloat(a.q.dtype, [&]<typename T>() { Forward<T>(a); });
}

int64_t AttentionBackwardWorkspaceBytesCpu(const Exec& exec, const AttentionBackwardArgs& a) {
  int64_t bytes = 0;
  DispatchFloat(a.q.dtype, [&]<typename T>() {
    const BackwardLayout<T> layout(a);
    bytes = layout.dk_bytes + layout.dv_bytes + layout.thread_bytes * omp_get_max_threads();
  });
  return bytes;
}

void AttentionBackwardCpu(const Exec& exec, const AttentionBackwardArgs& a) {
  DispatchFloat(a.q.dtype, [&]<typename T>() { Backward<T>(a); });
}

}  // namespace attune
