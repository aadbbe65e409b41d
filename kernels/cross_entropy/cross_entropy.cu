// Cross entropy on CUDA: a cluster of 1 to 8 blocks owns a row, which its threads hold in
// registers: read once, written once. A block finds its maximum, then its sum of exponentials and
// the first place of the maximum; the cluster merges these in the order of its blocks. What a
// longer row has more is read again instead.
#include <cuda_pipeline.h>

#include <limits>

#include "kernels/core/cluster.cuh"
#include "kernels/core/tensor_core.cuh"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/fp8/fp8.cuh"

namespace attune {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxCluster = 8;
// Packs that a thread holds: three blocks then share a multiprocessor; and at most, if the largest
// cluster needs more. (H200: more threads, or reading the next row ahead, were slower.)
constexpr int kHeld = 16, kMaxHeld = 48;
constexpr int kNowhere = 0x7fffffff;

__device__ float Infinity() {
  return __int_as_float(0x7f800000);
}
template <bool kCapped>
__device__ float Capped(float x, float softcap) {
  return kCapped ? softcap * tanhf(x * (1.0f / softcap)) : x;
}
// exp(x - base), to some units in the last place; what is too small for a normal float is 0. One
// multiply-add and one ex2: the base in powers of two is the same for a whole row.
struct ExpFrom {
  static constexpr float kLog2E = 1.4426950408889634f;
  float minus_base2;
  __device__ explicit ExpFrom(float base) : minus_base2(-base * kLog2E) {}
  __device__ float operator()(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaf(x, kLog2E, minus_base2)));
    return y;
  }
};

// Of some elements of a row: maximum, its first place, and sum of exp(element - maximum).
struct Peak {
  float z_max, sum;
  float x_max;  // before the cap: where tanh is flat, the larger logit counts
  int place;
  float total;  // of the elements themselves, for label smoothing
};

// Calls f(i, element i) for the elements of a pack.
template <typename T, int N, typename F>
__device__ void ForElements(const Words<T, N>& pack, const F& f) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float2 pair = pack.Pair(i / 2);
    f(i, pair.x);
    if (i + 1 < N) f(i + 1, pair.y);
  }
}

// The largest element of packs; NaN does not count.
template <typename T, int N>
struct Largest {
  static constexpr bool kPairs = std::is_same_v<T, Bf16> && N > 1;
  float value = -Infinity();
  __nv_bfloat162 pair = __float2bfloat162_rn(-Infinity());

  __device__ void Add(const Words<T, N>& pack) {
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        pair = __hmax2(pair, reinterpret_cast<const __nv_bfloat162&>(pack.words.v[i]));
      }
    } else {
      ForElements(pack, [&](int, float x) { value = fmaxf(value, x); });
    }
  }
  __device__ float Get() const {
    return kPairs ? fmaxf(__low2float(pair), __high2float(pair)) : value;
  }
};

__device__ float BlockMax(float x) {
  __shared__ float partial[kThreads / 32];
  x = WarpMax(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  return WarpMax(partial[threadIdx.x % (kThreads / 32)]);
}

// Of the peaks of the cluster's threads, in every thread. Blocks have one maximum each, so their
// warps' sums are added; what the blocks have is merged by the lanes of each warp, of which each
// takes one block's.
__device__ Peak ClusterMerge(Peak peak) {
  struct Part {
    float sum, total;
    int place;
  };
  __shared__ Part partial[kThreads / 32];
  __shared__ Peak of_block;
  const auto cluster = ThisCluster();
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Part own{WarpSum(peak.sum), WarpSum(peak.total), __reduce_min_sync(0xffffffffu, peak.place)};
  if (lane == 0) partial[warp] = own;
  __syncthreads();
  if (warp == 0) {
    own = lane < kThreads / 32 ? partial[lane] : Part{0.0f, 0.0f, kNowhere};
    own = {WarpSum(own.sum), WarpSum(own.total), __reduce_min_sync(0xffffffffu, own.place)};
    if (lane == 0) {
      of_block = {peak.z_max, own.sum, peak.x_max, own.place, own.total};
      ClusterFence();
    }
  }
  ClusterArriveRelaxed();
  cluster.barrier_wait();
  peak = {-Infinity(), 0.0f, -Infinity(), kNowhere, 0.0f};
  if (lane < cluster.num_blocks()) peak = *cluster.map_shared_rank(&of_block, lane);
  const float z_max = WarpMax(peak.z_max), x_max = WarpMax(peak.x_max);
  // A block without a finite element sums to 0 (or NaN), whatever the other's maximum is.
  const float sum = peak.z_max == z_max ? peak.sum : peak.sum * expf(peak.z_max - z_max);
  const int place = peak.x_max == x_max ? peak.place : kNowhere;
  peak = {z_max, WarpSum(sum), x_max, __reduce_min_sync(0xffffffffu, place), WarpSum(peak.total)};
  ClusterArriveRelaxed();  // see CrossEntropyKernel's end
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
  using P = Words<T, N>;
  T* x;
  int64_t columns;
  P* held;  // every kThreads-th is this thread's
  int count = 0;

  __device__ int64_t Step() const {
    return static_cast<int64_t>(ThisCluster().num_blocks()) * kThreads * N;
  }
  __device__ int64_t First() const {
    return static_cast<int64_t>(ThisCluster().block_rank() * kThreads + threadIdx.x) * N;
  }
  // `most`: what there is room for.
  __device__ void Load(int most) {
    const int64_t step = Step();
    int64_t v = First();
    for (count = 0; count < most && v < columns; ++count, v += step) {
      P* to = held + count * kThreads;
      if constexpr (N > 1) {
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
    const int64_t step = Step();
    int64_t v = First();
#pragma unroll 4
    for (int k = 0; k < count; ++k, v += step) f(held[k * kThreads], v);
    for (; v < columns; v += step) f(P::Load(x + v), v);
  }
};

template <bool kCapped, typename T, int N>
__device__ Peak PeakOf(const Part<T, N>& part, const Args<T>& a) {
  Largest<T, N> largest;
  part.ForEach([&](const Words<T, N>& pack, int64_t) { largest.Add(pack); });
  const float own_max = largest.Get(), x_max = BlockMax(own_max);
  Peak peak{Capped<kCapped>(x_max, a.softcap), 0.0f, x_max, kNowhere, 0.0f};
  const ExpFrom exp(peak.z_max == -Infinity() ? 0.0f : peak.z_max);  // all are hidden, or NaN
  part.ForEach([&](const Words<T, N>& pack, int64_t) {
    ForElements(pack, [&](int, float x) {
      peak.sum += exp(Capped<kCapped>(x, a.softcap));  // NaN gets in
    });
  });
  if (own_max == x_max && x_max > -Infinity()) {  // a few threads
    part.ForEach([&](const Words<T, N>& pack, int64_t v) {
      ForElements(pack, [&](int i, float x) {
        if (x == x_max) peak.place = min(peak.place, static_cast<int>(v) + i);
      });
    });
  }
  if (a.smoothing > 0.0f) {
    part.ForEach([&](const Words<T, N>& pack, int64_t) {
      ForElements(pack, [&](int, float x) { peak.total += Capped<kCapped>(x, a.softcap); });
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
  const float scaled_rise = rise * grad_scale, scaled_spread = spread * grad_scale;
  const ExpFrom exp(lse);
  const auto gradient = [&](float x, const auto& of_share) {
    const float z = Capped<kCapped>(x, a.softcap);
    const float ratio = kCapped ? z * (1.0f / a.softcap) : 0.0f;
    return of_share(exp(z)) * (1.0f - ratio * ratio);
  };
  part.ForEach([&](Words<T, N> pack, int64_t v) {
    const auto put = [&](const auto& of_share) {
#pragma unroll
      for (int i = 0; i < Words<T, N>::kPairs; ++i) {
        const float2 x = pack.Pair(i);
        pack.SetPair(i,
                     {gradient(x.x, of_share(v + 2 * i)), gradient(x.y, of_share(v + 2 * i + 1))});
      }
    };
    if (target >= v && target < v + N) {
      put([&](int64_t column) {
        const float share = column == target ? spread + hit : spread;
        return [=](float p) { return (p * rise - share) * grad_scale; };
      });
    } else {
      put([&](int64_t) { return [=](float p) { return fmaf(p, scaled_rise, -scaled_spread); }; });
    }
    if constexpr (N == 1) {
      pack.Store(part.x + v);
    } else {  // said so, since the compiler makes four stores of Store
      __stwb(reinterpret_cast<uint4*>(part.x + v), reinterpret_cast<const uint4&>(pack));
    }
  });
}

template <bool kCapped, typename T, int N>
__global__ __launch_bounds__(kThreads,
                             3) void CrossEntropyKernel(const __grid_constant__ Args<T> a) {
  const auto cluster = ThisCluster();
  const int64_t row = blockIdx.x / cluster.num_blocks(), target = a.targets[row];
  const bool first = cluster.block_rank() == 0 && threadIdx.x == 0;
  extern __shared__ __align__(16) unsigned char memory[];
  Part<T, N> part{a.logits(row, 0), a.columns,
                  reinterpret_cast<Words<T, N>*>(memory) + threadIdx.x};
  if (target < 0) {
    if (first) {
      a.loss[row] = 0.0f;
      if (a.correct != nullptr) a.correct[row] = 0;
    }
    if (!a.want_grad) return;
    const Words<T, N> zero{};
    for (int64_t v = part.First(); v < a.columns; v += part.Step()) zero.Store(part.x + v);
    return;
  }
  part.Load(a.held);
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
  config.dynamicSmemBytes = static_cast<size_t>(args.held) * kThreads * sizeof(Words<T, N>);
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
