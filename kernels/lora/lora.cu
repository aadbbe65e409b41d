// A thread per pack of an expansion: first those of [. | scale B], then those of A.
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

constexpr int kMostAtOnce = 128;  // what 32 KiB of parameters hold
template <typename T, int kCount>
struct Extensions {
  Extension<T> of[kCount];
};

// N divides r, so that a pack beside W belongs to one part.
template <typename T, int N, int kCount>
__global__ __launch_bounds__(kThreads) void ExtendKernel(
    const __grid_constant__ Extensions<T, kCount> all) {
  using P = Pack<T, N>;
  AwaitEarlier();
  const Extension<T>& x = all.of[blockIdx.y];
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
bool InPacks(const LoraExtendArgs& a) {
  constexpr int N = kPackSize<T>;
  bool packs = a.parts[0].a.dim(0) % N == 0 && Packable(N, {&a.w});
  for (const LoraExtendPart& part : a.parts) packs = packs && Packable(N, {&part.a, &part.b});
  return packs;
}

template <typename T, int N>
Extension<T> ExtensionOf(const LoraExtendArgs& a) {
  Extension<T> x{};
  x.parts = static_cast<uint32_t>(a.parts.size());
  x.r = static_cast<uint32_t>(a.parts[0].a.dim(0));
  for (uint32_t i = 0; i < x.parts; ++i) {
    const LoraExtendPart& part = a.parts[i];
    x.part[i] = {Data<const T>(part.a), Data<const T>(part.b),
                 static_cast<uint32_t>(part.row_begin),
                 static_cast<uint32_t>(part.row_begin + part.b.dim(0))};
  }
  x.k = static_cast<uint32_t>(a.parts[0].a.dim(1));
  x.e = static_cast<uint32_t>(a.w.dim(1)) - x.k;
  x.n = static_cast<uint32_t>(a.w.dim(0)) - x.e;
  x.w = Data<T>(a.w);
  x.stride = a.w.stride(0);
  x.scale = static_cast<float>(a.scale);
  const int64_t beside = a.beside ? int64_t{x.n} * x.e / N : 0;
  const int64_t below = a.below ? int64_t{x.k} * x.e / N : 0;
  CHECK(beside + below < int64_t{1} << 31);
  x.beside = static_cast<uint32_t>(beside);
  x.below = static_cast<uint32_t>(below);
  return x;
}

// kCount: room for `all`.
template <typename T, int N, int kCount>
void Launch(const Exec& exec, std::span<const LoraExtendArgs> all) {
  Extensions<T, kCount> extensions{};
  uint32_t most = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    extensions.of[i] = ExtensionOf<T, N>(all[i]);
    most = std::max(most, extensions.of[i].beside + extensions.of[i].below);
  }
  if (most == 0) return;
  const dim3 grid((most + kThreads - 1) / kThreads, static_cast<unsigned>(all.size()));
  LaunchEarly(exec.stream, {grid, dim3(kThreads)}, ExtendKernel<T, N, kCount>, extensions);
}

template <typename T, int N>
void Run(const Exec& exec, std::span<const LoraExtendArgs> all) {
  if (all.size() == 1) return Launch<T, N, 1>(exec, all);
  for (size_t begin = 0; begin < all.size(); begin += kMostAtOnce) {
    const size_t count = std::min<size_t>(kMostAtOnce, all.size() - begin);
    Launch<T, N, kMostAtOnce>(exec, all.subspan(begin, count));
  }
}

}  // namespace

void LoraExtendAllCuda(const Exec& exec, const LoraExtendAllArgs& a) {
  DispatchCudaFloat(a.all.front().w.dtype, [&]<typename T>() {
    if (std::all_of(a.all.begin(), a.all.end(), InPacks<T>)) {
      return Run<T, kPackSize<T>>(exec, a.all);
    }
    Run<T, 1>(exec, a.all);
  });
}

}  // namespace attune
