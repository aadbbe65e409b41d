// Attention on CUDA with kernels of our own: a warp owns a query (or, for dk and dv, a key), lanes
// take 32 keys (queries) at a time. Plain and exact in the order of its sums: for f32, for shapes
// that a library refuses, and as what a faster path is tested against.
//
// dq comes from one kernel and dk, dv from another, which computes the scores once more: so no two
// warps add to one element.
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cudnn.h"
#include "kernels/core/cuda.cuh"

namespace attune {
namespace {

constexpr int kWarps = 4;  // per block
constexpr int kThreads = 32 * kWarps;
constexpr int64_t kMaxHead = 512;

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

struct Shape {
  int64_t tq, tk, hq, hk;
  int dqk, dv;
  bool causal;
  int64_t window;
  float scale, softcap;
  bool packed;  // rows of q, k, v (and do) can be read 16 bytes at a time
};

struct Segment {
  int64_t q_begin = 0, q_length = 0, k_begin = 0, k_length = 0, q_offset = 0;
};

__device__ Segment SegmentAt(const Segments& s, int i) {
  return {s.q_begin[i], s.q_begin[i + 1] - s.q_begin[i], s.k_begin[i], s.k_length[i],
          s.q_offset[i]};
}

// The segment that owns query t; one without keys if none does.
__device__ Segment OwnerOfQuery(const Segments& s, int64_t t) {
  int low = 0, high = *s.count;  // the last segment that begins at or before t is in [low, high)
  if (high == 0 || s.q_begin[0] > t) return {};
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (s.q_begin[middle] <= t ? low : high) = middle;
  }
  const Segment out = SegmentAt(s, low);
  return t < out.q_begin + out.q_length ? out : Segment{};
}

// The segment that owns key t; one without queries if none does.
__device__ Segment OwnerOfKey(const Segments& s, int64_t t) {
  for (int i = 0; i < *s.count; ++i) {
    const int64_t begin = s.k_begin[i];
    if (begin <= t && t < begin + s.k_length[i]) return SegmentAt(s, i);
  }
  return {};
}

struct Range {
  int64_t begin, end;
};
// Key positions that a query at position p sees.
__device__ Range VisibleKeys(const Shape& shape, const Segment& seg, int64_t p) {
  Range r{0, seg.k_length};
  if (shape.causal) {
    r.end = min(seg.k_length, p + 1);
  } else if (shape.window > 0) {
    r.end = min(seg.k_length, p + shape.window);
  }
  if (shape.window > 0) r.begin = max(int64_t{0}, p - shape.window + 1);
  return r;
}
// Queries of the segment, from 0, that see key position j.
__device__ Range VisibleQueries(const Shape& shape, const Segment& seg, int64_t j) {
  Range r{0, seg.q_length};
  if (shape.causal) {
    r.begin = max(int64_t{0}, j - seg.q_offset);
  } else if (shape.window > 0) {
    r.begin = max(int64_t{0}, j - shape.window + 1 - seg.q_offset);
  }
  if (shape.window > 0) r.end = min(seg.q_length, j + shape.window - seg.q_offset);
  return r;
}

// `packed`: b may be read 16 bytes at a time. The order of the sum is the same.
template <typename T>
__device__ float Dot(const float* a, const T* b, int n, bool packed) {
  float sum = 0.0f;
  if (packed) {
    constexpr int N = kPackSize<T>;
    for (int c = 0; c < n; c += N) {
      const Pack<T, N> pack = Pack<T, N>::Load(b + c);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += a[c + i] * pack[i];
    }
    return sum;
  }
  for (int c = 0; c < n; ++c) sum += a[c] * ToFloat(b[c]);
  return sum;
}

__device__ float Score(const Shape& shape, float product, float* slope) {
  const float z = product * shape.scale;
  *slope = 1.0f;
  if (shape.softcap <= 0.0f) return z;
  const float t = tanhf(z / shape.softcap);
  *slope = 1.0f - t * t;
  return shape.softcap * t;
}

// A row of floats of this warp in shared memory, read by all its lanes.
template <typename T>
__device__ void LoadRow(const T* x, int n, float* row) {
  for (int c = threadIdx.x % 32; c < n; c += 32) row[c] = ToFloat(x[c]);
}

// kParts * 32 >= width of a head: element c of a row is part c / 32 of lane c % 32.
template <int kParts, typename T>
__device__ void AddScaled(const T* x, float factor, int n, float (&sum)[kParts]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int c = part * 32 + threadIdx.x % 32;
    if (c < n) sum[part] += factor * ToFloat(x[c]);
  }
}
template <int kParts, typename T>
__device__ void StoreRow(const float (&sum)[kParts], float factor, int n, T* x) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int c = part * 32 + threadIdx.x % 32;
    if (c < n) x[c] = FromFloat<T>(sum[part] * factor);
  }
}

template <typename T>
struct Forward {
  Shape shape;
  Segments segments;
  Heads<const T> q, k, v;
  Heads<T> o;
  float* lse;
};

template <typename T, int kParts>
__global__ __launch_bounds__(kThreads) void ForwardKernel(Forward<T> a) {
  __shared__ float rows[kWarps][kMaxHead];
  const Shape& shape = a.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= shape.tq * shape.hq) return;
  const int64_t t = unit / shape.hq, head = unit % shape.hq,
                key_head = head / (shape.hq / shape.hk);
  const Segment seg = OwnerOfQuery(a.segments, t);
  const Range seen = VisibleKeys(shape, seg, seg.q_offset + t - seg.q_begin);
  float* q = rows[warp];
  LoadRow(a.q(t, head), shape.dqk, q);
  __syncwarp();
  const float kNone = __int_as_float(0xff800000);
  float largest = kNone, total = 0.0f, o[kParts] = {};
  for (int64_t j0 = seen.begin; j0 < seen.end; j0 += 32) {
    const int64_t j = j0 + lane;
    float z = kNone, slope;
    if (j < seen.end) {
      z = Score(shape, Dot(q, a.k(seg.k_begin + j, key_head), shape.dqk, shape.packed), &slope);
    }
    const float before = largest;
    largest = fmaxf(largest, WarpMax(z));
    const float shift = largest == kNone ? 0.0f : largest;
    const float factor = expf(before - shift), p = expf(z - shift);
    total = total * factor + WarpSum(p);
    for (int part = 0; part < kParts; ++part) o[part] *= factor;
    const int keys = static_cast<int>(min(int64_t{32}, seen.end - j0));
    for (int i = 0; i < keys; ++i) {
      AddScaled<kParts>(a.v(seg.k_begin + j0 + i, key_head), __shfl_sync(0xffffffffu, p, i),
                        shape.dv, o);
    }
  }
  StoreRow<kParts>(o, total == 0.0f ? 0.0f : 1.0f / total, shape.dv, a.o(t, head));
  if (lane == 0) a.lse[t * shape.hq + head] = largest + logf(total);
}

template <typename T>
struct Backward {
  Shape shape;
  Segments segments;
  Heads<const T> q, k, v, o, d_o;
  const float* lse;
  float* delta;  // (Tq, Hq)
  Heads<T> dq, dk, dv;
};

// p and the gradient of the score (before scale) of one pair.
struct PairGradient {
  float p, ds;
};
__device__ PairGradient Differentiate(const Shape& shape, float product, float dp, float lse,
                                      float delta) {
  float slope;
  const float p = expf(Score(shape, product, &slope) - lse);
  return {p, p * (dp - delta) * slope};
}

// delta and dq: a warp per query and head.
template <typename T, int kParts>
__global__ __launch_bounds__(kThreads) void QueryGradientKernel(Backward<T> a) {
  __shared__ float rows[kWarps][2][kMaxHead];
  const Shape& shape = a.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= shape.tq * shape.hq) return;
  const int64_t t = unit / shape.hq, head = unit % shape.hq,
                key_head = head / (shape.hq / shape.hk);
  const Segment seg = OwnerOfQuery(a.segments, t);
  const Range seen = VisibleKeys(shape, seg, seg.q_offset + t - seg.q_begin);
  float *q = rows[warp][0], *d_o = rows[warp][1];
  LoadRow(a.q(t, head), shape.dqk, q);
  LoadRow(a.d_o(t, head), shape.dv, d_o);
  __syncwarp();
  float product = 0.0f;
  const T* o = a.o(t, head);
  for (int c = lane; c < shape.dv; c += 32) product += d_o[c] * ToFloat(o[c]);
  const float delta = WarpSum(product), lse = a.lse[t * shape.hq + head];
  if (lane == 0) a.delta[t * shape.hq + head] = delta;
  float dq[kParts] = {};
  for (int64_t j0 = seen.begin; j0 < seen.end; j0 += 32) {
    const int64_t token = seg.k_begin + j0 + lane;
    PairGradient g{0.0f, 0.0f};
    if (j0 + lane < seen.end) {
      g = Differentiate(shape, Dot(q, a.k(token, key_head), shape.dqk, shape.packed),
                        Dot(d_o, a.v(token, key_head), shape.dv, shape.packed), lse, delta);
    }
    const int keys = static_cast<int>(min(int64_t{32}, seen.end - j0));
    for (int i = 0; i < keys; ++i) {
      AddScaled<kParts>(a.k(seg.k_begin + j0 + i, key_head), __shfl_sync(0xffffffffu, g.ds, i),
                        shape.dqk, dq);
    }
  }
  StoreRow<kParts>(dq, shape.scale, shape.dqk, a.dq(t, head));
}

// dk and dv: a warp per key and key head, over the queries of every head that reads it.
template <typename T, int kParts>
__global__ __launch_bounds__(kThreads) void KeyGradientKernel(Backward<T> a) {
  __shared__ float rows[kWarps][2][kMaxHead];
  const Shape& shape = a.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= shape.tk * shape.hk) return;
  const int64_t t = unit / shape.hk, key_head = unit % shape.hk, group = shape.hq / shape.hk;
  const Segment seg = OwnerOfKey(a.segments, t);
  const Range seeing = VisibleQueries(shape, seg, t - seg.k_begin);
  float *k = rows[warp][0], *v = rows[warp][1];
  LoadRow(a.k(t, key_head), shape.dqk, k);
  LoadRow(a.v(t, key_head), shape.dv, v);
  __syncwarp();
  float dk[kParts] = {}, dv[kParts] = {};
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t i0 = seeing.begin; i0 < seeing.end; i0 += 32) {
      const int64_t query = seg.q_begin + i0 + lane;
      PairGradient g{0.0f, 0.0f};
      if (i0 + lane < seeing.end) {
        g = Differentiate(shape, Dot(k, a.q(query, head), shape.dqk, shape.packed),
                          Dot(v, a.d_o(query, head), shape.dv, shape.packed),
                          a.lse[query * shape.hq + head], a.delta[query * shape.hq + head]);
      }
      const int queries = static_cast<int>(min(int64_t{32}, seeing.end - i0));
      for (int i = 0; i < queries; ++i) {
        const int64_t token = seg.q_begin + i0 + i;
        AddScaled<kParts>(a.d_o(token, head), __shfl_sync(0xffffffffu, g.p, i), shape.dv, dv);
        AddScaled<kParts>(a.q(token, head), __shfl_sync(0xffffffffu, g.ds, i), shape.dqk, dk);
      }
    }
  }
  StoreRow<kParts>(dk, shape.scale, shape.dqk, a.dk(t, key_head));
  StoreRow<kParts>(dv, 1.0f, shape.dv, a.dv(t, key_head));
}

template <typename Args>
Shape ShapeOf(const Args& a) {
  return {a.q.dim(0),
          a.k.dim(0),
          a.q.dim(1),
          a.k.dim(1),
          static_cast<int>(a.q.dim(2)),
          static_cast<int>(a.v.dim(2)),
          a.options.mask == AttentionMask::kCausal,
          a.options.window,
          static_cast<float>(a.options.scale),
          static_cast<float>(a.options.softcap),
          false};
}
Segments SegmentsOf(const AttentionSegments& s) {
  return {Data<const int32_t>(s.num_segments), Data<const int32_t>(s.q_begin),
          Data<const int32_t>(s.k_begin), Data<const int32_t>(s.k_length),
          Data<const int32_t>(s.q_offset)};
}

// Calls f.operator()<T, kParts>().
template <typename F>
void DispatchHead(const TensorView& q, const TensorView& v, F&& f) {
  const int64_t widest = std::max(q.dim(2), v.dim(2));
  CHECK(widest <= kMaxHead && "attention heads are at most 512 wide on CUDA");
  DispatchCudaFloat(q.dtype, [&]<typename T>() {
    if (widest <= 128) return f.template operator()<T, 4>();
    f.template operator()<T, kMaxHead / 32>();
  });
}
unsigned Blocks(int64_t warps) {
  return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

}  // namespace

void AttentionForwardCuda(const Exec& exec, const AttentionForwardArgs& a) {
  if (CudnnTakes(a) && CudnnForward(exec, a)) return;
  Shape shape = ShapeOf(a);
  shape.packed = Packable(16 / DTypeBytes(a.q.dtype), {&a.q, &a.k, &a.v});
  if (shape.tq == 0) return;
  DispatchHead(a.q, a.v, [&]<typename T, int kParts>() {
    const Forward<T> args{shape,
                          SegmentsOf(a.segments),
                          HeadsOf<const T>(a.q),
                          HeadsOf<const T>(a.k),
                          HeadsOf<const T>(a.v),
                          HeadsOf<T>(a.o),
                          Data<float>(a.lse)};
    ForwardKernel<T, kParts>
        <<<Blocks(shape.tq * shape.hq), kThreads, 0, StreamOf(exec.stream)>>>(args);
  });
  CUDA_CHECK(cudaGetLastError());
}

void AttentionBackwardCuda(const Exec& exec, const AttentionBackwardArgs& a) {
  if (CudnnTakes(a) && CudnnBackward(exec, a)) return;
  Shape shape = ShapeOf(a);
  shape.packed = Packable(16 / DTypeBytes(a.q.dtype), {&a.q, &a.k, &a.v, &a.d_o});
  const cudaStream_t stream = StreamOf(exec.stream);
  DispatchHead(a.q, a.v, [&]<typename T, int kParts>() {
    const Backward<T> args{shape,
                           SegmentsOf(a.segments),
                           HeadsOf<const T>(a.q),
                           HeadsOf<const T>(a.k),
                           HeadsOf<const T>(a.v),
                           HeadsOf<const T>(a.o),
                           HeadsOf<const T>(a.d_o),
                           Data<const float>(a.lse),
                           static_cast<float*>(a.workspace.data),
                           HeadsOf<T>(a.dq),
                           HeadsOf<T>(a.dk),
                           HeadsOf<T>(a.dv)};
    if (shape.tq > 0) {
      QueryGradientKernel<T, kParts><<<Blocks(shape.tq * shape.hq), kThreads, 0, stream>>>(args);
      CUDA_CHECK(cudaGetLastError());
    }
    if (shape.tk > 0) {
      KeyGradientKernel<T, kParts><<<Blocks(shape.tk * shape.hk), kThreads, 0, stream>>>(args);
      CUDA_CHECK(cudaGetLastError());
    }
  });
}

}  // namespace attune
