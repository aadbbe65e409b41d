// RMSNorm of heads and RoPE on CUDA. Where whole heads turn and a warp holds some of them in packs
// of 16 bytes, it owns a token, whose angles and the weights it reads once: WholeForward,
// WholeBackward. Else it owns a head of a token; lanes take pairs of elements that turn together,
// in packs of N, and after them the elements that do not turn.
#include "kernels/core/cuda.cuh"
#include "kernels/qk_norm/qk_norm.h"

namespace attune {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Heads {
  T* data;
  int64_t token_stride, head_stride;
  __device__ T* operator()(int64_t t, int64_t head) const {
    return data + t * token_stride + head * head_stride;
  }
};
template <typename T>
Heads<T> HeadsOf(const TensorView& x) {
  return {static_cast<T*>(x.data), x.stride(0), x.stride(1)};
}

struct Shape {
  int64_t units, heads;  // units: tokens * heads
  int head_dim, half;    // half: R / 2
  float eps, offset;
};

// The unit of this warp.
__device__ int64_t OwnUnit() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
}

template <typename T>
struct Forward {
  Shape shape;
  Heads<const T> x;
  Heads<T> y;
  const T* w;
  Rows<const float> cos, sin;
  float* rstd;
};

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void ForwardKernel(Forward<T> a) {
  const Shape& s = a.shape;
  const int64_t unit = OwnUnit();
  if (unit >= s.units) return;
  const int64_t t = unit / s.heads, head = unit % s.heads;
  const int lane = threadIdx.x % 32;
  const T* x = a.x(t, head);
  T* y = a.y(t, head);
  float squares = 0.0f;
  for (int c = lane * N; c < s.head_dim; c += 32 * N) {
    const Pack<T, N> v = Pack<T, N>::Load(x + c);
    for (int k = 0; k < N; ++k) squares += v[k] * v[k];
  }
  const float rstd = 1.0f / sqrtf(WarpSum(squares) / static_cast<float>(s.head_dim) + s.eps);
  if (lane == 0) a.rstd[unit] = rstd;
  for (int i = lane * N; i < s.half; i += 32 * N) {
    Pack<T, N> first = Pack<T, N>::Load(x + i), second = Pack<T, N>::Load(x + s.half + i);
    const Pack<T, N> w1 = Pack<T, N>::Load(a.w + i), w2 = Pack<T, N>::Load(a.w + s.half + i);
    const Pack<float, N> c = Pack<float, N>::Load(a.cos(t, i));
    const Pack<float, N> sine = Pack<float, N>::Load(a.sin(t, i));
    for (int k = 0; k < N; ++k) {
      const float n1 = first[k] * (rstd * (w1[k] + s.offset));
      const float n2 = second[k] * (rstd * (w2[k] + s.offset));
      first.Set(k, n1 * c[k] - n2 * sine[k]);
      second.Set(k, n2 * c[k] + n1 * sine[k]);
    }
    first.Store(y + i);
    second.Store(y + s.half + i);
  }
  for (int c = 2 * s.half + lane * N; c < s.head_dim; c += 32 * N) {
    Pack<T, N> v = Pack<T, N>::Load(x + c);
    const Pack<T, N> w = Pack<T, N>::Load(a.w + c);
    for (int k = 0; k < N; ++k) v.Set(k, v[k] * (rstd * (w[k] + s.offset)));
    v.Store(y + c);
  }
}

template <typename T>
struct Backward {
  Shape shape;
  Heads<const T> dy, x;
  Heads<T> dx;
  const T* w;
  Rows<const float> cos, sin;
  const float* rstd;
};

// g of a pair of packs that turn together.
template <typename T, int N>
struct PairGradient {
  float first[N], second[N];
  __device__ PairGradient(const Backward<T>& a, const T* dy, int64_t t, int i) {
    const int half = a.shape.half;
    const float offset = a.shape.offset;
    const Pack<T, N> d1 = Pack<T, N>::Load(dy + i), d2 = Pack<T, N>::Load(dy + half + i);
    const Pack<T, N> w1 = Pack<T, N>::Load(a.w + i), w2 = Pack<T, N>::Load(a.w + half + i);
    const Pack<float, N> c = Pack<float, N>::Load(a.cos(t, i));
    const Pack<float, N> s = Pack<float, N>::Load(a.sin(t, i));
    for (int k = 0; k < N; ++k) {
      first[k] = (d1[k] * c[k] + d2[k] * s[k]) * (w1[k] + offset);
      second[k] = (d2[k] * c[k] - d1[k] * s[k]) * (w2[k] + offset);
    }
  }
};

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void BackwardKernel(Backward<T> a) {
  const Shape& s = a.shape;
  const int64_t unit = OwnUnit();
  if (unit >= s.units) return;
  const int64_t t = unit / s.heads, head = unit % s.heads;
  const int lane = threadIdx.x % 32;
  const T *dy = a.dy(t, head), *x = a.x(t, head);
  T* dx = a.dx(t, head);
  float products = 0.0f;
  for (int i = lane * N; i < s.half; i += 32 * N) {
    const PairGradient<T, N> g(a, dy, t, i);
    const Pack<T, N> x1 = Pack<T, N>::Load(x + i), x2 = Pack<T, N>::Load(x + s.half + i);
    for (int k = 0; k < N; ++k) products += g.first[k] * x1[k] + g.second[k] * x2[k];
  }
  for (int c = 2 * s.half + lane * N; c < s.head_dim; c += 32 * N) {
    const Pack<T, N> d = Pack<T, N>::Load(dy + c), v = Pack<T, N>::Load(x + c);
    const Pack<T, N> w = Pack<T, N>::Load(a.w + c);
    for (int k = 0; k < N; ++k) products += d[k] * (w[k] + s.offset) * v[k];
  }
  const float rstd = a.rstd[unit];
  const float mean = rstd * rstd * (WarpSum(products) / static_cast<float>(s.head_dim));
  for (int i = lane * N; i < s.half; i += 32 * N) {
    const PairGradient<T, N> g(a, dy, t, i);
    Pack<T, N> x1 = Pack<T, N>::Load(x + i), x2 = Pack<T, N>::Load(x + s.half + i);
    for (int k = 0; k < N; ++k) {
      x1.Set(k, rstd * (g.first[k] - x1[k] * mean));
      x2.Set(k, rstd * (g.second[k] - x2[k] * mean));
    }
    x1.Store(dx + i);
    x2.Store(dx + s.half + i);
  }
  for (int c = 2 * s.half + lane * N; c < s.head_dim; c += 32 * N) {
    const Pack<T, N> d = Pack<T, N>::Load(dy + c), w = Pack<T, N>::Load(a.w + c);
    Pack<T, N> v = Pack<T, N>::Load(x + c);
    for (int k = 0; k < N; ++k) v.Set(k, rstd * (d[k] * (w[k] + s.offset) - v[k] * mean));
    v.Store(dx + c);
  }
}

// ---- Whole heads ----

// kLanes lanes hold a head, each a pack of the first half and the one of the second half that turns
// with it. A warp has kGroups heads at a time, twice, and reads all of it before it computes.
template <typename T, int kLanes>
struct Whole {
  static constexpr int N = kPackSize<T>;
  static constexpr int kGroups = 32 / kLanes, kTurns = 2;
  Pack<float, N> cos, sin;
  float w[2][N];
  int64_t t;
  int lane, group;

  template <typename Args>
  __device__ Whole(const Args& a, int64_t token) : t(token) {
    lane = threadIdx.x % kLanes;
    group = threadIdx.x % 32 / kLanes;
    cos = Pack<float, N>::Load(a.cos(t, lane * N));
    sin = Pack<float, N>::Load(a.sin(t, lane * N));
    for (int side = 0; side < 2; ++side) {
      const Pack<T, N> own = Pack<T, N>::Load(a.w + side * a.shape.half + lane * N);
      for (int k = 0; k < N; ++k) w[side][k] = own[k] + a.shape.offset;
    }
  }
  // Of this thread in turn `turn` from `first` on.
  __device__ int64_t HeadOf(int64_t first, int turn) const {
    return first + turn * kGroups + group;
  }
  static __device__ float Sum(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
  }
};

template <typename T, int N>
struct Halves {
  Pack<T, N> first, second;
  __device__ static Halves Load(const T* head, int half, int lane) {
    return {Pack<T, N>::Load(head + lane * N), Pack<T, N>::Load(head + half + lane * N)};
  }
  __device__ void Store(T* head, int half, int lane) const {
    first.Store(head + lane * N);
    second.Store(head + half + lane * N);
  }
};

template <typename T, int kLanes>
__global__ __launch_bounds__(kThreads) void WholeForward(Forward<T> a, int64_t tokens) {
  using W = Whole<T, kLanes>;
  constexpr int N = W::N;
  const Shape& s = a.shape;
  const int64_t t = OwnUnit();
  if (t >= tokens) return;
  const W own(a, t);
  for (int64_t begin = 0; begin < s.heads; begin += W::kTurns * W::kGroups) {
    Halves<T, N> x[W::kTurns] = {};
#pragma unroll
    for (int turn = 0; turn < W::kTurns; ++turn) {
      const int64_t head = own.HeadOf(begin, turn);
      if (head < s.heads) x[turn] = Halves<T, N>::Load(a.x(t, head), s.half, own.lane);
    }
#pragma unroll
    for (int turn = 0; turn < W::kTurns; ++turn) {
      Halves<T, N>& v = x[turn];
      float squares = 0.0f;
      for (int k = 0; k < N; ++k) squares += v.first[k] * v.first[k];
      for (int k = 0; k < N; ++k) squares += v.second[k] * v.second[k];
      const float rstd = 1.0f / sqrtf(W::Sum(squares) / static_cast<float>(s.head_dim) + s.eps);
      const int64_t head = own.HeadOf(begin, turn);
      if (head >= s.heads) continue;
      if (own.lane == 0) a.rstd[t * s.heads + head] = rstd;
      for (int k = 0; k < N; ++k) {
        const float n1 = v.first[k] * (rstd * own.w[0][k]);
        const float n2 = v.second[k] * (rstd * own.w[1][k]);
        v.first.Set(k, n1 * own.cos[k] - n2 * own.sin[k]);
        v.second.Set(k, n2 * own.cos[k] + n1 * own.sin[k]);
      }
      v.Store(a.y(t, head), s.half, own.lane);
    }
  }
}

template <typename T, int kLanes>
__global__ __launch_bounds__(kThreads) void WholeBackward(Backward<T> a, int64_t tokens) {
  using W = Whole<T, kLanes>;
  constexpr int N = W::N;
  const Shape& s = a.shape;
  const int64_t t = OwnUnit();
  if (t >= tokens) return;
  const W own(a, t);
  for (int64_t begin = 0; begin < s.heads; begin += W::kTurns * W::kGroups) {
    Halves<T, N> dy[W::kTurns] = {}, x[W::kTurns] = {};
    float rstd[W::kTurns] = {};
#pragma unroll
    for (int turn = 0; turn < W::kTurns; ++turn) {
      const int64_t head = own.HeadOf(begin, turn);
      if (head >= s.heads) continue;
      dy[turn] = Halves<T, N>::Load(a.dy(t, head), s.half, own.lane);
      x[turn] = Halves<T, N>::Load(a.x(t, head), s.half, own.lane);
      rstd[turn] = a.rstd[t * s.heads + head];
    }
#pragma unroll
    for (int turn = 0; turn < W::kTurns; ++turn) {
      const Halves<T, N>& d = dy[turn];
      Halves<T, N>& v = x[turn];
      float g1[N], g2[N], products = 0.0f;
      for (int k = 0; k < N; ++k) {
        g1[k] = (d.first[k] * own.cos[k] + d.second[k] * own.sin[k]) * own.w[0][k];
        g2[k] = (d.second[k] * own.cos[k] - d.first[k] * own.sin[k]) * own.w[1][k];
        products += g1[k] * v.first[k] + g2[k] * v.second[k];
      }
      const float r = rstd[turn];
      const float mean = r * r * (W::Sum(products) / static_cast<float>(s.head_dim));
      const int64_t head = own.HeadOf(begin, turn);
      if (head >= s.heads) continue;
      for (int k = 0; k < N; ++k) {
        v.first.Set(k, r * (g1[k] - v.first[k] * mean));
        v.second.Set(k, r * (g2[k] - v.second[k] * mean));
      }
      v.Store(a.dx(t, head), s.half, own.lane);
    }
  }
}

template <typename Args>
Shape ShapeOf(const Args& a, double eps) {
  return {a.x.dim(0) * a.x.dim(1),      a.x.dim(1),
          static_cast<int>(a.x.dim(2)), static_cast<int>(a.rotary_dim / 2),
          static_cast<float>(eps),      static_cast<float>(a.weight_offset)};
}

Rows<const float> TableOf(const TensorView& x) {
  if (!x.defined()) return {nullptr, 0};
  return RowsOf<const float>(x);
}

unsigned Blocks(int64_t units) {
  return static_cast<unsigned>((units + kThreads / 32 - 1) / (kThreads / 32));
}

// Calls whole.operator()<T, lanes>() where whole heads turn, else heads.operator()<T, N>(): packs
// of two where heads and half heads are made of them.
template <typename F, typename G>
void Dispatch(const Shape& shape, DType dtype, std::initializer_list<const TensorView*> views,
              F&& whole, G&& heads) {
  DispatchCudaFloat(dtype, [&]<typename T>() {
    constexpr int N = kPackSize<T>;
    if (2 * shape.half == shape.head_dim && Packable(N, views)) {
      switch (shape.half / N) {
        case 4:
          return whole.template operator()<T, 4>();
        case 8:
          return whole.template operator()<T, 8>();
        case 16:
          return whole.template operator()<T, 16>();
        case 32:
          return whole.template operator()<T, 32>();
      }
    }
    if (shape.half % 2 == 0 && Packable(2, views)) return heads.template operator()<T, 2>();
    heads.template operator()<T, 1>();
  });
  CUDA_CHECK(cudaGetLastError());
}

template <typename T>
Forward<T> ForwardOf(const Shape& shape, const QkNormForwardArgs& a) {
  return {shape,          HeadsOf<const T>(a.x), HeadsOf<T>(a.y),    Data<const T>(a.w),
          TableOf(a.cos), TableOf(a.sin),        Data<float>(a.rstd)};
}
template <typename T>
Backward<T> BackwardOf(const Shape& shape, const QkNormBackwardArgs& a) {
  return {shape,
          HeadsOf<const T>(a.dy),
          HeadsOf<const T>(a.x),
          HeadsOf<T>(a.dx),
          Data<const T>(a.w),
          TableOf(a.cos),
          TableOf(a.sin),
          Data<const float>(a.rstd)};
}

}  // namespace

void QkNormForwardCuda(const Exec& exec, const QkNormForwardArgs& a) {
  const Shape shape = ShapeOf(a, a.eps);
  if (shape.units == 0) return;
  const int64_t tokens = a.x.dim(0);
  const cudaStream_t stream = StreamOf(exec.stream);
  Dispatch(
      shape, a.x.dtype, {&a.x, &a.y, &a.w, &a.cos, &a.sin},
      [&]<typename T, int kLanes>() {
        WholeForward<T, kLanes>
            <<<Blocks(tokens), kThreads, 0, stream>>>(ForwardOf<T>(shape, a), tokens);
      },
      [&]<typename T, int N>() {
        ForwardKernel<T, N><<<Blocks(shape.units), kThreads, 0, stream>>>(ForwardOf<T>(shape, a));
      });
}

void QkNormBackwardCuda(const Exec& exec, const QkNormBackwardArgs& a) {
  const Shape shape = ShapeOf(a, 0.0);
  if (shape.units == 0) return;
  const int64_t tokens = a.x.dim(0);
  const cudaStream_t stream = StreamOf(exec.stream);
  Dispatch(
      shape, a.x.dtype, {&a.dy, &a.x, &a.dx, &a.w, &a.cos, &a.sin},
      [&]<typename T, int kLanes>() {
        WholeBackward<T, kLanes>
            <<<Blocks(tokens), kThreads, 0, stream>>>(BackwardOf<T>(shape, a), tokens);
      },
      [&]<typename T, int N>() {
        BackwardKernel<T, N><<<Blocks(shape.units), kThreads, 0, stream>>>(BackwardOf<T>(shape, a));
      });
}

}  // namespace attune
