// RMSNorm of heads and RoPE on CUDA. Where whole heads turn and a warp holds some of them in packs
// of 16 bytes, it owns a token, whose angles and the weights it reads once: WholeForward,
// WholeBackward. Else it owns a head of a token; lanes take pairs of elements that turn together,
// in packs of N, and after them the elements that do not turn.
#include "kernels/core/cuda.cuh"
#include "kernels/fp8/fp8.cuh"
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
  int64_t tokens;
  int heads;           // of all parts
  int head_dim, half;  // half: R / 2
  float eps, offset;
};

// The unit of this warp.
__device__ int64_t OwnUnit() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
}

// The heads of q, and of k.
template <typename Part>
struct Parts {
  Shape shape;
  Part part[kMaxQkNormHeads];
  Rows<const float> cos, sin;

  // The part that has head `head` of all, which becomes its own number of it.
  __device__ const Part& Of(int* head) const {
    int p = 0;
    while (*head >= part[p].heads) *head -= part[p++].heads;
    return part[p];
  }
};

template <typename T>
struct ForwardPart {
  int heads;
  Heads<const T> x;
  Heads<T> y;
  const T* w;
  float* rstd;
};
template <typename T>
using Forward = Parts<ForwardPart<T>>;

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void ForwardKernel(const __grid_constant__ Forward<T> a) {
  const Shape& s = a.shape;
  const int64_t unit = OwnUnit(), t = unit / s.heads;
  if (t >= s.tokens) return;
  AwaitEarlier();
  int head = static_cast<int>(unit % s.heads);
  const ForwardPart<T>& part = a.Of(&head);
  const int lane = threadIdx.x % 32;
  const T *x = part.x(t, head), *w = part.w;
  T* y = part.y(t, head);
  float squares = 0.0f;
  for (int c = lane * N; c < s.head_dim; c += 32 * N) {
    const Pack<T, N> v = Pack<T, N>::Load(x + c);
    for (int k = 0; k < N; ++k) squares += v[k] * v[k];
  }
  const float rstd = 1.0f / sqrtf(WarpSum(squares) / static_cast<float>(s.head_dim) + s.eps);
  if (lane == 0) part.rstd[t * part.heads + head] = rstd;
  for (int i = lane * N; i < s.half; i += 32 * N) {
    Pack<T, N> first = Pack<T, N>::Load(x + i), second = Pack<T, N>::Load(x + s.half + i);
    const Pack<T, N> w1 = Pack<T, N>::Load(w + i), w2 = Pack<T, N>::Load(w + s.half + i);
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
    const Pack<T, N> own = Pack<T, N>::Load(w + c);
    for (int k = 0; k < N; ++k) v.Set(k, v[k] * (rstd * (own[k] + s.offset)));
    v.Store(y + c);
  }
}

template <typename T>
struct BackwardPart {
  int heads;
  Heads<const T> dy, x;
  Heads<T> dx;
  const T* w;
  const float* rstd;
};
template <typename T>
using Backward = Parts<BackwardPart<T>>;

// g of a pair of packs that turn together.
template <typename T, int N>
struct PairGradient {
  float first[N], second[N];
  __device__ PairGradient(const Backward<T>& a, const T* w, const T* dy, int64_t t, int i) {
    const int half = a.shape.half;
    const float offset = a.shape.offset;
    const Pack<T, N> d1 = Pack<T, N>::Load(dy + i), d2 = Pack<T, N>::Load(dy + half + i);
    const Pack<T, N> w1 = Pack<T, N>::Load(w + i), w2 = Pack<T, N>::Load(w + half + i);
    const Pack<float, N> c = Pack<float, N>::Load(a.cos(t, i));
    const Pack<float, N> s = Pack<float, N>::Load(a.sin(t, i));
    for (int k = 0; k < N; ++k) {
      first[k] = (d1[k] * c[k] + d2[k] * s[k]) * (w1[k] + offset);
      second[k] = (d2[k] * c[k] - d1[k] * s[k]) * (w2[k] + offset);
    }
  }
};

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void BackwardKernel(const __grid_constant__ Backward<T> a) {
  const Shape& s = a.shape;
  const int64_t unit = OwnUnit(), t = unit / s.heads;
  if (t >= s.tokens) return;
  AwaitEarlier();
  int head = static_cast<int>(unit % s.heads);
  const BackwardPart<T>& part = a.Of(&head);
  const int lane = threadIdx.x % 32;
  const T *dy = part.dy(t, head), *x = part.x(t, head), *w = part.w;
  T* dx = part.dx(t, head);
  float products = 0.0f;
  for (int i = lane * N; i < s.half; i += 32 * N) {
    const PairGradient<T, N> g(a, w, dy, t, i);
    const Pack<T, N> x1 = Pack<T, N>::Load(x + i), x2 = Pack<T, N>::Load(x + s.half + i);
    for (int k = 0; k < N; ++k) products += g.first[k] * x1[k] + g.second[k] * x2[k];
  }
  for (int c = 2 * s.half + lane * N; c < s.head_dim; c += 32 * N) {
    const Pack<T, N> d = Pack<T, N>::Load(dy + c), v = Pack<T, N>::Load(x + c);
    const Pack<T, N> own = Pack<T, N>::Load(w + c);
    for (int k = 0; k < N; ++k) products += d[k] * (own[k] + s.offset) * v[k];
  }
  const float rstd = part.rstd[t * part.heads + head];
  const float mean = rstd * rstd * (WarpSum(products) / static_cast<float>(s.head_dim));
  for (int i = lane * N; i < s.half; i += 32 * N) {
    const PairGradient<T, N> g(a, w, dy, t, i);
    Pack<T, N> x1 = Pack<T, N>::Load(x + i), x2 = Pack<T, N>::Load(x + s.half + i);
    for (int k = 0; k < N; ++k) {
      x1.Set(k, rstd * (g.first[k] - x1[k] * mean));
      x2.Set(k, rstd * (g.second[k] - x2[k] * mean));
    }
    x1.Store(dx + i);
    x2.Store(dx + s.half + i);
  }
  for (int c = 2 * s.half + lane * N; c < s.head_dim; c += 32 * N) {
    const Pack<T, N> d = Pack<T, N>::Load(dy + c), own = Pack<T, N>::Load(w + c);
    Pack<T, N> v = Pack<T, N>::Load(x + c);
    for (int k = 0; k < N; ++k) v.Set(k, rstd * (d[k] * (own[k] + s.offset) - v[k] * mean));
    v.Store(dx + c);
  }
}

// ---- Whole heads ----

// kLanes lanes hold a head, each a pack of the first half and the one of the second half that turns
// with it. A warp has kGroups heads in a turn, and reads those of kTurns before it computes: as
// many as leave enough warps on a multiprocessor.
template <typename T, int kLanes, int kTurns_>
struct Whole {
  static constexpr int N = kPackSize<T>, kTurns = kTurns_;
  static constexpr int kGroups = 32 / kLanes, kHeads = kTurns * kGroups;
  using P = Words<T, N>;
  Pack<float, N> cos, sin;
  P w1, w2;
  float offset;
  int64_t t;
  int lane, group, half;

  template <typename Args>
  __device__ Whole(const Args& a, int64_t token)
      : offset(a.shape.offset),
        t(token),
        lane(threadIdx.x % kLanes),
        group(threadIdx.x % 32 / kLanes),
        half(a.shape.half) {
    cos = Pack<float, N>::Load(a.cos(t, lane * N));
    sin = Pack<float, N>::Load(a.sin(t, lane * N));
  }
  __device__ void LoadWeights(const T* w) {
    w1 = P::Load(w + lane * N);
    w2 = P::Load(w + half + lane * N);
  }
  // Of this thread in turn `turn` from `first` on.
  __device__ int HeadOf(int first, int turn) const { return first + turn * kGroups + group; }
  __device__ float2 CosOf(int pair) const { return {cos[2 * pair], cos[2 * pair + 1]}; }
  __device__ float2 SinOf(int pair) const { return {sin[2 * pair], sin[2 * pair + 1]}; }
  // The weights of a pair of each half, times `factor`.
  __device__ float2 FirstOf(int pair, float factor) const { return Scaled(w1.Pair(pair), factor); }
  __device__ float2 SecondOf(int pair, float factor) const { return Scaled(w2.Pair(pair), factor); }
  static __device__ float Sum(float x) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, other);
    }
    return x;
  }

 private:
  __device__ float2 Scaled(float2 w, float factor) const {
    return {factor * (w.x + offset), factor * (w.y + offset)};
  }
};

template <typename W>
struct Halves {
  typename W::P first, second;
  template <typename T>
  __device__ static Halves Load(const T* head, const W& own) {
    return {W::P::Load(head + own.lane * W::N), W::P::Load(head + own.half + own.lane * W::N)};
  }
  template <typename T>
  __device__ void Store(T* head, const W& own) const {
    first.Store(head + own.lane * W::N);
    second.Store(head + own.half + own.lane * W::N);
  }
};

template <typename T, int kLanes>
__global__ __launch_bounds__(kThreads, 3) void WholeForward(const __grid_constant__ Forward<T> a) {
  using W = Whole<T, kLanes, 2>;
  const int64_t t = OwnUnit();
  if (t >= a.shape.tokens) return;
  AwaitEarlier();
  W own(a, t);
  for (const auto& part : a.part) {
    const int heads = part.heads;
    if (heads == 0) break;
    own.LoadWeights(part.w);
    for (int begin = 0; begin < heads; begin += W::kHeads) {
      Halves<W> x[W::kTurns] = {};
#pragma unroll
      for (int turn = 0; turn < W::kTurns; ++turn) {
        const int head = own.HeadOf(begin, turn);
        if (head < heads) x[turn] = Halves<W>::Load(part.x(t, head), own);
      }
#pragma unroll
      for (int turn = 0; turn < W::kTurns; ++turn) {
        Halves<W>& v = x[turn];
        float squares = 0.0f;
#pragma unroll
        for (int p = 0; p < W::P::kPairs; ++p) {
          const float2 x1 = v.first.Pair(p), x2 = v.second.Pair(p);
          squares += x1.x * x1.x + x1.y * x1.y + x2.x * x2.x + x2.y * x2.y;
        }
        const float mean = W::Sum(squares) / static_cast<float>(a.shape.head_dim);
        const float rstd = 1.0f / sqrtf(mean + a.shape.eps);
        const int head = own.HeadOf(begin, turn);
        if (head >= heads) continue;
        if (own.lane == 0) part.rstd[t * heads + head] = rstd;
#pragma unroll
        for (int p = 0; p < W::P::kPairs; ++p) {
          const float2 x1 = v.first.Pair(p), x2 = v.second.Pair(p), w1 = own.FirstOf(p, rstd),
                       w2 = own.SecondOf(p, rstd), c = own.CosOf(p), s = own.SinOf(p);
          const float2 n1 = {x1.x * w1.x, x1.y * w1.y}, n2 = {x2.x * w2.x, x2.y * w2.y};
          v.first.SetPair(p, {n1.x * c.x - n2.x * s.x, n1.y * c.y - n2.y * s.y});
          v.second.SetPair(p, {n2.x * c.x + n1.x * s.x, n2.y * c.y + n1.y * s.y});
        }
        v.Store(part.y(t, head), own);
      }
    }
  }
}

template <typename T, int kLanes>
__global__ __launch_bounds__(kThreads,
                             3) void WholeBackward(const __grid_constant__ Backward<T> a) {
  using W = Whole<T, kLanes, 1>;
  const int64_t t = OwnUnit();
  if (t >= a.shape.tokens) return;
  AwaitEarlier();
  W own(a, t);
  for (const auto& part : a.part) {
    const int heads = part.heads;
    if (heads == 0) break;
    own.LoadWeights(part.w);
    for (int begin = 0; begin < heads; begin += W::kHeads) {
      Halves<W> dy[W::kTurns] = {}, x[W::kTurns] = {};
      float rstd[W::kTurns] = {};
#pragma unroll
      for (int turn = 0; turn < W::kTurns; ++turn) {
        const int head = own.HeadOf(begin, turn);
        if (head >= heads) continue;
        dy[turn] = Halves<W>::Load(part.dy(t, head), own);
        x[turn] = Halves<W>::Load(part.x(t, head), own);
        rstd[turn] = part.rstd[t * heads + head];
      }
#pragma unroll
      for (int turn = 0; turn < W::kTurns; ++turn) {
        Halves<W>& v = x[turn];
        const float r = rstd[turn];
        // g of a pair of each half, times r.
        const auto gradient = [&](int p, float2* g1, float2* g2) {
          const float2 d1 = dy[turn].first.Pair(p), d2 = dy[turn].second.Pair(p), c = own.CosOf(p),
                       s = own.SinOf(p), w1 = own.FirstOf(p, r), w2 = own.SecondOf(p, r);
          *g1 = {(d1.x * c.x + d2.x * s.x) * w1.x, (d1.y * c.y + d2.y * s.y) * w1.y};
          *g2 = {(d2.x * c.x - d1.x * s.x) * w2.x, (d2.y * c.y - d1.y * s.y) * w2.y};
        };
        float products = 0.0f;
#pragma unroll
        for (int p = 0; p < W::P::kPairs; ++p) {
          const float2 x1 = v.first.Pair(p), x2 = v.second.Pair(p);
          float2 g1, g2;
          gradient(p, &g1, &g2);
          products += g1.x * x1.x + g1.y * x1.y + g2.x * x2.x + g2.y * x2.y;
        }
        const float mean = r * r * (W::Sum(products) / static_cast<float>(a.shape.head_dim));
        const int head = own.HeadOf(begin, turn);
        if (head >= heads) continue;
#pragma unroll
        for (int p = 0; p < W::P::kPairs; ++p) {
          const float2 x1 = v.first.Pair(p), x2 = v.second.Pair(p);
          float2 g1, g2;
          gradient(p, &g1, &g2);
          v.first.SetPair(p, {g1.x - x1.x * mean, g1.y - x1.y * mean});
          v.second.SetPair(p, {g2.x - x2.x * mean, g2.y - x2.y * mean});
        }
        v.Store(part.dx(t, head), own);
      }
    }
  }
}

template <typename Args>
Shape ShapeOf(const Args& a, double eps) {
  const TensorView& x = a.heads[0].x;
  int64_t heads = 0;
  for (const auto& of : a.heads) heads += of.x.dim(1);
  return {x.dim(0),
          static_cast<int>(heads),
          static_cast<int>(x.dim(2)),
          static_cast<int>(a.rotary_dim / 2),
          static_cast<float>(eps),
          static_cast<float>(a.weight_offset)};
}

Rows<const float> TableOf(const TensorView& x) {
  if (!x.defined()) return {nullptr, 0};
  return RowsOf<const float>(x);
}

unsigned Blocks(int64_t units) {
  return static_cast<unsigned>((units + kThreads / 32 - 1) / (kThreads / 32));
}

// Starts `whole` where whole heads turn, else `heads`, of packs of two where heads and half heads
// are made of them. packable(n): whether all rows are in packs of n.
template <typename T, typename Args, typename Packed, typename Whole, typename Each>
void Launch(const Exec& exec, const Args& args, Packed&& packable, Whole&& whole, Each&& each) {
  constexpr int N = kPackSize<T>;
  const Shape& shape = args.shape;
  if (shape.tokens * shape.heads == 0) return;
  const auto launch = [&](int64_t units, auto kernel) {
    LaunchEarly(exec.stream, {dim3(Blocks(units)), dim3(kThreads)}, kernel, args);
  };
  if (2 * shape.half == shape.head_dim && packable(N)) {
    switch (shape.half / N) {
      case 4:
        return launch(shape.tokens, whole.template operator()<4>());
      case 8:
        return launch(shape.tokens, whole.template operator()<8>());
      case 16:
        return launch(shape.tokens, whole.template operator()<16>());
      case 32:
        return launch(shape.tokens, whole.template operator()<32>());
    }
  }
  const int64_t units = shape.tokens * shape.heads;
  if (shape.half % 2 == 0 && packable(2)) return launch(units, each.template operator()<2>());
  launch(units, each.template operator()<1>());
}

}  // namespace

void QkNormForwardCuda(const Exec& exec, const QkNormForwardArgs& a) {
  DispatchCudaFloat(a.heads[0].x.dtype, [&]<typename T>() {
    Forward<T> args{ShapeOf(a, a.eps), {}, TableOf(a.cos), TableOf(a.sin)};
    for (size_t i = 0; i < a.heads.size(); ++i) {
      const QkNormHeads& of = a.heads[i];
      args.part[i] = {static_cast<int>(of.x.dim(1)), HeadsOf<const T>(of.x), HeadsOf<T>(of.y),
                      Data<const T>(of.w), Data<float>(of.rstd)};
    }
    const auto packable = [&](int64_t n) {
      return Packable(n, {&a.cos, &a.sin}) &&
             std::all_of(a.heads.begin(), a.heads.end(), [&](const QkNormHeads& of) {
               return Packable(n, {&of.x, &of.y, &of.w});
             });
    };
    Launch<T>(
        exec, args, packable, []<int kLanes>() { return WholeForward<T, kLanes>; },
        []<int N>() { return ForwardKernel<T, N>; });
  });
}

void QkNormBackwardCuda(const Exec& exec, const QkNormBackwardArgs& a) {
  DispatchCudaFloat(a.heads[0].x.dtype, [&]<typename T>() {
    Backward<T> args{ShapeOf(a, 0.0), {}, TableOf(a.cos), TableOf(a.sin)};
    for (size_t i = 0; i < a.heads.size(); ++i) {
      const QkNormHeadsBackward& of = a.heads[i];
      args.part[i] = {static_cast<int>(of.x.dim(1)), HeadsOf<const T>(of.dy),
                      HeadsOf<const T>(of.x),        HeadsOf<T>(of.dx),
                      Data<const T>(of.w),           Data<const float>(of.rstd)};
    }
    const auto packable = [&](int64_t n) {
      return Packable(n, {&a.cos, &a.sin}) &&
             std::all_of(a.heads.begin(), a.heads.end(), [&](const QkNormHeadsBackward& of) {
               return Packable(n, {&of.dy, &of.x, &of.dx, &of.w});
             });
    };
    Launch<T>(
        exec, args, packable, []<int kLanes>() { return WholeBackward<T, kLanes>; },
        []<int N>() { return BackwardKernel<T, N>; });
  });
}

}  // namespace attune
