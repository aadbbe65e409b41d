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

// The row is the token. The column counts through the pairs of all heads of the first RopeHeads,
// then through what is copied of them, then through the next RopeHeads.
template <typename T, int N>
struct Rotate {
  static constexpr int kPack = N;
  struct Part {
    Heads<T> x, y;
    uint32_t half, rest;      // of a head: pairs, and elements behind them that are copied
    uint32_t turned, copied;  // of all heads
  };
  Part part[kMaxRopeHeads];
  Rows<const float> cos, sin;
  float sign;

  __device__ void Turn(const Part& p, int64_t t, uint32_t column) const {
    const uint32_t head = column / p.half, i = column - head * p.half;
    Pack<T, N> first = Pack<T, N>::Load(p.x(t, head, i));
    Pack<T, N> second = Pack<T, N>::Load(p.x(t, head, i + p.half));
    const Pack<float, N> c = Pack<float, N>::Load(cos(t, i)), s = Pack<float, N>::Load(sin(t, i));
    for (int k = 0; k < N; ++k) {
      const float a = first[k], b = second[k], sine = sign * s[k];
      first.Set(k, a * c[k] - b * sine);
      second.Set(k, b * c[k] + a * sine);
    }
    first.Store(p.y(t, head, i));
    second.Store(p.y(t, head, i + p.half));
  }
  __device__ void operator()(int64_t t, int64_t at) const {
    uint32_t column = static_cast<uint32_t>(at);
#pragma unroll
    for (int k = 0; k < kMaxRopeHeads; ++k) {
      const Part& p = part[k];
      if (column < p.turned) return Turn(p, t, column);
      column -= p.turned;
      if (column < p.copied) {
        const uint32_t head = column / p.rest, i = 2 * p.half + column - head * p.rest;
        return Pack<T, N>::Load(p.x(t, head, i)).Store(p.y(t, head, i));
      }
      column -= p.copied;
    }
  }
};

// Elements of a head: those that are paired with another, and those that are copied.
int64_t HalfOf(const RopeArgs& a, const RopeHeads& heads) {
  return heads.turned ? a.rotary_dim / 2 : 0;
}
int64_t RestOf(const RopeArgs& a, const RopeHeads& heads) {
  return heads.y.defined() ? heads.x.dim(2) - 2 * HalfOf(a, heads) : 0;
}

template <typename T, int N>
void Run(const Exec& exec, const RopeArgs& a) {
  Rotate<T, N> op{};
  int64_t columns = 0;
  for (size_t k = 0; k < a.heads.size(); ++k) {
    const RopeHeads& heads = a.heads[k];
    const int64_t half = HalfOf(a, heads), rest = RestOf(a, heads), count = heads.x.dim(1);
    op.part[k] = {HeadsOf<T>(heads.x),
                  HeadsOf<T>(heads.y.defined() ? heads.y : heads.x),
                  static_cast<uint32_t>(half),
                  static_cast<uint32_t>(rest),
                  static_cast<uint32_t>(count * half),
                  static_cast<uint32_t>(count * rest)};
    columns += count * (half + rest);
  }
  CHECK(columns < (int64_t{1} << 32));
  op.cos = RowsOf<const float>(a.cos);
  op.sin = RowsOf<const float>(a.sin);
  op.sign = a.inverse ? -1.0f : 1.0f;
  ForEachPack(op, a.heads[0].x.dim(0), columns, exec.stream);
}

bool InPacks(int64_t n, const RopeArgs& a) {
  for (const RopeHeads& heads : a.heads) {
    if (!Packable(n, {&heads.x, &heads.y})) return false;
    if (HalfOf(a, heads) % n != 0 || RestOf(a, heads) % n != 0) return false;
    if (HalfOf(a, heads) > 0 && !Packable(n, {&a.cos, &a.sin})) return false;
  }
  return true;
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
  DispatchCudaFloat(a.heads[0].x.dtype, [&]<typename T>() {
    constexpr int N = kPackSize<T>;
    InPacks(N, a) ? Run<T, N>(exec, a) : Run<T, 1>(exec, a);
  });
}

}  // namespace attune
