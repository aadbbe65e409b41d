// To NF4 on CUDA. Every product and sum is rounded on its own, as on the CPU: the bits are the
// same. (Multiply-adds are fused where a sign or a bucket is all that is asked for.)
#include "kernels/core/resident_blocks.cuh"
#include "kernels/fp8/fp8.cuh"
#include "kernels/nf4/nf4.cuh"

namespace attune {
namespace {

using namespace nf4;

constexpr float kMinAbsMax = 1e-38f;

// The code of x: how many of the 15 borders lie below it. These are 0.08 apart or more, so of 31
// buckets, 1/15 wide around the multiples of 1/15 from -1 to 1, none has two of them. Each lane
// keeps one bucket for its warp, so that nothing is looked up in memory; the last one is for NaN.
// A bucket is one word: the border in it or above it, and in the place of its four upper bits,
// which follow from the rest, how many borders lie above that.
class Coder {
 public:
  __device__ explicit Coder(const float* borders) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float begin = static_cast<float>(2 * lane - 31) / 30.0f;
    int below = 0;
    float border = borders[0];
#pragma unroll
    for (int i = 0; i < 14; ++i) {
      if (borders[i] >= begin || lane == 31) continue;
      below = i + 1;
      border = borders[i + 1];
    }
    bucket_ = static_cast<uint32_t>(14 - below) << 28 | (__float_as_uint(border) & ~kReplaced);
  }
  // Puts the code of x behind those in `codes`, which begin as 0. By whole warps.
  __device__ void Append(float x, uint32_t* codes) const {
    // Added to 1.5 * 2^23, a number is rounded to an integer, which are the lowest bits then. Of
    // the lane that is named, 5 bits are looked at.
    const int place = __float_as_int(__fmaf_rn(x, 15.0f, 12582912.0f + 15.0f));
    const uint32_t bucket = __shfl_sync(0xffffffffu, bucket_, place);
    // The size of a border is from 2^-5 to 1, so the bits replaced are 3, and without these it is
    // 2^-96 of it; and it is negative if more than 7 lie above.
    const float border = __uint_as_float(bucket & ~(kReplaced ^ kSign));
    *codes = __funnelshift_l(bucket, *codes, 4);
    *codes += __float_as_int(__fmaf_rn(border, 0x1p96f, -x)) >> 31;  // -1 if x is above the border
  }
  // Of eight that have been appended, the last one in the lowest bits.
  __device__ static uint32_t Finished(uint32_t codes) {
    return 0xeeeeeeeeu - codes;
  }

 private:
  static constexpr uint32_t kReplaced = 0xf0000000u, kSign = 0x80000000u;
  uint32_t bucket_;
};

template <typename T>
struct Quantization {
  const T* w;
  uint8_t* packed;
  float* absmax;
  int64_t size;
  int blocks;
};

// Four lanes have a block of 64, so a warp has eight at once, and kSteps times eight to a unit.
// What a step has read makes room for what it needs of the next unit. Whole blocks only; kPacked:
// read in packs, and there are enough for a unit, so that the last one may begin earlier than it
// would.
template <typename T, bool kPacked>
struct QuantizeWarp {
  static constexpr int kLanes = 4, kElements = kNf4Block / kLanes, kAtOnce = 32 / kLanes;
  static constexpr int kSteps = 4 / sizeof(T);
  static constexpr int kBlocks = kAtOnce * kSteps;
  using Elements = Words<T, kElements>;

  const Quantization<T>& a;
  const Coder& coder;
  const int lane = static_cast<int>(threadIdx.x % 32);

  // Of a lane and its first step: others are kAtOnce behind each other.
  __device__ int64_t FirstBlock(int unit) const {
    const int first = unit * kBlocks;
    return (kPacked ? min(first, a.blocks - kBlocks) : first) + lane / kLanes;
  }
  __device__ Elements Load(int64_t first, int step) const {
    int64_t block = first + step * kAtOnce;
    if constexpr (!kPacked) block = min(block, static_cast<int64_t>(a.blocks) - 1);
    const T* from = a.w + block * kNf4Block + lane % kLanes * kElements;
    if constexpr (kPacked) {
      return Elements::Load(from);
    } else {
      Elements out;
#pragma unroll
      for (int i = 0; i < Elements::kPairs; ++i) {
        out.SetPair(i, {ToFloat(from[2 * i]), ToFloat(from[2 * i + 1])});
      }
      return out;
    }
  }
  // The codes of a step, and the largest of a block in its lanes.
  __device__ uint2 Encode(const Elements& in, float* absmax) const {
    float largest = in.Largest();
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    *absmax = largest;
    const float reciprocal = __frcp_rn(fmaxf(largest, kMinAbsMax));
    const auto eight = [&](int begin) {
      uint32_t codes = 0;
#pragma unroll
      for (int i = begin + 3; i >= begin; --i) {  // the upper nibble of a byte is the first
        const float2 pair = in.Pair(i);
        coder.Append(__fmul_rn(pair.x, reciprocal), &codes);
        coder.Append(__fmul_rn(pair.y, reciprocal), &codes);
      }
      return Coder::Finished(codes);
    };
    return {eight(0), eight(4)};
  }
  __device__ void Store(int64_t first, int step, uint2 codes, float absmax) const {
    const int64_t block = first + step * kAtOnce;
    if (!kPacked && block >= a.blocks) return;
    if (lane % kLanes == 0) a.absmax[block] = absmax;
    uint8_t* to = a.packed + block * (kNf4Block / 2) + lane % kLanes * (kElements / 2);
    if constexpr (kPacked) {
      *reinterpret_cast<uint2*>(to) = codes;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        to[i] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
      }
    }
  }
};

template <typename T, bool kPacked>
__global__ __launch_bounds__(kThreads,
                             5) void QuantizeKernel(const __grid_constant__ Tables tables,
                                                    const __grid_constant__ Quantization<T> a,
                                                    int units) {
  using Warp = QuantizeWarp<T, kPacked>;
  LetNextStart();
  const Coder coder(tables.borders);
  const Warp warp{a, coder};
  AwaitEarlier();
  const int warps = static_cast<int>(gridDim.x) * (kThreads / 32);
  int unit = static_cast<int>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x / 32);
  if (unit >= units) return;
  int64_t first = warp.FirstBlock(unit);
  typename Warp::Elements in[Warp::kSteps];
#pragma unroll
  for (int u = 0; u < Warp::kSteps; ++u) in[u] = warp.Load(first, u);
  while (unit < units) {
    unit += warps;
    const int64_t next = unit < units ? warp.FirstBlock(unit) : first;
#pragma unroll
    for (int u = 0; u < Warp::kSteps; ++u) {
      float absmax;
      const uint2 codes = warp.Encode(in[u], &absmax);
      if (unit < units) in[u] = warp.Load(next, u);
      warp.Store(first, u, codes, absmax);
    }
    first = next;
  }
}

// The short block at the end, which keeps the raised maximum and is divided, while whole ones are
// multiplied by the reciprocal: the bits of bitsandbytes hang on it. One warp, two elements a lane.
template <typename T>
__global__ void QuantizeRestKernel(const __grid_constant__ Tables tables,
                                   const __grid_constant__ Quantization<T> a) {
  const Coder coder(tables.borders);
  const int64_t e = static_cast<int64_t>(a.blocks) * kNf4Block + 2 * threadIdx.x;
  const float first = e < a.size ? ToFloat(a.w[e]) : 0.0f;
  const float second = e + 1 < a.size ? ToFloat(a.w[e + 1]) : 0.0f;
  const float absmax = fmaxf(WarpMax(fmaxf(fabsf(first), fabsf(second))), kMinAbsMax);
  if (threadIdx.x == 0) a.absmax[a.blocks] = absmax;
  uint32_t codes = 0;
  coder.Append(__fdiv_rn(first, absmax), &codes);
  coder.Append(__fdiv_rn(second, absmax), &codes);
  if (e < a.size) a.packed[e / 2] = static_cast<uint8_t>(Coder::Finished(codes));
}

// ---- Quantise the block maxima ----

// The mean is added up by many blocks of threads, each of which has a share, and then from what
// these have found, which lies in the meantime where the groups' maxima will be, in two words each.
constexpr int kOfThread = 8;
constexpr int64_t kShare = kOfThread * kThreads;
static_assert(kShare >= 4 * kNf4Group);  // two shares have more than four groups

__global__ __launch_bounds__(kThreads) void SharesKernel(const float* absmax, int64_t blocks,
                                                         float* sums) {
  LetNextStart();
  AwaitEarlier();
  const int64_t first = blockIdx.x * kShare + threadIdx.x;
  float own[kOfThread];
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int64_t b = first + i * kThreads;
    own[i] = b < blocks ? absmax[b] : 0.0f;
  }
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) sum += static_cast<double>(own[i]);
  sum = BlockSum<kThreads>(sum);
  if (threadIdx.x > 0) return;
  sums[2 * blockIdx.x] = __int_as_float(__double2hiint(sum));
  sums[2 * blockIdx.x + 1] = __int_as_float(__double2loint(sum));
}

// One block of threads. Of shares, or, where there is but one, of its elements.
template <bool kOfShares>
__global__ __launch_bounds__(kThreads) void MeanKernel(const float* from, int64_t count,
                                                       int64_t blocks, float* offset) {
  LetNextStart();
  AwaitEarlier();
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if constexpr (kOfShares) {
      sum += __hiloint2double(__float_as_int(from[2 * i]), __float_as_int(from[2 * i + 1]));
    } else {
      sum += static_cast<double>(from[i]);
    }
  }
  sum = BlockSum<kThreads>(sum);
  if (threadIdx.x > 0) return;
  *offset = blocks > 0 ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
}

// A warp per group.
__global__ __launch_bounds__(kThreads) void DoubleQuantizeKernel(
    const __grid_constant__ Tables tables, const float* absmax, const float* offset, uint8_t* codes,
    float* absmax2, int64_t blocks) {
  __shared__ alignas(16) float map[256];
  LetNextStart();
  // Parameters come to a warp one address at a time, so in words of 16 bytes.
  const unsigned thread = threadIdx.x, lane = thread % 32;
  if (thread < 64) {
    reinterpret_cast<float4*>(map)[thread] = reinterpret_cast<const float4*>(tables.map)[thread];
  }
  __syncthreads();
  AwaitEarlier();
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + thread / 32;
  const int64_t first = group * kNf4Group + lane;
  if (group * kNf4Group >= blocks) return;
  constexpr int kOfLane = kNf4Group / 32;
  float centred[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    centred[i] = first + 32 * i < blocks ? absmax[first + 32 * i] : *offset;
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    centred[i] = __fsub_rn(centred[i], *offset);
    largest = fmaxf(largest, fabsf(centred[i]));
  }
  largest = WarpMax(largest);
  if (lane == 0) absmax2[group] = largest;
  const float reciprocal = largest > 0.0f ? __frcp_rn(largest) : 0.0f;
  uint8_t code[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    code[i] = NearestDynamicCode(map, true, __fmul_rn(centred[i], reciprocal));
  }
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    if (first + 32 * i < blocks) codes[first + 32 * i] = code[i];
  }
}

}  // namespace

void Nf4QuantizeCuda(const Exec& exec, const Nf4QuantizeArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    const int64_t size = a.w.size();
    CHECK(size / kNf4Block < int64_t{1} << 30);
    const Quantization<T> x{Data<const T>(a.w), Data<uint8_t>(a.packed), Data<float>(a.absmax),
                            size, static_cast<int>(size / kNf4Block)};
    const auto run = [&]<bool kPacked>() {
      constexpr int kBlocks = QuantizeWarp<T, kPacked>::kBlocks;
      const auto kernel = QuantizeKernel<T, kPacked>;
      const int units = (x.blocks + kBlocks - 1) / kBlocks;
      const uint32_t grid =
          ResidentBlocks(kernel, kThreads, (units + kThreads / 32 - 1) / (kThreads / 32));
      LaunchEarly(exec.stream, {dim3(grid), dim3(kThreads)}, kernel, MakeTables(), x, units);
    };
    if (x.blocks > 0) {
      const bool packed =
          Aligned(x.w, 16) && Aligned(x.packed, 8) && x.blocks >= QuantizeWarp<T, true>::kBlocks;
      packed ? run.template operator()<true>() : run.template operator()<false>();
    }
    if (size % kNf4Block == 0) return;
    QuantizeRestKernel<T><<<1, 32, 0, StreamOf(exec.stream)>>>(MakeTables(), x);
    CUDA_CHECK(cudaGetLastError());
  });
}

void Nf4DoubleQuantizeCuda(const Exec& exec, const Nf4DoubleQuantizeArgs& a) {
  const int64_t blocks = a.absmax.dim(0), shares = (blocks + kShare - 1) / kShare;
  const float* absmax = Data<const float>(a.absmax);
  float *absmax2 = Data<float>(a.absmax2), *offset = Data<float>(a.offset);
  const auto run = [&](int64_t grid, auto kernel, const auto&... args) {
    LaunchEarly(exec.stream, {dim3(static_cast<unsigned>(grid)), dim3(kThreads)}, kernel, args...);
  };
  if (!a.offset_given && shares > 1) {
    run(shares, SharesKernel, absmax, blocks, absmax2);
    run(1, MeanKernel<true>, absmax2, shares, blocks, offset);
  } else if (!a.offset_given) {
    run(1, MeanKernel<false>, absmax, blocks, blocks, offset);
  }
  if (blocks == 0) return;
  run((Nf4Groups(blocks) * 32 + kThreads - 1) / kThreads, DoubleQuantizeKernel, MakeTables(),
      absmax, offset, Data<uint8_t>(a.codes), absmax2, blocks);
}

}  // namespace attune
