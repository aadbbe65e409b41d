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

// The row is the token; the column counts through heads * half.
template <typename T, int N>
struct Rotate {
  static constexpr int kPack = N;
  T* x;
  int64_t token_stride, head_stride;
  Rows<const float> cos, sin;
  uint32_t half;
  float sign;
  __device__ void operator()(int64_t t, int64_t column) const {
    const uint32_t head = static_cast<uint32_t>(column) / half;
    const uint32_t i = static_cast<uint32_t>(column) - head * half;
    T* at = x + t * token_stride + head * head_stride + i;
    Pack<T, N> first = Pack<T, N>::Load(at), second = Pack<T, N>::Load(at + half);
    const Pack<float, N> c = Pack<float, N>::Load(cos(t, i)), s = Pack<float, N>::Load(sin(t, i));
    for (int k = 0; k < N; ++k) {
      const float a = first[k], b = second[k], sine = sign * s[k];
      first.Set(k, a * c[k] - b * sine);
      second.Set(k, b * c[k] + a * sine);
    }
    first.Store(at);
    second.Store(at + half);
  }
};

template <typename T>
void Run(const Exec& exec, const RopeArgs& a) {
  const int64_t half = a.rotary_dim / 2, heads = a.x.dim(1);
  if (half == 0) return;
  CHECK(heads * half < (int64_t{1} << 32));
  const auto run = [&]<int N>() {
    ForEachPack(Rotate<T, N>{Data<T>(a.x), a.x.stride(0), a.x.stride(1), RowsOf<const float>(a.cos),
                             RowsOf<const float>(a.sin), static_cast<uint32_t>(half),
                             a.inverse ? -1.0f : 1.0f},
                a.x.dim(0), heads * half, exec.stream);
  };
  constexpr int N = kPackSize<T>;
  if (half % N == 0 && Packable(N, {&a.x, &a.cos, &a.sin})) return run.template operator()<N>();
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
