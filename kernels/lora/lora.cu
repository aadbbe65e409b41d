// A thread per element: first the N E elements of [. | scale B], then the E K of A.
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
    int64_t begin, end;  // rows of W
  };
  Part part[kMaxLoraParts];
  int parts;
  int r;
  int64_t n, k, e;
  T* w;
  int64_t stride;
  float scale;
};

template <typename T>
__global__ __launch_bounds__(kThreads) void ExtendKernel(const __grid_constant__ Extension<T> x) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < x.n * x.e) {
    const int64_t row = i / x.e;
    const int column = static_cast<int>(i - row * x.e), p = column / x.r;
    float value = 0.0f;
    if (p < x.parts && row >= x.part[p].begin && row < x.part[p].end) {
      value = x.scale * ToFloat(x.part[p].b[(row - x.part[p].begin) * x.r + column - p * x.r]);
    }
    x.w[row * x.stride + x.k + column] = FromFloat<T>(value);
    return;
  }
  i -= x.n * x.e;
  if (i >= x.e * x.k) return;
  const int64_t row = i / x.k, column = i - row * x.k;
  const int p = static_cast<int>(row) / x.r;
  T value = FromFloat<T>(0.0f);
  if (p < x.parts) value = x.part[p].a[(row - static_cast<int64_t>(p) * x.r) * x.k + column];
  x.w[(x.n + row) * x.stride + column] = value;
}

template <typename T>
void Run(const Exec& exec, const LoraExtendArgs& a) {
  Extension<T> x{};
  x.parts = static_cast<int>(a.parts.size());
  for (int i = 0; i < x.parts; ++i) {
    const LoraExtendPart& part = a.parts[i];
    x.part[i] = {Data<const T>(part.a), Data<const T>(part.b), part.row_begin,
                 part.row_begin + part.b.dim(0)};
  }
  x.r = static_cast<int>(a.parts[0].a.dim(0));
  x.k = a.parts[0].a.dim(1);
  x.e = a.w.dim(1) - x.k;
  x.n = a.w.dim(0) - x.e;
  x.w = Data<T>(a.w);
  x.stride = a.w.stride(0);
  x.scale = static_cast<float>(a.scale);
  const int64_t elements = x.e * (x.n + x.k);
  if (elements == 0) return;
  const unsigned blocks = static_cast<unsigned>((elements + kThreads - 1) / kThreads);
  ExtendKernel<T><<<blocks, kThreads, 0, StreamOf(exec.stream)>>>(x);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void LoraExtendCuda(const Exec& exec, const LoraExtendArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() { Run<T>(exec, a); });
}

}  // namespace attune
