// A thread per pack: first those of [. | scale B], then those of A.
#include "kernels/core/cuda.cuh"
#include "kernels/lora/lora.h"

namespace attune {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Extension {
  struct Part {
    const T* a;
    const T* b;
    uint32_t begin, end;  // rows of W
  };
  Part part[kMaxLoraParts];
  uint32_t parts, r;
  uint32_t n, k, e;
  uint32_t beside, below;  // packs
  T* w;
  int64_t stride;
  float scale;
};

// N divides r, so that a pack beside W belongs to one part.
template <typename T, int N>
__global__ __launch_bounds__(kThreads) void ExtendKernel(const __grid_constant__ Extension<T> x) {
  using P = Pack<T, N>;
  AwaitEarlier();
  uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  P value;
  for (int j = 0; j < N; ++j) value.Set(j, 0.0f);
  if (i < x.beside) {
    const uint32_t row = i / (x.e / N), column = i % (x.e / N) * N, p = column / x.r;
    if (p < x.parts && row >= x.part[p].begin && row < x.part[p].end) {
      value = P::Load(x.part[p].b + int64_t{row - x.part[p].begin} * x.r + column - p * x.r);
      for (int j = 0; j < N; ++j) value.Set(j, x.scale * value[j]);
    }
    value.Store(x.w + row * x.stride + x.k + column);
    return;
  }
  i -= x.beside;
  if (i >= x.below) return;
  const uint32_t row = i / (x.k / N), column = i % (x.k / N) * N, p = row / x.r;
  if (p < x.parts) value = P::Load(x.part[p].a + int64_t{row - p * x.r} * x.k + column);
  value.Store(x.w + (int64_t{x.n} + row) * x.stride + column);
}

template <typename T>
void Run(const Exec& exec, const LoraExtendArgs& a) {
  Extension<T> x{};
  x.parts = static_cast<uint32_t>(a.parts.size());
  x.r = static_cast<uint32_t>(a.parts[0].a.dim(0));
  bool packs = x.r % kPackSize<T> == 0 && Packable(kPackSize<T>, {&a.w});
  for (uint32_t i = 0; i < x.parts; ++i) {
    const LoraExtendPart& part = a.parts[i];
    x.part[i] = {Data<const T>(part.a), Data<const T>(part.b),
                 static_cast<uint32_t>(part.row_begin),
                 static_cast<uint32_t>(part.row_begin + part.b.dim(0))};
    packs = packs && Packable(kPackSize<T>, {&part.a, &part.b});
  }
  x.k = static_cast<uint32_t>(a.parts[0].a.dim(1));
  x.e = static_cast<uint32_t>(a.w.dim(1)) - x.k;
  x.n = static_cast<uint32_t>(a.w.dim(0)) - x.e;
  x.w = Data<T>(a.w);
  x.stride = a.w.stride(0);
  x.scale = static_cast<float>(a.scale);
  const auto run = [&]<int N>() {
    const int64_t beside = a.beside ? int64_t{x.n} * x.e / N : 0;
    const int64_t below = a.below ? int64_t{x.k} * x.e / N : 0;
    if (beside + below == 0) return;
    CHECK(beside + below < int64_t{1} << 31);
    x.beside = static_cast<uint32_t>(beside);
    x.below = static_cast<uint32_t>(below);
    const unsigned blocks = static_cast<unsigned>((beside + below + kThreads - 1) / kThreads);
    LaunchEarly(exec.stream, {dim3(blocks), dim3(kThreads)}, ExtendKernel<T, N>, x);
  };
  packs ? run.template operator()<kPackSize<T>>() : run.template operator()<1>();
}

}  // namespace

void LoraExtendCuda(const Exec& exec, const LoraExtendArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() { Run<T>(exec, a); });
}

}  // namespace attune
