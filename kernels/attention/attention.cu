// Attention on CUDA: by cuDNN or by our own kernels on the tensor cores where they take it; else,
// for f32 and the widest heads, by the plain kernels here: a warp owns a query (or, for dk and dv,
// a key), lanes take 32 keys (queries) at a time.
//
// dq comes from one kernel and dk, dv from another, which computes the scores once more: so no two
// warps add to one element.
#include "kernels/attention/attention_cudnn.h"
#include "kernels/attention/attention_device.cuh"
#include "kernels/attention/attention_tiles.h"

namespace attune {

using namespace attention_cuda;  // NOLINT: the parts of this op

namespace {

constexpr int kWarps = 4;  // per block
constexpr int kThreads = 32 * kWarps;
constexpr int64_t kMaxHead = 512;

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

// Calls f.operator()<T, kParts>().
template <typename F>
void DispatchHead(const TensorView& q, const TensorView& v, F&& f) {
  const int64_t widest = std::max(q.dim(2), v.dim(2));
  CHECK(widest <= kMaxHead && "attention heads are at most 512 wide on CUDA");
  if (q.dtype == DType::kBF16) return f.template operator()<Bf16, kMaxHead / 32>();
  CHECK(q.dtype == DType::kF32);
  if (widest <= 128) return f.template operator()<float, 4>();
  f.template operator()<float, kMaxHead / 32>();
}
unsigned Blocks(int64_t warps) {
  return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

}  // namespace

void AttentionForwardCuda(const Exec& exec, const AttentionForwardArgs& a) {
  if (CudnnTakes(a) && CudnnForward(exec, a)) return;
  if (TilesTake(a)) return TilesForward(exec, a);
  const Shape shape = ShapeOf(a, Packable(16 / DTypeBytes(a.q.dtype), {&a.q, &a.k, &a.v}));
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
  if (CudnnTakes(exec, a) && CudnnBackward(exec, a)) return;
  if (TilesTake(a)) return TilesBackward(exec, a);
  const Shape shape = ShapeOf(a, Packable(16 / DTypeBytes(a.q.dtype), {&a.q, &a.k, &a.v, &a.d_o}));
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
