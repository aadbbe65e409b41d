// To NF4 on CUDA. Every product and sum is rounded on its own (no fused multiply-add), as
// on the CPU: the bits are the same.
#include <limits>

#include "kernels/core/cluster.cuh"
#include "kernels/fp8/fp8.cuh"
#include "kernels/nf4/nf4.cuh"

namespace attune {
namespace {

using namespace nf4;

constexpr float kMinAbsMax = 1e-38f;

// The code of x: how many of the 15 borders lie below it. These are 0.08 apart or more, so of 31
// buckets, 1/15 wide around the multiples of 1/15 from -1 to 1, none has two of them. Each lane
// keeps one bucket for its warp, so that nothing is looked up in memory; the last one is for NaN.
class Coder {
 public:
  __device__ explicit Coder(const float* borders) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float begin = static_cast<float>(2 * lane - 31) / 30.0f;
#pragma unroll
    for (int i = 14; i >= 0; --i) {
      if (borders[i] < begin && lane < 31) continue;
      border_ = borders[i];
      below_ = i;
    }
    if (lane == 31) border_ = kInfinity;
  }
  // Puts the code of x behind those in `codes`. By whole warps.
  __device__ void Append(float x, uint32_t* codes) const {
    // Added to 1.5 * 2^23, a number is rounded to an integer, which are the lowest bits then.
    const int bucket = __float_as_int(__fmaf_rn(x, 15.0f, 12582912.0f + 15.0f));
    // Of the lane that is named, 5 bits are looked at.
    *codes = *codes * 16 + __shfl_sync(0xffffffffu, below_, bucket);
    if (x > __shfl_sync(0xffffffffu, border_, bucket)) ++*codes;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float border_ = kInfinity;  // the first that is not below the bucket
  uint32_t below_ = 15;       // borders below the bucket
};

template <typename T>
struct Quantization {
  const T* w;
  uint8_t* packed;
  float* absmax;
  int64_t size, blocks;
};

// Eight lanes have a block of 64, so a warp has four at once, and kSteps times four to a unit. The
// next unit is read before this one is written. Whole blocks only; read in packs if kPacked.
template <typename T, bool kPacked>
struct QuantizeWarp {
  static constexpr int kLanes = 8, kElements = kNf4Block / kLanes;
  static constexpr int kSteps = 8 / sizeof(T);
  static constexpr int64_t kBlocks = 32 / kLanes * kSteps;
  using Elements = Words<T, kElements>;
  struct Unit {
    Elements steps[kSteps];
  };

  const Quantization<T>& a;
  const Coder& coder;
  const int lane = static_cast<int>(threadIdx.x % 32);

  __device__ int64_t BlockOf(int64_t unit, int step) const {
    return unit * kBlocks + step * (32 / kLanes) + lane / kLanes;
  }
  __device__ Unit Load(int64_t unit) const {
    Unit out;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t block = min(BlockOf(unit, u), a.blocks - 1);
      const T* from = a.w + block * kNf4Block + lane % kLanes * kElements;
      if constexpr (kPacked) {
        out.steps[u] = Elements::Load(from);
      } else {
#pragma unroll
        for (int i = 0; i < Elements::kPairs; ++i) {
          out.steps[u].SetPair(i, {ToFloat(from[2 * i]), ToFloat(from[2 * i + 1])});
        }
      }
    }
    return out;
  }
  __device__ void Store(int64_t unit, const Unit& in) const {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float absmax = in.steps[u].Largest();
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        absmax = fmaxf(absmax, __shfl_xor_sync(0xffffffffu, absmax, offset));
      }
      const float reciprocal = __frcp_rn(fmaxf(absmax, kMinAbsMax));
      uint32_t codes = 0;
#pragma unroll
      for (int i = Elements::kPairs - 1; i >= 0; --i) {  // the upper nibble of a byte is the first
        const float2 pair = in.steps[u].Pair(i);
        coder.Append(__fmul_rn(pair.x, reciprocal), &codes);
        coder.Append(__fmul_rn(pair.y, reciprocal), &codes);
      }
      const int64_t block = BlockOf(unit, u);
      if (block >= a.blocks) continue;
      if (lane % kLanes == 0) a.absmax[block] = absmax;
      StoreWord(a.packed + block * (kNf4Block / 2) + lane % kLanes * 4, codes);
    }
  }
  __device__ static void StoreWord(uint8_t* to, uint32_t word) {
    if constexpr (kPacked) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
};

template <typename T, bool kPacked>
__global__ __launch_bounds__(kThreads) void QuantizeKernel(
    const __grid_constant__ Tables tables, const __grid_constant__ Quantization<T> a,
    int64_t units) {
  LetNextStart();
  const Coder coder(tables.borders);
  const QuantizeWarp<T, kPacked> warp{a, coder};
  AwaitEarlier();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (unit >= units) return;
  auto now = warp.Load(unit);
  for (; unit < units; unit += warps) {
    auto next = now;
    if (unit + warps < units) next = warp.Load(unit + warps);
    warp.Store(unit, now);
    now = next;
  }
}

// The short block at the end, which keeps the raised maximum and is divided, while whole ones are
// multiplied by the reciprocal: the bits of bitsandbytes hang on it. One warp, two elements a lane.
template <typename T>
__global__ void QuantizeRestKernel(const __grid_constant__ Tables tables,
                                   const __grid_constant__ Quantization<T> a) {
  const Coder coder(tables.borders);
  const int64_t e = a.blocks * kNf4Block + 2 * static_cast<int64_t>(threadIdx.x);
  const float first = e < a.size ? ToFloat(a.w[e]) : 0.0f;
  const float second = e + 1 < a.size ? ToFloat(a.w[e + 1]) : 0.0f;
  const float absmax = fmaxf(WarpMax(fmaxf(fabsf(first), fabsf(second))), kMinAbsMax);
  if (threadIdx.x == 0) a.absmax[a.blocks] = absmax;
  uint32_t codes = 0;
  coder.Append(__fdiv_rn(first, absmax), &codes);
  coder.Append(__fdiv_rn(second, absmax), &codes);
  if (e < a.size) a.packed[e / 2] = static_cast<uint8_t>(codes);
}

// ---- Quantise the block maxima ----

constexpr unsigned kMeanShares = 8;  // what every device with clusters has

// One cluster. What its blocks have is added up in their order.
__global__ __launch_bounds__(1024) void MeanKernel(const float* absmax, int64_t blocks,
                                                   float* offset) {
  __shared__ double of_block;
  const auto cluster = ThisCluster();
  const int64_t step = static_cast<int64_t>(cluster.num_blocks()) * 1024;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t b = cluster.block_rank() * 1024 + threadIdx.x; b < blocks; b += step) {
    sum += static_cast<double>(absmax[b]);
  }
  sum = BlockSum<1024>(sum);
  if (threadIdx.x == 0) of_block = sum;
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) {
    sum = 0.0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
      sum += *cluster.map_shared_rank(&of_block, rank);
    }
    *offset = blocks > 0 ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
  }
  cluster.sync();  // until all has been read
}

// A block of threads per group.
__global__ __launch_bounds__(kNf4Group) void DoubleQuantizeKernel(
    const __grid_constant__ Tables tables, const float* absmax, const float* offset, uint8_t* codes,
    float* absmax2, int64_t blocks) {
  __shared__ float map[256];
  __shared__ float largest[kNf4Group / 32];
  map[threadIdx.x] = tables.map[threadIdx.x];
  const int64_t b = blockIdx.x * kNf4Group + threadIdx.x;
  const float centred = b < blocks ? __fsub_rn(absmax[b], *offset) : 0.0f;
  const float warp = WarpMax(fabsf(centred));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = warp;
  __syncthreads();
  float group = 0.0f;
  for (int w = 0; w < kNf4Group / 32; ++w) group = fmaxf(group, largest[w]);
  if (threadIdx.x == 0) absmax2[blockIdx.x] = group;
  const float reciprocal = group > 0.0f ? __frcp_rn(group) : 0.0f;
  if (b < blocks) codes[b] = NearestDynamicCode(map, __fmul_rn(centred, reciprocal));
}

}  // namespace

void Nf4QuantizeCuda(const Exec& exec, const Nf4QuantizeArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    const int64_t size = a.w.size();
    const Quantization<T> x{Data<const T>(a.w), Data<uint8_t>(a.packed), Data<float>(a.absmax),
                            size, size / kNf4Block};
    const auto run = [&]<bool kPacked>() {
      constexpr int64_t kBlocks = QuantizeWarp<T, kPacked>::kBlocks;
      const auto kernel = QuantizeKernel<T, kPacked>;
      const int64_t units = (x.blocks + kBlocks - 1) / kBlocks;
      const uint32_t grid = GridOf(kernel, (units + kThreads / 32 - 1) / (kThreads / 32));
      LaunchEarly(exec.stream, {dim3(grid), dim3(kThreads)}, kernel, MakeTables(), x, units);
    };
    if (x.blocks > 0) {
      const bool packed = Aligned(x.w, 16) && Aligned(x.packed, 4);
      packed ? run.template operator()<true>() : run.template operator()<false>();
    }
    if (size % kNf4Block == 0) return;
    QuantizeRestKernel<T><<<1, 32, 0, StreamOf(exec.stream)>>>(MakeTables(), x);
    CUDA_CHECK(cudaGetLastError());
  });
}

void Nf4DoubleQuantizeCuda(const Exec& exec, const Nf4DoubleQuantizeArgs& a) {
  const int64_t blocks = a.absmax.dim(0);
  const cudaStream_t stream = StreamOf(exec.stream);
  if (!a.offset_given) {
    const unsigned shares = HasSm90() ? kMeanShares : 1;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shares, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shares);
    config.blockDim = dim3(1024);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = HasSm90() ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, MeanKernel, Data<const float>(a.absmax), blocks,
                                  Data<float>(a.offset)));
  }
  if (blocks == 0) return;
  DoubleQuantizeKernel<<<static_cast<unsigned>(Nf4Groups(blocks)), kNf4Group, 0, stream>>>(
      MakeTables(), Data<const float>(a.absmax), Data<const float>(a.offset),
      Data<uint8_t>(a.codes), Data<float>(a.absmax2), blocks);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
