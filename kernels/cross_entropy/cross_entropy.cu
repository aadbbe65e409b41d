// Cross entropy on CUDA: a cluster of 1 to 8 blocks owns a row, which its threads hold in shared
// memory: read once, written once. A warp finds its maximum and its sum of exponentials from there,
// and leaves both with every block of the cluster; each warp merges all of them. What a longer row
// has more is read again instead.
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

// What a warp has found in its part of a row; and what all have.
struct alignas(16) Peak {
  float max;              // before the cap: where tanh is flat, the larger logit counts
  float sum;              // of exp(element - maximum)
  float total;            // of the elements themselves, for label smoothing
  uint32_t beats_target;  // 1 if the target is not the first of the largest elements
};
constexpr int kWarps = kThreads / 32;
constexpr int kMostPeaks = kWarps * kMaxCluster;

// The peaks of all warps of a cluster, on their way into each of its blocks. No block waits for
// what it has stored, nor at its end for the others: none writes to it once it has all. A block by
// itself (there are no others before compute capability 9.0) only meets.
struct Peaks {
  Peak* peaks;        // kMostPeaks
  uint64_t* arrived;  // kMostPeaks of them
  unsigned blocks = ThisCluster().num_blocks();

  // By all threads, first of all.
  __device__ void Prepare() const {
    if constexpr (kSm90) {
      if (blocks == 1) return;
      if (threadIdx.x == 0) {
        InitBarrier(arrived, 1);
        FenceBarriers();
        ExpectBytes(arrived, static_cast<int>(blocks * kWarps * sizeof(Peak)));
      }
      ClusterArriveRelaxed();  // others wait for it before they Send
    }
  }
  // By all lanes of a warp, with the same peak.
  __device__ void Send(const Peak& peak) const {
    const unsigned lane = threadIdx.x % 32;
    Peak* to = peaks + ThisCluster().block_rank() * kWarps + threadIdx.x / 32;
    if (blocks == 1) {
      if (lane == 0) *to = peak;
      __syncthreads();
    } else if constexpr (kSm90) {
      ThisCluster().barrier_wait();
      if (lane < blocks) StoreRemote(lane, to, peak, arrived);
    }
  }
  // The same in every warp, and the same bits.
  template <bool kCapped>
  __device__ Peak Merge(float softcap) const {
    if (blocks > 1) WaitFor(arrived, 0);
    const unsigned lane = threadIdx.x % 32, count = blocks * kWarps;
    const Peak nothing{-Infinity(), 0.0f, 0.0f, 0};
    const Peak first = lane < count ? peaks[lane] : nothing;
    const Peak second = lane + 32 < count ? peaks[lane + 32] : nothing;
    const float max = WarpMax(fmaxf(first.max, second.max));
    const ExpFrom exp(Capped<kCapped>(max, softcap));
    // A warp without a finite element sums to 0 (or NaN), whatever the others' maximum is.
    const auto from_max = [&](const Peak& peak) {
      return peak.max == max ? peak.sum : peak.sum * exp(Capped<kCapped>(peak.max, softcap));
    };
    return {max, WarpSum(from_max(first) + from_max(second)), WarpSum(first.total + second.total),
            __reduce_max_sync(0xffffffffu, first.beats_target | second.beats_target)};
  }

 private:
  static __device__ void StoreRemote(unsigned block, Peak* to, const Peak& peak,
                                     uint64_t* arrived) {
    asm volatile(
        "{ .reg .b32 to, arrived;\n"
        "mapa.shared::cluster.u32 to, %0, %2;\n"
        "mapa.shared::cluster.u32 arrived, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
        "[arrived]; }" ::"r"(SharedAddress(to)),
        "r"(SharedAddress(arrived)), "r"(block), "r"(__float_as_uint(peak.max)),
        "r"(__float_as_uint(peak.sum)), "r"(__float_as_uint(peak.total)), "r"(peak.beats_target)
        : "memory");
  }
};

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

// A thread's part of a row: packs at `first` and every `step` behind it. Only the thread itself
// looks at what it holds.
template <typename T, int N>
struct Part {
  using P = Words<T, N>;
  T* x;
  int columns;
  P* held;  // every kThreads-th is this thread's
  int first, step;
  int count;  // of those that are held

  __device__ Part(const Args<T>& a, int64_t row, unsigned char* memory)
      : x(a.logits(row, 0)),
        columns(static_cast<int>(a.columns)),
        held(reinterpret_cast<P*>(memory) + threadIdx.x),
        first(static_cast<int>(ThisCluster().block_rank() * kThreads + threadIdx.x) * N),
        step(static_cast<int>(ThisCluster().num_blocks()) * kThreads * N),
        count(first < columns ? min(a.held, (columns - first - 1) / step + 1) : 0) {}

  __device__ void Load() const {
    const T* from = x + first;
#pragma unroll 4
    for (int k = 0; k < count; ++k, from += step) {
      P* to = held + k * kThreads;
      if constexpr (N > 1) {
        __pipeline_memcpy_async(to, from, 16);
      } else {
        *to = P::Load(from);
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  // f(pack, its column) in ascending order.
  template <typename F>
  __device__ void ForEach(F f) const {
    int v = first;
#pragma unroll 4
    for (int k = 0; k < count; ++k, v += step) f(held[k * kThreads], v);
    for (; v < columns; v += step) f(P::Load(x + v), v);
  }
  // f(element, its column), likewise.
  template <typename F>
  __device__ void ForEachElement(F f) const {
    ForEach([&](const P& pack, int v) { ForElements(pack, [&](int i, float e) { f(e, v + i); }); });
  }
};

// Of this warp's part, in each of its lanes.
template <bool kCapped, typename T, int N>
__device__ Peak PeakOf(const Part<T, N>& part, const Args<T>& a) {
  Largest<T, N> largest;
  part.ForEach([&](const Words<T, N>& pack, int) { largest.Add(pack); });
  Peak peak{WarpMax(largest.Get()), 0.0f, 0.0f, 0};
  // All may be hidden, or NaN.
  const ExpFrom exp(peak.max == -Infinity() ? 0.0f : Capped<kCapped>(peak.max, a.softcap));
  part.ForEachElement([&](float x, int) {
    peak.sum += exp(Capped<kCapped>(x, a.softcap));  // NaN gets in
  });
  peak.sum = WarpSum(peak.sum);
  if (a.smoothing > 0.0f) {
    part.ForEachElement([&](float x, int) { peak.total += Capped<kCapped>(x, a.softcap); });
    peak.total = WarpSum(peak.total);
  }
  return peak;
}

// Whether this warp's part has a larger element than the target, or an equal one before it; NaN is
// right nowhere.
template <typename T, int N>
__device__ uint32_t BeatsTarget(const Part<T, N>& part, float max, float x_target, int target) {
  if (max < x_target) return 0;  // most often one of both
  if (!(max == x_target)) return 1;
  bool before = false;
  part.ForEachElement([&](float x, int column) { before |= x == x_target && column < target; });
  return __any_sync(0xffffffffu, before) ? 1 : 0;
}

template <bool kCapped, typename T>
__device__ void StoreLoss(const Args<T>& a, int64_t row, bool inside, float x_target,
                          const Peak& peak, float lse) {
  const float z = inside ? Capped<kCapped>(x_target, a.softcap) : __int_as_float(0x7fffffff);
  float loss = lse - (1.0f - a.smoothing) * z;
  if (a.smoothing > 0.0f) loss -= a.smoothing * (peak.total / static_cast<float>(a.columns));
  if (a.z_loss > 0.0f) loss += a.z_loss * lse * lse;
  a.loss[row] = loss;
  if (a.correct != nullptr) a.correct[row] = peak.beats_target == 0 ? 1 : 0;
}

template <bool kCapped, typename T, int N>
__device__ void StoreGradient(const Args<T>& a, const Part<T, N>& part, int target, float lse) {
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
  part.ForEach([&](Words<T, N> pack, int v) {
    const auto put = [&](const auto& of_share) {
#pragma unroll
      for (int i = 0; i < Words<T, N>::kPairs; ++i) {
        const float2 x = pack.Pair(i);
        pack.SetPair(i,
                     {gradient(x.x, of_share(v + 2 * i)), gradient(x.y, of_share(v + 2 * i + 1))});
      }
    };
    if (static_cast<unsigned>(target - v) < N) {
      put([&](int column) {
        const float share = column == target ? spread + hit : spread;
        return [=](float p) { return (p * rise - share) * grad_scale; };
      });
    } else {
      put([&](int) { return [=](float p) { return fmaf(p, scaled_rise, -scaled_spread); }; });
    }
    pack.Store(part.x + v);
  });
}

template <bool kCapped, typename T, int N>
__global__ __launch_bounds__(kThreads,
                             3) void CrossEntropyKernel(const __grid_constant__ Args<T> a) {
  AwaitEarlier();
  const auto cluster = ThisCluster();
  const int64_t row = blockIdx.x / cluster.num_blocks();
  const int target = a.targets[row];
  const bool first = cluster.block_rank() == 0 && threadIdx.x == 0;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Peak peaks_of_warps[kMostPeaks];
  __shared__ uint64_t arrived;
  const Part<T, N> part(a, row, memory);
  if (target < 0) {
    if (first) {
      a.loss[row] = 0.0f;
      if (a.correct != nullptr) a.correct[row] = 0;
    }
    if (!a.want_grad) return;
    const Words<T, N> zero{};
    for (int v = part.first; v < part.columns; v += part.step) zero.Store(part.x + v);
    return;
  }
  const Peaks peaks{peaks_of_warps, &arrived};
  peaks.Prepare();
  // Nothing outside the row is read for a target that is not in it.
  const bool inside = target < part.columns;
  const float x_target = inside ? ToFloat(part.x[target]) : __int_as_float(0x7fffffff);
  part.Load();
  Peak own = PeakOf<kCapped>(part, a);
  if (a.correct != nullptr) own.beats_target = BeatsTarget(part, own.max, x_target, target);
  peaks.Send(own);
  const Peak peak = peaks.Merge<kCapped>(a.softcap);
  const float lse = Capped<kCapped>(peak.max, a.softcap) + logf(peak.sum);
  if (first) StoreLoss<kCapped>(a, row, inside, x_target, peak, lse);
  if (a.want_grad) StoreGradient<kCapped>(a, part, target, lse);
}

template <typename T, int N>
void Run(const Exec& exec, Args<T> args, int64_t rows) {
  const auto packs = [&](int64_t blocks) {  // of a thread
    return (args.columns + blocks * kThreads * N - 1) / (blocks * kThreads * N);
  };
  unsigned blocks = 1;
  while (HasSm90() && blocks < kMaxCluster && packs(blocks) > kHeld) ++blocks;
  args.held = static_cast<int>(std::min<int64_t>(packs(blocks), kMaxHeld));
  const size_t held_bytes = static_cast<size_t>(args.held) * kThreads * sizeof(Words<T, N>);
  const auto kernel =
      args.softcap > 0.0f ? CrossEntropyKernel<true, T, N> : CrossEntropyKernel<false, T, N>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(held_bytes)));
  LaunchEarly(exec.stream,
              {dim3(static_cast<unsigned>(rows) * blocks), dim3(kThreads), held_bytes, blocks},
              kernel, args);
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
