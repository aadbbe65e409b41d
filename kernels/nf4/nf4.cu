// NF4 on CUDA. Every product and sum is rounded on its own (no fused multiply-add), as on the CPU:
// the bits are the same.
#include <cstring>

#include "kernels/core/cuda.cuh"
#include "kernels/core/dynamic_map.h"
#include "kernels/fp8/fp8.cuh"
#include "kernels/nf4/nf4.h"

namespace attune {
namespace {

constexpr float kMinAbsMax = 1e-38f;

// Passed by value, so that a captured graph needs nothing else.
struct Tables {
  float nf4[16];
  float borders[16];  // between codes i and i + 1; the last is not used
  float map[256];
};
Tables MakeTables() {
  Tables out;
  std::memcpy(out.nf4, Nf4Values(), sizeof(out.nf4));
  for (int i = 0; i < 15; ++i) out.borders[i] = (out.nf4[i] + out.nf4[i + 1]) / 2.0f;
  out.borders[15] = out.nf4[15];
  std::memcpy(out.map, DynamicMap(/*is_signed=*/true), sizeof(out.map));
  return out;
}

// Quotients by a number that the host knows, of numbers below 2^31.
class Divisor {
 public:
  explicit Divisor(uint32_t divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t rest = (uint64_t{1} << shift_) - divisor;
    factor_ = static_cast<uint32_t>((rest << 32) / divisor + 1);
  }
  __device__ uint32_t Quotient(uint32_t n) const { return (__umulhi(n, factor_) + n) >> shift_; }

 private:
  uint32_t factor_ = 0, shift_ = 0;
};

// The tables that are looked into by what differs between threads. Blocks of threads stay for many
// turns: filling these costs about as much as a turn.
struct SharedTables {
  float nf4[16];
  float map[256];

  __device__ void Fill(const Tables& tables) {  // every thread of a block of 256 or more
    if (threadIdx.x < 16) nf4[threadIdx.x] = tables.nf4[threadIdx.x];
    if (threadIdx.x < 256) map[threadIdx.x] = tables.map[threadIdx.x];
    __syncthreads();
  }
};

// ---- Dequantise ----

// A range of a weight, from the block on that its first element is in.
struct Source {
  const uint8_t* packed;
  const uint8_t* codes;
  const float* absmax;
  const float* absmax2;
  const float* offset_at;
  uint32_t group_begin;  // of the first group: blocks before the first
  uint32_t lead;         // of the first block: elements before the first

  __device__ float Offset() const { return absmax != nullptr ? 0.0f : *offset_at; }
  template <typename Index>  // unsigned
  __device__ float AbsMax(const float* map, Index block, float offset) const {
    if (absmax != nullptr) return absmax[block];
    const Index group = (group_begin + block) / static_cast<Index>(kNf4Group);
    return __fadd_rn(__fmul_rn(map[codes[block]], absmax2[group]), offset);
  }
};

template <typename Args>
Source SourceOf(const Args& a, int64_t first_block, int64_t first_element) {
  const int64_t block = first_element / kNf4Block, in_groups = first_block % kNf4Group + block;
  Source out{};
  out.packed = Data<const uint8_t>(a.packed) + block * (kNf4Block / 2);
  if (a.absmax.defined()) {
    out.absmax = Data<const float>(a.absmax) + block;
  } else {
    out.codes = Data<const uint8_t>(a.codes) + block;
    out.absmax2 = Data<const float>(a.absmax2) + in_groups / kNf4Group;
    out.offset_at = Data<const float>(a.offset);
  }
  out.group_begin = static_cast<uint32_t>(in_groups % kNf4Group);
  out.lead = static_cast<uint32_t>(first_element % kNf4Block);
  return out;
}

uint32_t MultiprocessorCount() {
  static const uint32_t count = [] {
    int device = 0, out = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&out, cudaDevAttrMultiProcessorCount, device));
    return static_cast<uint32_t>(out);
  }();
  return count;
}

constexpr int kThreads = 256;
constexpr uint32_t kPacks = 4;  // of a thread per turn
constexpr uint32_t kWarpPacks = 32 * kPacks;
constexpr uint32_t kBlockPacks = kNf4Block / 8;

// 8 elements, which one 4-byte load brings, are a pack. A warp has kWarpPacks of them per turn, one
// behind the other, and decodes the maxima of their blocks at once, one in each lane. Rows of
// `packs`, flattened where they are contiguous.
template <typename T>
__global__ __launch_bounds__(kThreads) void DequantizeKernel(
    const __grid_constant__ Tables tables, const __grid_constant__ Source source, T* out,
    int64_t stride, uint32_t packs, const __grid_constant__ Divisor by_packs, uint32_t total) {
  __shared__ SharedTables shared;
  shared.Fill(tables);
  const uint32_t lead = source.lead / 8, lane = threadIdx.x % 32;
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(source.packed) + lead;
  const uint32_t last_block = (lead + total - 1) / kBlockPacks;
  const float offset = source.Offset();
  const uint32_t warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  for (uint32_t turn = warp * kWarpPacks; turn < total;
       turn += gridDim.x * (kThreads / 32) * kWarpPacks) {
    const uint32_t base = turn + lane;
    uint32_t bytes[kPacks];
#pragma unroll
    for (uint32_t u = 0; u < kPacks; ++u) bytes[u] = __ldg(packed + min(base + 32 * u, total - 1));
    const uint32_t block = min(turn / kBlockPacks + lane, last_block);
    const float own = source.AbsMax(shared.map, block, offset);
    float absmax[kPacks];
#pragma unroll
    for (uint32_t u = 0; u < kPacks; ++u) {
      absmax[u] = __shfl_sync(0xffffffffu, own, (lead + lane + 32 * u) / kBlockPacks);
    }
#pragma unroll
    for (uint32_t u = 0; u < kPacks; ++u) {
      const uint32_t i = base + 32 * u;
      const auto value = [&](uint32_t places) {  // of a nibble, times 4
        const char* at = reinterpret_cast<const char*>(shared.nf4) + (places & 0x3c);
        return __fmul_rn(*reinterpret_cast<const float*>(at), absmax[u]);
      };
      Words<T, 8> y;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // the upper nibble of a byte is the first
        const uint32_t low = j == 0 ? bytes[u] << 2 : bytes[u] >> (8 * j - 2);
        y.SetPair(j, {value(bytes[u] >> (8 * j + 2)), value(low)});
      }
      const uint32_t row = by_packs.Quotient(i);
      if (i < total) y.Store(out + row * stride + 8 * static_cast<int64_t>(i - row * packs));
    }
  }
}

// Any range, an element at a time.
template <typename T>
struct DequantizeElement {
  static constexpr int kPack = 1;
  Tables tables;
  Source source;
  int64_t columns;
  Rows<T> out;
  __device__ void operator()(int64_t row, int64_t column) const {
    const uint64_t e = source.lead + static_cast<uint64_t>(row * columns + column);
    const int byte = source.packed[e / 2];
    const float value = tables.nf4[(e & 1) != 0 ? byte & 15 : byte >> 4];
    const float absmax = source.AbsMax(tables.map, e / kNf4Block, source.Offset());
    *out(row, column) = FromFloat<T>(__fmul_rn(value, absmax));
  }
};

bool Aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

template <typename T>
void Dequantize(const Exec& exec, const Nf4DequantizeArgs& a) {
  const Source source = SourceOf(a, a.first_block, a.first_element);
  const int64_t N = a.out.dim(0), K = a.out.dim(1), size = N * K;
  if (size == 0) return;
  const bool packable = source.lead % 8 == 0 && Aligned(source.packed, 4) &&
                        Packable(8, {&a.out}) && size / 8 < (int64_t{1} << 31) - (1 << 24);
  if (!packable) {
    ForEachPack(DequantizeElement<T>{MakeTables(), source, K, RowsOf<T>(a.out)}, N, K, exec.stream);
    return;
  }
  const uint32_t total = static_cast<uint32_t>(size / 8);
  const uint32_t packs = a.out.contiguous() ? total : static_cast<uint32_t>(K / 8);
  const uint32_t blocks = std::min<uint32_t>((total + kThreads * kPacks - 1) / (kThreads * kPacks),
                                             8 * MultiprocessorCount());
  DequantizeKernel<T><<<blocks, kThreads, 0, StreamOf(exec.stream)>>>(
      MakeTables(), source, Data<T>(a.out), a.out.stride(0), packs, Divisor(packs), total);
  CUDA_CHECK(cudaGetLastError());
}

// ---- To codes of 8-bit floats ----

struct ToFp8 {
  Source source;
  const float* scale;
  uint8_t* q;
  int64_t stride, rows, columns;  // rows and columns of W
};

// A block of 64 has 16 values at most, so 16 codes: looked up by the nibbles themselves, four at a
// time.
struct CodeTable {
  uint32_t words[4];  // codes 0 to 3, 4 to 7, ...

  __device__ CodeTable(const Tables& tables, float absmax, float inverse) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const auto value = [&](int i) {
        return __fmul_rn(__fmul_rn(tables.nf4[4 * w + i], absmax), inverse);
      };
      words[w] = Fp8EncodeTwo(value(0), value(1)) | Fp8EncodeTwo(value(2), value(3)) << 16;
    }
  }

  // Byte i is the byte of b:a that nibble i of `places` names; where the nibble has its upper bit,
  // the sign of that byte, spread. (__byte_perm does not look at the upper bit.)
  __device__ static uint32_t Permute(uint32_t a, uint32_t b, uint32_t places) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(places));
    return out;
  }
  // By the four lowest nibbles, which have no upper bits; where these were, `upper` is 0xff.
  __device__ uint32_t Four(uint32_t nibbles, uint32_t upper) const {
    const uint32_t low = Permute(words[0], words[1], nibbles);
    const uint32_t high = Permute(words[2], words[3], nibbles);
    return (low & ~upper) | (high & upper);
  }
  // Of 8 elements: the upper nibble of a byte is the first.
  __device__ uint2 Eight(uint32_t bytes) const {
    const uint32_t raised = bytes << 4;  // the lower nibbles' upper bits are signs now
    const uint32_t nibbles = (bytes >> 4 & 0x07070707u) | (raised & 0x70707070u);
    return {Four(nibbles, Permute(bytes, raised, 0xd9c8)),
            Four(nibbles >> 16, Permute(bytes, raised, 0xfbea))};
  }
  // Of 32 elements.
  __device__ void Half(uint4 bytes, uint4 (&codes)[2]) const {
    const uint2 a = Eight(bytes.x), b = Eight(bytes.y), c = Eight(bytes.z), d = Eight(bytes.w);
    codes[0] = {a.x, a.y, b.x, b.y};
    codes[1] = {c.x, c.y, d.x, d.y};
  }
};

// A thread turns a block of 64 per step.
__global__ __launch_bounds__(kThreads) void ToFp8Kernel(const __grid_constant__ Tables tables,
                                                        const __grid_constant__ ToFp8 x,
                                                        const __grid_constant__ Divisor by_blocks) {
  __shared__ SharedTables shared;
  shared.Fill(tables);
  const uint4* packed = reinterpret_cast<const uint4*>(x.source.packed);
  const float inverse = __frcp_rn(*x.scale), offset = x.source.Offset();
  const uint32_t blocks = static_cast<uint32_t>(x.columns / kNf4Block);
  const uint32_t total = static_cast<uint32_t>(x.rows) * blocks;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const uint4 bytes[2] = {__ldg(packed + 2 * static_cast<int64_t>(i)),
                            __ldg(packed + 2 * static_cast<int64_t>(i) + 1)};
    const CodeTable table(tables, x.source.AbsMax(shared.map, i, offset), inverse);
    const uint32_t row = by_blocks.Quotient(i);
    uint4* to = reinterpret_cast<uint4*>(x.q + row * x.stride) + 4 * (i - row * blocks);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 codes[2];
      table.Half(bytes[half], codes);
      to[2 * half] = codes[0];
      to[2 * half + 1] = codes[1];
    }
  }
}

// W^T: a block of threads turns a square of W, in which a thread first has one block of 64, then 16
// rows of 4 columns. In between the rows lie in shared memory in the order 0, 16, 32, ..., 1, 17,
// ...: so, and with kPitch, neither way of reading it meets a bank twice.
constexpr int kSquare = 128;
constexpr int kRun = 16;  // rows, the bytes of a store
constexpr int kRuns = kSquare / kRun;
constexpr int kPitch = kSquare + 16;
static_assert(kThreads == kSquare * (kSquare / kNf4Block) && kThreads == kRuns * (kSquare / 4));

// The bytes of four words the other way round: byte i of word j is byte j of word i of `out`.
__device__ void Transpose(const uint32_t* words, uint32_t (&out)[4]) {
  const uint32_t low[2] = {__byte_perm(words[0], words[1], 0x5140),
                           __byte_perm(words[2], words[3], 0x5140)};
  const uint32_t high[2] = {__byte_perm(words[0], words[1], 0x7362),
                            __byte_perm(words[2], words[3], 0x7362)};
  out[0] = __byte_perm(low[0], low[1], 0x5410);
  out[1] = __byte_perm(low[0], low[1], 0x7632);
  out[2] = __byte_perm(high[0], high[1], 0x5410);
  out[3] = __byte_perm(high[0], high[1], 0x7632);
}

// `across` squares cover the columns, `squares` all of W.
__global__ __launch_bounds__(kThreads) void ToFp8TurnedKernel(const __grid_constant__ Tables tables,
                                                              const __grid_constant__ ToFp8 x,
                                                              uint32_t across, uint32_t squares) {
  __shared__ SharedTables shared;
  __shared__ alignas(16) uint8_t square[kSquare * kPitch];
  shared.Fill(tables);
  const uint4* packed = reinterpret_cast<const uint4*>(x.source.packed);
  const float inverse = __frcp_rn(*x.scale), offset = x.source.Offset();
  const int thread = static_cast<int>(threadIdx.x);
  for (uint32_t turn = blockIdx.x; turn < squares; turn += gridDim.x) {
    const int64_t row0 = static_cast<int64_t>(turn / across) * kSquare;
    const int64_t column0 = static_cast<int64_t>(turn % across) * kSquare;
    {
      const int place = thread / 2, column = thread % 2 * static_cast<int>(kNf4Block);
      const int64_t row = row0 + place % kRuns * kRun + place / kRuns;
      if (row < x.rows && column0 + column < x.columns) {
        const auto block = static_cast<uint32_t>((row * x.columns + column0 + column) / kNf4Block);
        const uint4 bytes[2] = {__ldg(packed + 2 * static_cast<int64_t>(block)),
                                __ldg(packed + 2 * static_cast<int64_t>(block) + 1)};
        const CodeTable table(tables, x.source.AbsMax(shared.map, block, offset), inverse);
        uint4* to = reinterpret_cast<uint4*>(square + place * kPitch + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 codes[2];
          table.Half(bytes[half], codes);
          to[2 * half] = codes[0];
          to[2 * half + 1] = codes[1];
        }
      }
    }
    __syncthreads();
    const int run = thread % kRuns, column = thread / kRuns * 4;
    const int64_t row = row0 + run * kRun;
    uint32_t turned[4][kRun / 4];  // [column][four rows]
#pragma unroll
    for (int four = 0; four < kRun / 4; ++four) {
      uint32_t words[4], out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = (4 * four + i) * kRuns + run;
        words[i] = *reinterpret_cast<const uint32_t*>(square + place * kPitch + column);
      }
      Transpose(words, out);
#pragma unroll
      for (int i = 0; i < 4; ++i) turned[i][four] = out[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column0 + column >= x.columns) break;
      uint8_t* to = x.q + (column0 + column + i) * x.stride + row;
      if (row + kRun <= x.rows) {
        *reinterpret_cast<uint4*>(to) = {turned[i][0], turned[i][1], turned[i][2], turned[i][3]};
        continue;
      }
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        if (row + r < x.rows) to[r] = static_cast<uint8_t>(turned[i][r / 4] >> (8 * (r % 4)));
      }
    }
    __syncthreads();  // before the next square
  }
}

// Any shape, an element at a time.
struct ToFp8Element {
  static constexpr int kPack = 1;
  Tables tables;
  ToFp8 x;
  bool turned;
  __device__ void operator()(int64_t row, int64_t column) const {
    const uint64_t e = static_cast<uint64_t>(row * x.columns + column);
    const int byte = x.source.packed[e / 2];
    const float absmax = x.source.AbsMax(tables.map, e / kNf4Block, x.source.Offset());
    const float value = __fmul_rn(tables.nf4[(e & 1) != 0 ? byte & 15 : byte >> 4], absmax);
    const uint8_t code = Fp8Encode(__fmul_rn(value, __frcp_rn(*x.scale)));
    (turned ? x.q[column * x.stride + row] : x.q[row * x.stride + column]) = code;
  }
};

// ---- Quantise: a warp per block of 64, two elements per lane ----

// How many borders lie below `scaled`: they ascend.
__device__ int Nf4Code(const float* borders, float scaled) {
  int code = 0;
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    if (scaled > borders[code + step - 1]) code += step;
  }
  return code;
}

template <typename T>
__global__ __launch_bounds__(kThreads) void QuantizeKernel(const __grid_constant__ Tables tables,
                                                           const T* w, uint8_t* packed,
                                                           float* absmax_out, int64_t size,
                                                           int64_t blocks) {
  __shared__ float borders[16];
  if (threadIdx.x < 16) borders[threadIdx.x] = tables.borders[threadIdx.x];
  __syncthreads();
  const int64_t block = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  if (block >= blocks) return;
  const int64_t e = block * kNf4Block + 2 * (threadIdx.x % 32);
  const float first = e < size ? ToFloat(w[e]) : 0.0f;
  const float second = e + 1 < size ? ToFloat(w[e + 1]) : 0.0f;
  float absmax = WarpMax(fmaxf(fabsf(first), fabsf(second)));
  // A short last block keeps the raised maximum and is divided; a whole one is multiplied by the
  // reciprocal. The bits of bitsandbytes hang on it.
  const bool tail = (block + 1) * kNf4Block > size;
  if (tail) absmax = fmaxf(absmax, kMinAbsMax);
  const float reciprocal = __frcp_rn(fmaxf(absmax, kMinAbsMax));
  const auto scaled = [&](float value) {
    const float ratio = tail ? __fdiv_rn(value, absmax) : __fmul_rn(value, reciprocal);
    return fminf(fmaxf(ratio, -1.0f), 1.0f);
  };
  if (threadIdx.x % 32 == 0) absmax_out[block] = absmax;
  if (e < size) {
    const int high = Nf4Code(borders, scaled(first)), low = Nf4Code(borders, scaled(second));
    packed[e / 2] = static_cast<uint8_t>(high << 4 | low);
  }
}

// ---- Quantise the block maxima ----

__global__ __launch_bounds__(1024) void MeanKernel(const float* absmax, int64_t blocks,
                                                   float* offset) {
  double sum = 0.0;
  for (int64_t b = threadIdx.x; b < blocks; b += 1024) sum += static_cast<double>(absmax[b]);
  sum = BlockSum<1024>(sum);
  if (threadIdx.x == 0) {
    *offset = blocks > 0 ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
  }
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
  const int64_t size = a.w.size(), blocks = Nf4Blocks(size);
  if (size == 0) return;
  const unsigned grid = static_cast<unsigned>((blocks + kThreads / 32 - 1) / (kThreads / 32));
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    QuantizeKernel<T><<<grid, kThreads, 0, StreamOf(exec.stream)>>>(
        MakeTables(), Data<const T>(a.w), Data<uint8_t>(a.packed), Data<float>(a.absmax), size,
        blocks);
  });
  CUDA_CHECK(cudaGetLastError());
}

void Nf4DoubleQuantizeCuda(const Exec& exec, const Nf4DoubleQuantizeArgs& a) {
  const int64_t blocks = a.absmax.dim(0);
  const cudaStream_t stream = StreamOf(exec.stream);
  if (!a.offset_given) {
    MeanKernel<<<1, 1024, 0, stream>>>(Data<const float>(a.absmax), blocks, Data<float>(a.offset));
    CUDA_CHECK(cudaGetLastError());
  }
  if (blocks == 0) return;
  DoubleQuantizeKernel<<<static_cast<unsigned>(Nf4Groups(blocks)), kNf4Group, 0, stream>>>(
      MakeTables(), Data<const float>(a.absmax), Data<const float>(a.offset),
      Data<uint8_t>(a.codes), Data<float>(a.absmax2), blocks);
  CUDA_CHECK(cudaGetLastError());
}

void Nf4DequantizeCuda(const Exec& exec, const Nf4DequantizeArgs& a) {
  DispatchCudaFloat(a.out.dtype, [&]<typename T>() { Dequantize<T>(exec, a); });
}

void Nf4ToFp8Cuda(const Exec& exec, const Nf4ToFp8Args& a) {
  const bool turned = a.transposed;
  const TensorView& out = a.q;
  const ToFp8 x{SourceOf(a, 0, 0), Data<const float>(a.scale), Data<uint8_t>(out),
                out.stride(0),     out.dim(turned ? 1 : 0),    out.dim(turned ? 0 : 1)};
  if (x.rows == 0 || x.columns == 0) return;
  const cudaStream_t stream = StreamOf(exec.stream);
  const int64_t blocks = x.rows * x.columns / kNf4Block;
  const bool packable = x.columns % kNf4Block == 0 && Aligned(x.source.packed, 16) &&
                        Aligned(x.q, 16) && x.stride % 16 == 0 &&
                        blocks < (int64_t{1} << 31) - (1 << 24);
  if (!packable) {
    ForEachPack(ToFp8Element{MakeTables(), x, turned}, x.rows, x.columns, exec.stream);
    return;
  }
  if (turned) {
    const auto across = static_cast<uint32_t>((x.columns + kSquare - 1) / kSquare);
    const auto squares = across * static_cast<uint32_t>((x.rows + kSquare - 1) / kSquare);
    const uint32_t grid = std::min(squares, 5 * MultiprocessorCount());
    ToFp8TurnedKernel<<<grid, kThreads, 0, stream>>>(MakeTables(), x, across, squares);
  } else {
    const auto grid = static_cast<uint32_t>(
        std::min<int64_t>((blocks + kThreads - 1) / kThreads, 8 * MultiprocessorCount()));
    ToFp8Kernel<<<grid, kThreads, 0, stream>>>(
        MakeTables(), x, Divisor(static_cast<uint32_t>(x.columns / kNf4Block)));
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
