// RMSNorm of heads and RoPE on CUDA: a warp owns a head of a token. Lanes take pairs of elements
// that turn together, in packs of N, and after them the elements that do not turn.
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

// Calls f.operator()<T, N>(): packs of two where heads and half heads are made of them.
template <typename F>
void Dispatch(const Shape& shape, DType dtype, std::initializer_list<const TensorView*> views,
              F&& f) {
  DispatchCudaFloat(dtype, [&]<typename T>() {
    if (shape.half % 2 == 0 && Packable(2, views)) return f.template operator()<T, 2>();
    f.template operator()<T, 1>();
  });
}

}  // namespace

void QkNormForwardCuda(const Exec& exec, const QkNormForwardArgs& a) {
  const Shape shape = ShapeOf(a, a.eps);
  if (shape.units == 0) return;
  Dispatch(shape, a.x.dtype, {&a.x, &a.y, &a.w, &a.cos, &a.sin}, [&]<typename T, int N>() {
    const Forward<T> args{
        shape,          HeadsOf<const T>(a.x), HeadsOf<T>(a.y),    Data<const T>(a.w),
        TableOf(a.cos), TableOf(a.sin),        Data<float>(a.rstd)};
    ForwardKernel<T, N><<<Blocks(shape.units), kThreads, 0, StreamOf(exec.stream)>>>(args);
  });
  CUDA_CHECK(cudaGetLastError());
}

void QkNormBackwardCuda(const Exec& exec, const QkNormBackwardArgs& a) {
  const Shape shape = ShapeOf(a, 0.0);
  if (shape.units == 0) return;
  Dispatch(shape, a.x.dtype, {&a.dy, &a.x, &a.dx, &a.w, &a.cos, &a.sin}, [&]<typename T, int N>() {
    const Backward<T> args{shape,
                           HeadsOf<const T>(a.dy),
                           HeadsOf<const T>(a.x),
                           HeadsOf<T>(a.dx),
                           Data<const T>(a.w),
                           TableOf(a.cos),
                           TableOf(a.sin),
                           Data<const float>(a.rstd)};
    BackwardKernel<T, N><<<Blocks(shape.units), kThreads, 0, StreamOf(exec.stream)>>>(args);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
