// RoPE on CUDA: a block takes tokens, its threads the pairs of packs of every head.
#include "kernels/core/cuda.cuh"
#include "kernels/rope/rope.h"

namespace attune {
namespace {

struct Table {
  static constexpr int kPack = 1;
  const int32_t* positions;
  const float* inv_freq;
  float* cos;
  float* sin;
  int64_t half;
  double scaling;
  __device__ void operator()(int64_t t, int64_t i) const {
    const float angle = __fmul_rn(static_cast<float>(positions[t]), inv_freq[i]);
    double s, c;
    sincos(static_cast<double>(angle), &s, &c);
    cos[t * half + i] = static_cast<float>(c * scaling);
    sin[t * half + i] = static_cast<float>(s * scaling);
  }
};

template <typename T>
struct Heads {
  T* data;
  int64_t token_stride, head_stride;
  __device__ T* operator()(int64_t t, int64_t head, int64_t i) const {
    return data + t * token_stride + head * head_stride + i;
  }
};
template <typename T>
Heads<T> HeadsOf(const TensorView& x) {
  return {Data<T>(x), x.stride(0), x.stride(1)};
}

// The row is the token; the column counts through heads * half.
template <typename T, int N>
struct Rotate {
  static constexpr int kPack = N;
  Heads<T> x, y;
  Rows<const float> cos, sin;
  uint32_t half;
  float sign;
  __device__ void operator()(int64_t t, int64_t column) const {
    const uint32_t head = static_cast<uint32_t>(column) / half;
    const uint32_t i = static_cast<uint32_t>(column) - head * half;
    Pack<T, N> first = Pack<T, N>::Load(x(t, head, i));
    Pack<T, N> second = Pack<T, N>::Load(x(t, head, i + half));
    const Pack<float, N> c = Pack<float, N>::Load(cos(t, i)), s = Pack<float, N>::Load(sin(t, i));
    for (int k = 0; k < N; ++k) {
      const float a = first[k], b = second[k], sine = sign * s[k];
      first.Set(k, a * c[k] - b * sine);
      second.Set(k, b * c[k] + a * sine);
    }
    first.Store(y(t, head, i));
    second.Store(y(t, head, i + half));
  }
};

// What is not rotated, copied: the row is the token, the column counts through heads * rest.
template <typename T, int N>
struct CopyRest {
  static constexpr int kPack = N;
  Heads<T> x, y;
  uint32_t begin, rest;
  __device__ void operator()(int64_t t, int64_t column) const {
    const uint32_t head = static_cast<uint32_t>(column) / rest;
    const uint32_t i = begin + static_cast<uint32_t>(column) - head * rest;
    Pack<T, N>::Load(x(t, head, i)).Store(y(t, head, i));
  }
};

template <typename T>
void RunRest(const Exec& exec, const RopeArgs& a) {
  const int64_t rest = a.x.dim(2) - a.rotary_dim, heads = a.x.dim(1);
  if (rest == 0 || !a.y.defined()) return;
  const auto run = [&]<int N>() {
    ForEachPack(CopyRest<T, N>{HeadsOf<T>(a.x), HeadsOf<T>(a.y),
                               static_cast<uint32_t>(a.rotary_dim), static_cast<uint32_t>(rest)},
                a.x.dim(0), heads * rest, exec.stream);
  };
  constexpr int N = kPackSize<T>;
  const bool packs = rest % N == 0 && a.rotary_dim % N == 0 && Packable(N, {&a.x, &a.y});
  packs ? run.template operator()<N>() : run.template operator()<1>();
}

template <typename T>
void Run(const Exec& exec, const RopeArgs& a) {
  const int64_t half = a.rotary_dim / 2, heads = a.x.dim(1);
  CHECK(heads * a.x.dim(2) < (int64_t{1} << 32));
  RunRest<T>(exec, a);
  if (half == 0) return;
  const TensorView& y = a.y.defined() ? a.y : a.x;
  const auto run = [&]<int N>() {
    ForEachPack(Rotate<T, N>{HeadsOf<T>(a.x), HeadsOf<T>(y), RowsOf<const float>(a.cos),
                             RowsOf<const float>(a.sin), static_cast<uint32_t>(half),
                             a.inverse ? -1.0f : 1.0f},
                a.x.dim(0), heads * half, exec.stream);
  };
  constexpr int N = kPackSize<T>;
  if (half % N == 0 && Packable(N, {&a.x, &y, &a.cos, &a.sin})) return run.template operator()<N>();
  run.template operator()<1>();
}

}  // namespace

void RopeTableCuda(const Exec& exec, const RopeTableArgs& a) {
  CHECK(a.cos.dtype == DType::kF32);
  const int64_t half = a.inv_freq.dim(0);
  ForEachPack(Table{Data<const int32_t>(a.positions), Data<const float>(a.inv_freq),
                    Data<float>(a.cos), Data<float>(a.sin), half, a.attention_scaling},
              a.positions.dim(0), half, exec.stream);
}

void RopeCuda(const Exec& exec, const RopeArgs& a) {
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() { Run<T>(exec, a); });
}

}  // namespace attune
