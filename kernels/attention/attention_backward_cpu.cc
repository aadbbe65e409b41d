// Attention backward on the CPU. A thread takes, in turn, units of (segment, key head), since dk
// and dv sum over all its queries; they share only inputs.
#include "kernels/attention/attention_blocks_cpu.h"
#include "kernels/core/dispatch.h"

namespace attune {

using namespace attention_cpu;  // NOLINT: the parts of this op

namespace {

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
    scratch.lse[r] = a.lse.As<A>()[t * a.lse.dim(1) + head];
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
  const int threads = ThreadsThatFit(a.q, a.workspace.bytes() - layout.dk_bytes - layout.dv_bytes,
                                     layout.thread_bytes);
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
