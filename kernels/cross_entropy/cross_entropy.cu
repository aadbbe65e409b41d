// Cross entropy on CUDA: a block owns a row. One pass finds maximum, sum of exponentials (scaled as
// the maximum grows) and the first place of the maximum; a second writes the gradient.
#include <limits>

#include "kernels/core/cuda.cuh"
#include "kernels/cross_entropy/cross_entropy.h"

namespace attune {
namespace {

constexpr int kThreads = 512;

__device__ float Infinity() {
  return __int_as_float(0x7f800000);
}
__device__ float Capped(float x, float softcap) {
  return softcap > 0.0f ? softcap * tanhf(x / softcap) : x;
}

// Of some elements of a row: maximum, its first place, and sum of exp(element - maximum).
struct Peak {
  float z_max, sum;
  float x_max;  // before the cap: where tanh is flat, the larger logit counts
  int place;
  float total;  // of the elements themselves, for label smoothing
};

__device__ Peak Merge(const Peak& a, const Peak& b) {
  const float z_max = fmaxf(a.z_max, b.z_max);
  // A part without a finite element sums to 0 (or NaN), whatever the other's maximum is.
  const float from_a = a.z_max == z_max ? a.sum : a.sum * expf(a.z_max - z_max);
  const float from_b = b.z_max == z_max ? b.sum : b.sum * expf(b.z_max - z_max);
  const bool take_b = b.x_max > a.x_max || (b.x_max == a.x_max && b.place < a.place);
  return {z_max, from_a + from_b, take_b ? b.x_max : a.x_max, take_b ? b.place : a.place,
          a.total + b.total};
}

__device__ void Include(float x, int place, float softcap, Peak* peak) {
  const float z = Capped(x, softcap);
  peak->total += z;
  if (x > peak->x_max) {  // places ascend within a thread
    peak->x_max = x;
    peak->place = place;
  }
  if (z > peak->z_max) {
    peak->sum *= expf(peak->z_max - z);
    peak->z_max = z;
  }
  if (z != -Infinity()) peak->sum += expf(z - peak->z_max);  // NaN gets in
}

__device__ Peak BlockMerge(Peak peak) {
  __shared__ Peak partial[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    const Peak other{__shfl_down_sync(0xffffffffu, peak.z_max, offset),
                     __shfl_down_sync(0xffffffffu, peak.sum, offset),
                     __shfl_down_sync(0xffffffffu, peak.x_max, offset),
                     __shfl_down_sync(0xffffffffu, peak.place, offset),
                     __shfl_down_sync(0xffffffffu, peak.total, offset)};
    peak = Merge(peak, other);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = peak;
  __syncthreads();
  peak = partial[0];
  for (int w = 1; w < kThreads / 32; ++w) peak = Merge(peak, partial[w]);
  return peak;
}

template <typename T>
struct Args {
  Rows<T> logits;
  const int32_t* targets;
  float* loss;
  uint8_t* correct;  // may be null
  const float* grad_scale;
  int64_t columns;
  float softcap, smoothing, z_loss;
  bool want_grad;
};

template <typename T, int N>
__device__ void ClearRow(T* x, int64_t columns) {
  Pack<T, N> zero;
  for (int i = 0; i < N; ++i) zero.Set(i, 0.0f);
  for (int64_t v = threadIdx.x * N; v < columns; v += kThreads * N) zero.Store(x + v);
}

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void CrossEntropyKernel(Args<T> a) {
  const int64_t row = blockIdx.x, target = a.targets[row];
  T* x = a.logits(row, 0);
  if (target < 0) {
    if (a.want_grad) ClearRow<T, N>(x, a.columns);
    if (threadIdx.x == 0) {
      a.loss[row] = 0.0f;
      if (a.correct != nullptr) a.correct[row] = 0;
    }
    return;
  }
  Peak peak{-Infinity(), 0.0f, -Infinity(), 0x7fffffff, 0.0f};
  for (int64_t v = threadIdx.x * N; v < a.columns; v += kThreads * N) {
    const Pack<T, N> pack = Pack<T, N>::Load(x + v);
    for (int i = 0; i < N; ++i) Include(pack[i], static_cast<int>(v) + i, a.softcap, &peak);
  }
  peak = BlockMerge(peak);
  const float lse = peak.z_max + logf(peak.sum);
  if (threadIdx.x == 0) {
    // Nothing outside the row is read for a target that is not in it.
    const bool inside = target < a.columns;
    const float z = inside ? Capped(ToFloat(x[target]), a.softcap) : __int_as_float(0x7fffffff);
    float loss = lse - (1.0f - a.smoothing) * z;
    if (a.smoothing > 0.0f) {
      loss -= a.smoothing * (peak.total / static_cast<float>(a.columns));
    }
    if (a.z_loss > 0.0f) loss += a.z_loss * lse * lse;
    a.loss[row] = loss;
    if (a.correct != nullptr) {
      const bool all_hidden =
          inside && target == 0 && peak.place == 0x7fffffff && ToFloat(x[0]) == -Infinity();
      a.correct[row] = peak.place == target || all_hidden ? 1 : 0;
    }
  }
  if (!a.want_grad) return;
  __syncthreads();  // x[target] was read
  const float grad_scale = *a.grad_scale;
  const float rise = a.z_loss > 0.0f ? 1.0f + 2.0f * a.z_loss * lse : 1.0f;
  const float spread = a.smoothing / static_cast<float>(a.columns), hit = 1.0f - a.smoothing;
  for (int64_t v = threadIdx.x * N; v < a.columns; v += kThreads * N) {
    Pack<T, N> pack = Pack<T, N>::Load(x + v);
    for (int i = 0; i < N; ++i) {
      const float z = Capped(pack[i], a.softcap);
      const float ratio = a.softcap > 0.0f ? z / a.softcap : 0.0f;
      const float share = v + i == target ? spread + hit : spread;
      pack.Set(i, (expf(z - lse) * rise - share) * (1.0f - ratio * ratio) * grad_scale);
    }
    pack.Store(x + v);
  }
}

}  // namespace

void CrossEntropyCuda(const Exec& exec, const CrossEntropyArgs& a) {
  const int64_t rows = a.logits.dim(0), columns = a.logits.dim(1);
  if (rows == 0) return;
  CHECK(columns < std::numeric_limits<int32_t>::max());
  DispatchCudaFloat(a.logits.dtype, [&]<typename T>() {
    const Args<T> args{RowsOf<T>(a.logits),
                       Data<const int32_t>(a.targets),
                       Data<float>(a.loss),
                       a.correct.defined() ? Data<uint8_t>(a.correct) : nullptr,
                       a.want_grad ? Data<const float>(a.grad_scale) : nullptr,
                       columns,
                       static_cast<float>(a.softcap),
                       static_cast<float>(a.label_smoothing),
                       static_cast<float>(a.z_loss),
                       a.want_grad};
    const unsigned grid = static_cast<unsigned>(rows);
    if (Packable(kPackSize<T>, {&a.logits})) {
      CrossEntropyKernel<T, kPackSize<T>><<<grid, kThreads, 0, StreamOf(exec.stream)>>>(args);
    } else {
      CrossEntropyKernel<T, 1><<<grid, kThreads, 0, StreamOf(exec.stream)>>>(args);
    }
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
