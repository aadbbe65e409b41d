// Attention forward on the CPU, with a running maximum and sum per row. A thread takes, in turn,
// units of (segment, block of queries, key head, chunk of its query heads); they share only inputs.
#include <limits>

#include "kernels/attention/attention_blocks_cpu.h"
#include "kernels/core/dispatch.h"

namespace attune {

using namespace attention_cpu;  // NOLINT: the parts of this op

namespace {

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

template <typename A>
ATTUNE_CLONES void ScaleRow(A* x, A factor, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

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
    a.lse.As<A>()[t * a.lse.dim(1) + head] = scratch.row_max[r] + std::log(sum);
  }
}

template <typename T>
void ClearUnownedQueries(const AttentionForwardArgs& a, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  ClearRows<T>(a.o, begin, end);
  std::fill(a.lse.As<A>() + begin * a.lse.dim(1), a.lse.As<A>() + end * a.lse.dim(1),
            -std::numeric_limits<A>::infinity());
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
  const int threads = ThreadsThatFit(a.q, a.workspace.bytes(), bytes);
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

}  // namespace

int64_t AttentionForwardWorkspaceBytesCpu(const Exec& exec, const AttentionForwardArgs& a) {
  int64_t bytes = 0;
  DispatchFloat(a.q.dtype, [&]<typename T>() { bytes = ForwardThreadBytes<T>(a); });
  return bytes * omp_get_max_threads();
}

void AttentionForwardCpu(const Exec& exec, const AttentionForwardArgs& a) {
  DispatchFloat(a.q.dtype, [&]<typename T>() { Forward<T>(a); });
}

}  // namespace attune
