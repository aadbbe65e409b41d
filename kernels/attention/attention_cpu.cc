// Attention on the CPU, in the manner of FlashAttention: blocks of queries against blocks of keys
// with a running maximum and sum.
//
// A block holds kRows rows: the query heads that share a key head, times as many queries as fit,
// so that a block of keys serves all of them. Row r is query r % queries of head r / queries.
// Scores lie transposed, (keys, rows): maxima and sums then run over lanes, keys and values are
// read where they are, and only the queries are turned, once a block. Blocks start at the segment's
// begin, so a segment's sums are the same wherever it is packed. Forward's unit of work is
// (segment, block of queries, key head, chunk of its heads); backward's is (segment, key head),
// since dk and dv sum over all its queries. Threads take units in turn, and share nothing but
// inputs.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

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
  for (int64_t j = 0; j < n; ++j) StoreRounded<T>(x[j] * scale, &out[j]);
}

// Row r of the block as column r of out (n, kRows).
template <typename T>
ATTUNE_CLONES void LoadColumn(const T* x, AccumulatorOf<T> scale, int64_t n,
                              AccumulatorOf<T>* out) {
  for (int64_t j = 0; j < n; ++j) out[j * kRows] = ToAccumulator(x[j]) * scale;
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

// Keys that the rows of a block see, as positions in the segment; nothing for rows that are
// padding.
struct RowRanges {
  int32_t begin[kRows], end[kRows];
  int64_t first, last;           // the keys that any row sees
  int64_t full_begin, full_end;  // the keys that every row sees

  RowRanges(const AttentionOptions& options, const Segment& seg, const Block& block) {
    const int64_t position = seg.q_offset + block.query;
    for (int64_t r = 0; r < kRows; ++r) {
      Range seen{0, 0};
      if (r < block.rows()) {
        seen = VisibleKeys(options, position + r % block.queries, seg.k_length);
      }
      begin[r] = static_cast<int32_t>(std::min(seen.begin, seg.k_length));
      end[r] = static_cast<int32_t>(std::max<int64_t>(seen.end, 0));
    }
    // Both ends of the range grow with the position.
    const Range head = VisibleKeys(options, position, seg.k_length);
    const Range tail = VisibleKeys(options, position + block.queries - 1, seg.k_length);
    first = head.begin;
    last = tail.end;
    full_begin = tail.begin;
    full_end = head.end;
  }
  bool AllSee(int64_t j0, int64_t keys) const { return full_begin <= j0 && j0 + keys <= full_end; }
};

template <typename A>
void Cap(A* s, A softcap, int64_t n) {
  for (int64_t i = 0; i < n; ++i) s[i] = softcap * std::tanh(s[i] / softcap);
}

// s (keys, kRows): hidden scores become `hidden`.
template <typename A>
ATTUNE_CLONES void MaskScores(A* s, const int32_t* begin, const int32_t* end, int64_t j0,
                              int64_t keys, A hidden) {
  for (int64_t j = 0; j < keys; ++j) {
    const int32_t key = static_cast<int32_t>(j0 + j);
    A* line = s + j * kRows;
#pragma omp simd
    for (int r = 0; r < kRows; ++r) {
      line[r] = begin[r] <= key && key < end[r] ? line[r] : hidden;
    }
  }
}

// s becomes exp(s - new maximum). Updates maxima and sums of the rows; factor[r] is for what row r
// has summed before.
template <typename A>
ATTUNE_CLONES void SoftmaxBlock(A* s, int64_t keys, A* row_max, A* row_sum, A* factor) {
  A largest[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) largest[r] = row_max[r];
  for (int64_t j = 0; j < keys; ++j) {
    const A* line = s + j * kRows;
#pragma omp simd
    for (int r = 0; r < kRows; ++r) largest[r] = line[r] > largest[r] ? line[r] : largest[r];
  }
#pragma omp simd
  for (int r = 0; r < kRows; ++r) {
    // A row that has seen no key yet: any finite shift leaves its exponentials at 0.
    const A shift = largest[r] == -std::numeric_limits<A>::infinity() ? A(0) : largest[r];
    factor[r] = Exp(row_max[r] - shift);
    row_max[r] = largest[r];
    largest[r] = shift;
    sum[r] = A(0);
  }
  for (int64_t j = 0; j < keys; ++j) {
    A* line = s + j * kRows;
#pragma omp simd
    for (int r = 0; r < kRows; ++r) {
      const A p = Exp(line[r] - largest[r]);
      line[r] = p;
      sum[r] += p;
    }
  }
#pragma omp simd
  for (int r = 0; r < kRows; ++r) row_sum[r] = row_sum[r] * factor[r] + sum[r];
}

// p becomes the probabilities, dp the gradient of the scores.
template <typename A>
ATTUNE_CLONES void DifferentiateBlock(A* p, A* dp, int64_t keys, const A* lse, const A* delta) {
  for (int64_t j = 0; j < keys; ++j) {
    A* p_line = p + j * kRows;
    A* dp_line = dp + j * kRows;
#pragma omp simd
    for (int r = 0; r < kRows; ++r) {
      const A value = Exp(p_line[r] - lse[r]);
      dp_line[r] = value * (dp_line[r] - delta[r]);
      p_line[r] = value;
    }
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
  A *qt, *k, *v, *s, *o, *row_max, *row_sum, *factor;
  static int64_t Elements(int64_t dqk, int64_t dv) {
    return dqk * kRows + kKeys * (GemmPadded(dqk) + GemmPadded(dv)) + kKeys * kRows +
           kRows * GemmPadded(dv) + 3 * kRows;
  }
  ForwardScratch(A* base, int64_t dqk, int64_t dv) {
    qt = base;
    k = qt + dqk * kRows;
    v = k + kKeys * GemmPadded(dqk);
    s = v + kKeys * GemmPadded(dv);
    o = s + kKeys * kRows;
    row_max = o + kRows * GemmPadded(dv);
    row_sum = row_max + kRows;
    factor = row_sum + kRows;
  }
};

template <typename A>
struct BackwardScratch {
  A *qt, *q, *d_ot, *d_o, *k, *v, *p, *ds, *dq, *lse, *delta;
  static int64_t Elements(int64_t dqk, int64_t dv) {
    return (dqk + dv) * kRows + (2 * kRows + kKeys) * GemmPadded(dqk) +
           (kRows + kKeys) * GemmPadded(dv) + 2 * kKeys * kRows + 2 * kRows;
  }
  BackwardScratch(A* base, int64_t dqk, int64_t dv) {
    qt = base;
    q = qt + dqk * kRows;
    d_ot = q + kRows * GemmPadded(dqk);
    d_o = d_ot + dv * kRows;
    k = d_o + kRows * GemmPadded(dv);
    v = k + kKeys * GemmPadded(dqk);
    p = v + kKeys * GemmPadded(dv);
    ds = p + kKeys * kRows;
    dq = ds + kKeys * kRows;
    lse = dq + kRows * GemmPadded(dqk);
    delta = lse + kRows;
  }
};

template <typename T>
T* At(const TensorView& x, int64_t token, int64_t head) {
  return x.As<T>() + token * x.stride(0) + head * x.stride(1);
}

// Keys or values of a block, rows padded as GemmBlock wants them.
template <typename A>
struct Lines {
  const A* data;
  int64_t stride;
};

// Where they are, if that will do, else converted into `buffer`.
template <typename T>
Lines<AccumulatorOf<T>> LoadKeys(const TensorView& x, int64_t token, int64_t head, int64_t keys,
                                 AccumulatorOf<T>* buffer) {
  const int64_t d = x.dim(2), width = GemmPadded(d);
  if constexpr (std::is_same_v<T, AccumulatorOf<T>>) {
    if (d == width) return {At<T>(x, token, head), x.stride(0)};
  }
  for (int64_t j = 0; j < keys; ++j) {
    LoadRow(At<T>(x, token + j, head), AccumulatorOf<T>(1), d, buffer + j * width, width);
  }
  return {buffer, width};
}

// ---- Forward ----

template <typename T>
void ForwardBlock(const AttentionForwardArgs& a, const Segment& seg, const Block& block,
                  int64_t key_head, const ForwardScratch<AccumulatorOf<T>>& scratch) {
  using A = AccumulatorOf<T>;
  const int64_t dqk = a.q.dim(2), dv = a.v.dim(2), rows = block.rows();
  const int64_t v_width = GemmPadded(dv);
  const A softcap = static_cast<A>(a.options.softcap);
  const int64_t token = seg.q_begin + block.query;
  if (rows < kRows) std::fill(scratch.qt, scratch.qt + dqk * kRows, A(0));
  for (int64_t r = 0; r < rows; ++r) {
    LoadColumn(At<T>(a.q, token + r % block.queries, block.head + r / block.queries),
               static_cast<A>(a.options.scale), dqk, scratch.qt + r);
  }
  std::fill(scratch.row_max, scratch.row_max + kRows, -std::numeric_limits<A>::infinity());
  std::fill(scratch.row_sum, scratch.row_sum + kRows, A(0));
  std::fill(scratch.o, scratch.o + rows * v_width, A(0));

  const RowRanges seen(a.options, seg, block);
  for (int64_t j0 = seen.first / kKeys * kKeys; j0 < seen.last; j0 += kKeys) {
    const int64_t keys = std::min(kKeys, seen.last - j0);
    const Lines<A> k = LoadKeys<T>(a.k, seg.k_begin + j0, key_head, keys, scratch.k);
    const Lines<A> v = LoadKeys<T>(a.v, seg.k_begin + j0, key_head, keys, scratch.v);
    GemmBlock(GemmBlockArgs<A>{keys, kRows, dqk, k.data, k.stride, 1, scratch.qt, kRows, scratch.s,
                               kRows, false});
    if (softcap > 0) Cap(scratch.s, softcap, keys * kRows);
    if (!seen.AllSee(j0, keys)) {
      MaskScores(scratch.s, seen.begin, seen.end, j0, keys, -std::numeric_limits<A>::infinity());
    }
    SoftmaxBlock(scratch.s, keys, scratch.row_max, scratch.row_sum, scratch.factor);
    for (int64_t r = 0; r < rows; ++r) {
      if (scratch.factor[r] != A(1)) ScaleRow(scratch.o + r * v_width, scratch.factor[r], v_width);
    }
    GemmBlock(GemmBlockArgs<A>{rows, v_width, keys, scratch.s, 1, kRows, v.data, v.stride,
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
  const A scale = static_cast<A>(a.options.scale);
  if (block.rows() < kRows) {
    std::fill(scratch.qt, scratch.qt + dqk * kRows, A(0));
    std::fill(scratch.d_ot, scratch.d_ot + dv * kRows, A(0));
    std::fill(scratch.lse, scratch.lse + kRows, A(0));
    std::fill(scratch.delta, scratch.delta + kRows, A(0));
  }
  for (int64_t r = 0; r < block.rows(); ++r) {
    const int64_t t = seg.q_begin + block.query + r % block.queries;
    const int64_t head = block.head + r / block.queries;
    const T* q = At<T>(a.q, t, head);
    const T* d_o = At<T>(a.d_o, t, head);
    LoadColumn(q, scale, dqk, scratch.qt + r);
    LoadRow(q, scale, dqk, scratch.q + r * q_width, q_width);
    LoadColumn(d_o, A(1), dv, scratch.d_ot + r);
    LoadRow(d_o, A(1), dv, scratch.d_o + r * v_width, v_width);
    scratch.lse[r] = a.lse.As<A>()[head * a.lse.dim(1) + t];
    scratch.delta[r] = DotRow(d_o, At<T>(a.o, t, head), dv);
  }
  std::fill(scratch.dq, scratch.dq + block.rows() * q_width, A(0));
}

// From scores in scratch.p and dP in scratch.ds: probabilities and gradients of the scores.
template <typename A>
void DifferentiateScores(const AttentionOptions& options, const RowRanges& seen, int64_t j0,
                         int64_t keys, const BackwardScratch<A>& scratch) {
  const A softcap = static_cast<A>(options.softcap);
  A slope[kKeys * kRows];
  if (softcap > 0) {
    Cap(scratch.p, softcap, keys * kRows);
    for (int64_t i = 0; i < keys * kRows; ++i) {
      slope[i] = A(1) - (scratch.p[i] / softcap) * (scratch.p[i] / softcap);
    }
  }
  DifferentiateBlock(scratch.p, scratch.ds, keys, scratch.lse, scratch.delta);
  if (!seen.AllSee(j0, keys)) {  // after it: what a hidden score gave may be infinite
    MaskScores(scratch.p, seen.begin, seen.end, j0, keys, A(0));
    MaskScores(scratch.ds, seen.begin, seen.end, j0, keys, A(0));
  }
  if (softcap > 0) {
    for (int64_t i = 0; i < keys * kRows; ++i) scratch.ds[i] *= slope[i];
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
  const RowRanges seen(a.options, seg, block);
  for (int64_t j0 = seen.first / kKeys * kKeys; j0 < seen.last; j0 += kKeys) {
    const int64_t keys = std::min(kKeys, seen.last - j0);
    const Lines<A> k = LoadKeys<T>(a.k, seg.k_begin + j0, key_head, keys, scratch.k);
    const Lines<A> v = LoadKeys<T>(a.v, seg.k_begin + j0, key_head, keys, scratch.v);
    GemmBlock(GemmBlockArgs<A>{keys, kRows, dqk, k.data, k.stride, 1, scratch.qt, kRows, scratch.p,
                               kRows, false});
    GemmBlock(GemmBlockArgs<A>{keys, kRows, dv, v.data, v.stride, 1, scratch.d_ot, kRows,
                               scratch.ds, kRows, false});
    DifferentiateScores(a.options, seen, j0, keys, scratch);
    GemmBlock(GemmBlockArgs<A>{keys, v_width, rows, scratch.p, kRows, 1, scratch.d_o, v_width,
                               dv_sum + j0 * v_width, v_width, true});
    GemmBlock(GemmBlockArgs<A>{keys, q_width, rows, scratch.ds, kRows, 1, scratch.q, q_width,
                               dk + j0 * q_width, q_width, true});
    GemmBlock(GemmBlockArgs<A>{rows, q_width, keys, scratch.ds, 1, kRows, k.data, k.stride,
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
