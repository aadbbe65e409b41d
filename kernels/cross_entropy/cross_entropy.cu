// Cross entropy on CUDA: a cluster of 1 to 8 blocks owns a row, which its threads hold in
// registers: read once, written once. A block finds its maximum, then its sum of exponentials and
// the first place of the maximum; the cluster merges these in the order of its blocks. What a
// longer row has more is read again instead.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <limits>

#include "kernels/core/tensor_core.cuh"
#include "kernels/cross_entropy/cross_entropy.h"

namespace attune {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxCluster = 8;
// Packs that a thread holds: three blocks then share a multiprocessor; and at most, if the largest
// cluster needs more.
constexpr int kHeld = 8, kMaxHeld = 24;
constexpr int kNowhere = 0x7fffffff;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ cooperative_groups::cluster_group ThisCluster() {
  return cooperative_groups::this_cluster();
}
#else
// One block is a cluster here.
struct OneBlock {
  __device__ unsigned num_blocks() const { return 1; }
  __device__ unsigned block_rank() const { return 0; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void barrier_arrive() const {}
  __device__ void barrier_wait() const {}
  template <typename T>
  __device__ T* map_shared_rank(T* x, unsigned rank) const {
    return x;
  }
};
__device__ OneBlock ThisCluster() {
  return {};
}
#endif

__device__ float Infinity() {
  return __int_as_float(0x7f800000);
}
template <bool kCapped>
__device__ float Capped(float x, float softcap) {
  return kCapped ? softcap * tanhf(x * (1.0f / softcap)) : x;
}
// exp(x), to two units in the last place; what is too small for a normal float is 0.
__device__ float Exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
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

__device__ float BlockMax(float x) {
  __shared__ float partial[kThreads / 32];
  x = WarpMax(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < kThreads / 32; ++w) x = fmaxf(x, partial[w]);
  return x;
}

// Of the peaks of the cluster's threads, in every thread. Blocks have one maximum each.
__device__ Peak ClusterMerge(Peak peak) {
  __shared__ Peak partial[kThreads / 32], of_block;
  const auto cluster = ThisCluster();
  peak.sum = WarpSum(peak.sum);
  peak.total = WarpSum(peak.total);
  peak.place = __reduce_min_sync(0xffffffffu, peak.place);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = peak;
  __syncthreads();
  if (threadIdx.x == 0) {
    peak = partial[0];
    for (int w = 1; w < kThreads / 32; ++w) peak = Merge(peak, partial[w]);
    of_block = peak;
  }
  cluster.sync();
  peak = *cluster.map_shared_rank(&of_block, 0);
  for (unsigned rank = 1; rank < cluster.num_blocks(); ++rank) {
    peak = Merge(peak, *cluster.map_shared_rank(&of_block, rank));
  }
  cluster.barrier_arrive();  // see CrossEntropyKernel's end
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
  int held;  // packs that a thread holds
};

// A thread's part of a row: packs at First() and every Step() behind it. Only the thread itself
// looks at what it holds.
template <typename T, int N>
struct Part {
  using P = Pack<T, N>;
  T* x;
  int64_t columns;
  P* held;  // every kThreads-th is this thread's
  int count;

  __device__ int64_t Step() const {
    return static_cast<int64_t>(ThisCluster().num_blocks()) * kThreads * N;
  }
  __device__ int64_t First() const {
    return static_cast<int64_t>(ThisCluster().block_rank() * kThreads + threadIdx.x) * N;
  }
  __device__ void Load() {
    int64_t v = First();
    for (int k = 0; k < count && v < columns; ++k, v += Step()) {
      P* to = held + k * kThreads;
      if constexpr (sizeof(P) == 16) {
        __pipeline_memcpy_async(to, x + v, 16);
      } else {
        *to = P::Load(x + v);
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  // f(pack, its column) in ascending order.
  template <typename F>
  __device__ void ForEach(F f) const {
    int64_t v = First();
    for (int k = 0; k < count && v < columns; ++k, v += Step()) f(held[k * kThreads], v);
    for (; v < columns; v += Step()) f(P::Load(x + v), v);
  }
};

template <bool kCapped, typename T, int N>
__device__ Peak PeakOf(const Part<T, N>& part, const Args<T>& a) {
  float own_max = -Infinity();
  part.ForEach([&](Pack<T, N> pack, int64_t) {
    for (int i = 0; i < N; ++i) own_max = fmaxf(own_max, pack[i]);
  });
  const float x_max = BlockMax(own_max);
  Peak peak{Capped<kCapped>(x_max, a.softcap), 0.0f, x_max, kNowhere, 0.0f};
  const float base = peak.z_max == -Infinity() ? 0.0f : peak.z_max;  // all are hidden, or NaN
  part.ForEach([&](Pack<T, N> pack, int64_t) {
    for (int i = 0; i < N; ++i) {
      peak.sum += Exp(Capped<kCapped>(pack[i], a.softcap) - base);  // NaN gets in
    }
  });
  if (own_max == x_max && x_max > -Infinity()) {  // a few threads
    part.ForEach([&](Pack<T, N> pack, int64_t v) {
      for (int i = 0; i < N; ++i) {
        if (pack[i] == x_max) peak.place = min(peak.place, static_cast<int>(v) + i);
      }
    });
  }
  if (a.smoothing > 0.0f) {
    part.ForEach([&](Pack<T, N> pack, int64_t) {
      for (int i = 0; i < N; ++i) peak.total += Capped<kCapped>(pack[i], a.softcap);
    });
  }
  return ClusterMerge(peak);
}

template <bool kCapped, typename T>
__device__ void StoreLoss(const Args<T>& a, int64_t row, int64_t target, float x_target,
                          const Peak& peak, float lse) {
  const bool inside = target < a.columns;
  const float z = inside ? Capped<kCapped>(x_target, a.softcap) : __int_as_float(0x7fffffff);
  float loss = lse - (1.0f - a.smoothing) * z;
  if (a.smoothing > 0.0f) loss -= a.smoothing * (peak.total / static_cast<float>(a.columns));
  if (a.z_loss > 0.0f) loss += a.z_loss * lse * lse;
  a.loss[row] = loss;
  if (a.correct == nullptr) return;
  const bool all_hidden =
      inside && target == 0 && peak.place == kNowhere && x_target == -Infinity();
  a.correct[row] = peak.place == target || all_hidden ? 1 : 0;
}

template <bool kCapped, typename T, int N>
__device__ void StoreGradient(const Args<T>& a, const Part<T, N>& part, int64_t target, float lse) {
  const float grad_scale = *a.grad_scale;
  const float rise = a.z_loss > 0.0f ? 1.0f + 2.0f * a.z_loss * lse : 1.0f;
  const float spread = a.smoothing / static_cast<float>(a.columns), hit = 1.0f - a.smoothing;
  part.ForEach([&](Pack<T, N> pack, int64_t v) {
    const auto put = [&](int i, float share) {
      const float z = Capped<kCapped>(pack[i], a.softcap);
      const float ratio = kCapped ? z * (1.0f / a.softcap) : 0.0f;
      pack.Set(i, (Exp(z - lse) * rise - share) * (1.0f - ratio * ratio) * grad_scale);
    };
    if (target >= v && target < v + N) {
#pragma unroll
      for (int i = 0; i < N; ++i) put(i, v + i == target ? spread + hit : spread);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) put(i, spread);
    }
    pack.Store(part.x + v);
  });
}

template <bool kCapped, typename T, int N>
__global__ __launch_bounds__(kThreads,
                             3) void CrossEntropyKernel(const __grid_constant__ Args<T> a) {
  const auto cluster = ThisCluster();
  const int64_t row = blockIdx.x / cluster.num_blocks(), target = a.targets[row];
  const bool first = cluster.block_rank() == 0 && threadIdx.x == 0;
  extern __shared__ __align__(16) unsigned char memory[];
  Part<T, N> part{a.logits(row, 0), a.columns, reinterpret_cast<Pack<T, N>*>(memory) + threadIdx.x,
                  a.held};
  if (target < 0) {
    if (first) {
      a.loss[row] = 0.0f;
      if (a.correct != nullptr) a.correct[row] = 0;
    }
    if (!a.want_grad) return;
    Pack<T, N> zero;
    for (int i = 0; i < N; ++i) zero.Set(i, 0.0f);
    for (int64_t v = part.First(); v < a.columns; v += part.Step()) zero.Store(part.x + v);
    return;
  }
  part.Load();
  // Nothing outside the row is read for a target that is not in it.
  const float x_target = first && target < a.columns ? ToFloat(part.x[target]) : 0.0f;
  const Peak peak = PeakOf<kCapped>(part, a);
  const float lse = peak.z_max + logf(peak.sum);
  if (first) StoreLoss<kCapped>(a, row, target, x_target, peak, lse);
  if (a.want_grad) StoreGradient<kCapped>(a, part, target, lse);
  cluster.barrier_wait();  // until the others have read this block's memory
}

template <typename T, int N>
void Run(const Exec& exec, Args<T> args, int64_t rows) {
  const auto packs = [&](int64_t blocks) {  // of a thread
    return (args.columns + blocks * kThreads * N - 1) / (blocks * kThreads * N);
  };
  unsigned blocks = 1;
  while (HasSm90() && blocks < kMaxCluster && packs(blocks) > kHeld) blocks *= 2;
  args.held = static_cast<int>(std::min<int64_t>(packs(blocks), kMaxHeld));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows) * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(args.held) * kThreads * sizeof(Pack<T, N>);
  config.stream = StreamOf(exec.stream);
  config.attrs = &cluster;
  config.numAttrs = HasSm90() ? 1 : 0;
  const auto kernel =
      args.softcap > 0.0f ? CrossEntropyKernel<true, T, N> : CrossEntropyKernel<false, T, N>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(config.dynamicSmemBytes)));
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
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
                       a.want_grad,
                       0};
    if (Packable(kPackSize<T>, {&a.logits})) return Run<T, kPackSize<T>>(exec, args, rows);
    Run<T, 1>(exec, args, rows);
  });
}

}  // namespace attune
