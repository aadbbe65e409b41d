// What the kernels of attention see of its arguments: heads, segments, and who sees whom.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/core/cuda.cuh"

namespace attune::attention_cuda {

template <typename T>
struct Heads {
  T* data;
  int64_t token, head;  // strides
  __device__ T* operator()(int64_t t, int64_t h) const { return data + t * token + h * head; }
};
template <typename T>
Heads<T> HeadsOf(const TensorView& x) {
  return {static_cast<T*>(x.data), x.stride(0), x.stride(1)};
}

struct Segments {
  const int32_t *count, *q_begin, *k_begin, *k_length, *q_offset;
};
inline Segments SegmentsOf(const AttentionSegments& s) {
  return {Data<const int32_t>(s.num_segments), Data<const int32_t>(s.q_begin),
          Data<const int32_t>(s.k_begin), Data<const int32_t>(s.k_length),
          Data<const int32_t>(s.q_offset)};
}

struct Shape {
  int64_t tq, tk;
  int hq, hk;
  int dqk, dv;
  bool causal;
  int window;
  float scale, softcap;
  bool packed;  // rows of the inputs can be read 16 bytes at a time
};
template <typename Args>
Shape ShapeOf(const Args& a, bool packed) {
  return {a.q.dim(0),
          a.k.dim(0),
          static_cast<int>(a.q.dim(1)),
          static_cast<int>(a.k.dim(1)),
          static_cast<int>(a.q.dim(2)),
          static_cast<int>(a.v.dim(2)),
          a.options.mask == AttentionMask::kCausal,
          static_cast<int>(std::min<int64_t>(a.options.window, 1 << 30)),
          static_cast<float>(a.options.scale),
          static_cast<float>(a.options.softcap),
          packed};
}

struct Segment {
  int q_begin = 0, q_length = 0, k_begin = 0, k_length = 0, q_offset = 0;
};
__device__ inline Segment SegmentAt(const Segments& s, int i) {
  return {s.q_begin[i], s.q_begin[i + 1] - s.q_begin[i], s.k_begin[i], s.k_length[i],
          s.q_offset[i]};
}

struct Range {
  int begin, end;
};
// Key positions that a query at position p sees. Both ends ascend with p.
__device__ inline Range VisibleKeys(const Shape& shape, const Segment& seg, int p) {
  Range r{0, seg.k_length};
  if (shape.causal) {
    r.end = min(seg.k_length, p + 1);
  } else if (shape.window > 0) {
    r.end = min(seg.k_length, p + shape.window);
  }
  if (shape.window > 0) r.begin = max(0, p - shape.window + 1);
  return r;
}
// Queries of the segment, from 0, that see key position j. Both ends ascend with j.
__device__ inline Range VisibleQueries(const Shape& shape, const Segment& seg, int j) {
  Range r{0, seg.q_length};
  if (shape.causal) {
    r.begin = max(0, j - seg.q_offset);
  } else if (shape.window > 0) {
    r.begin = max(0, j - shape.window + 1 - seg.q_offset);
  }
  if (shape.window > 0) r.end = min(seg.q_length, j + shape.window - seg.q_offset);
  return r;
}

}  // namespace attune::attention_cuda
