// What forward and backward on the CPU share: attention in the manner of FlashAttention, blocks of
// queries against blocks of keys.
//
// A block holds kRows rows: the query heads that share a key head, times as many queries as fit,
// so that a block of keys serves all of them. Row r is query r % queries of head r / queries.
// Scores lie transposed, (keys, rows): maxima and sums then run over lanes, keys and values are
// read where they are, and only the queries are turned, once a block. Blocks start at the segment's
// begin, so a segment's sums are the same wherever it is packed.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/attention/attention.h"
#include "kernels/core/gemm_block.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"

namespace attune::attention_cpu {

constexpr int64_t kRows = 48;
constexpr int64_t kKeys = 64;

struct Segment {
  int64_t q_begin, q_length, k_begin, k_length, q_offset;
};

inline Segment SegmentAt(const AttentionSegments& s, int64_t i) {
  const int32_t* q_begin = s.q_begin.As<int32_t>();
  return {q_begin[i], q_begin[i + 1] - q_begin[i], s.k_begin.As<int32_t>()[i],
          s.k_length.As<int32_t>()[i], s.q_offset.As<int32_t>()[i]};
}

// The number of segments, all of which lie inside the tensors.
inline int64_t CheckedCount(const AttentionSegments& s, int64_t tq, int64_t tk) {
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
inline Range VisibleKeys(const AttentionOptions& o, int64_t p, int64_t k_length) {
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

// ---- Which keys a row sees ----

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

// ---- Tokens and heads ----

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

template <typename T>
void ClearRows(const TensorView& x, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < x.dim(1); ++h) {
      std::fill(At<T>(x, t, h), At<T>(x, t, h) + x.dim(2), T(AccumulatorOf<T>(0)));
    }
  }
}

// As many threads as the workspace was sized for, at most those that there are now; one for tiny
// inputs.
inline int ThreadsThatFit(const TensorView& q, int64_t bytes, int64_t bytes_per_thread) {
  if (!WorthThreads(q.size() * std::min<int64_t>(q.dim(0), 128) / 8)) return 1;
  return static_cast<int>(
      std::min<int64_t>(bytes / bytes_per_thread, std::max(omp_get_max_threads(), 1)));
}

constexpr int64_t AlignUp(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace attune::attention_cpu
