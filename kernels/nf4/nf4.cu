// NF4 on CUDA. Every product and sum is rounded on its own (no fused multiply-add), as on the CPU:
// the bits are the same.
#include <cuda_fp8.h>

#include <cstring>

#include "kernels/core/cuda.cuh"
#include "kernels/core/dynamic_map.h"
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

// ---- Dequantise ----

struct Source {
  const uint8_t* packed;
  const uint8_t* codes;
  const float* absmax;
  const float* absmax2;
  const float* offset;
  int64_t first_block;

  __device__ float AbsMax(const float* map, int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    const int64_t group = (first_block + block) / kNf4Group - first_block / kNf4Group;
    return __fadd_rn(__fmul_rn(map[codes[block]], absmax2[group]), *offset);
  }
};

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
constexpr int kUnroll = 4;  // loads in flight per thread

// 8 elements, which one 4-byte load brings, per step: `packs` of them in a row. Rows are flattened
// where they are contiguous.
template <typename T>
__global__ __launch_bounds__(kThreads) void DequantizeKernel(const __grid_constant__ Tables tables,
                                                             Source source, int64_t first_element,
                                                             T* out, int64_t stride, uint32_t packs,
                                                             uint32_t total) {
  __shared__ float nf4[16];
  __shared__ float map[256];
  if (threadIdx.x < 16) nf4[threadIdx.x] = tables.nf4[threadIdx.x];
  map[threadIdx.x] = tables.map[threadIdx.x];
  __syncthreads();
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(source.packed + first_element / 2);
  // Blocks stay for many turns: filling the tables costs about as much as a turn.
  for (uint64_t turn = blockIdx.x * (kThreads * kUnroll); turn < total;
       turn += static_cast<uint64_t>(gridDim.x) * (kThreads * kUnroll)) {
    const uint32_t base = static_cast<uint32_t>(turn) + threadIdx.x;
    uint32_t bytes[kUnroll];
    float absmax[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t i = base + u * kThreads;
      if (i >= total) continue;
      bytes[u] = __ldg(packed + i);
      absmax[u] = source.AbsMax(map, (first_element + 8 * static_cast<int64_t>(i)) / kNf4Block);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t i = base + u * kThreads;
      if (i >= total) continue;
      const uint32_t row = i / packs;
      Pack<T, 8> y;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t byte = bytes[u] >> (8 * j);
        y.Set(2 * j, __fmul_rn(nf4[(byte >> 4) & 15], absmax[u]));
        y.Set(2 * j + 1, __fmul_rn(nf4[byte & 15], absmax[u]));
      }
      y.Store(out + row * stride + 8 * static_cast<int64_t>(i - row * packs));
    }
  }
}

// Any range, an element at a time.
template <typename T>
struct DequantizeElement {
  static constexpr int kPack = 1;
  Tables tables;
  Source source;
  int64_t first_element, columns;
  Rows<T> out;
  __device__ void operator()(int64_t row, int64_t column) const {
    const int64_t e = first_element + row * columns + column;
    const int byte = source.packed[e / 2];
    const float value = tables.nf4[(e & 1) != 0 ? byte & 15 : byte >> 4];
    *out(row, column) = FromFloat<T>(__fmul_rn(value, source.AbsMax(tables.map, e / kNf4Block)));
  }
};

template <typename Args>
Source SourceOf(const Args& a, int64_t first_block) {
  const bool single = a.absmax.defined();
  return {Data<const uint8_t>(a.packed),
          single ? nullptr : Data<const uint8_t>(a.codes),
          single ? Data<const float>(a.absmax) : nullptr,
          single ? nullptr : Data<const float>(a.absmax2),
          single ? nullptr : Data<const float>(a.offset),
          first_block};
}

template <typename T>
void Dequantize(const Exec& exec, const Nf4DequantizeArgs& a) {
  const Source source = SourceOf(a, a.first_block);
  const int64_t N = a.out.dim(0), K = a.out.dim(1), size = N * K;
  if (size == 0) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(source.packed) + a.first_element / 2;
  const bool packable = a.first_element % 8 == 0 && start % 4 == 0 && Packable(8, {&a.out}) &&
                        size / 8 < (int64_t{1} << 32) - kThreads * kUnroll;
  if (!packable) {
    ForEachPack(DequantizeElement<T>{MakeTables(), source, a.first_element, K, RowsOf<T>(a.out)}, N,
                K, exec.stream);
    return;
  }
  const uint32_t total = static_cast<uint32_t>(size / 8);
  const uint32_t packs = a.out.contiguous() ? total : static_cast<uint32_t>(K / 8);
  const uint32_t blocks = std::min<uint32_t>(
      (total + kThreads * kUnroll - 1) / (kThreads * kUnroll), 8 * MultiprocessorCount());
  DequantizeKernel<T><<<blocks, kThreads, 0, StreamOf(exec.stream)>>>(
      MakeTables(), source, a.first_element, Data<T>(a.out), a.out.stride(0), packs, total);
  CUDA_CHECK(cudaGetLastError());
}

// ---- To codes of 8-bit floats ----

struct ToFp8 {
  Source source;
  const float* scale;
  uint8_t* q;
  int64_t stride, rows, columns;  // rows and columns of W

  __device__ static uint8_t Encode(float v) {
    return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
  }
};

// A block of 64 has 16 values at most, so 16 codes: looked up by the nibbles themselves, four at a
// time. Two adjacent lanes have the halves of a block; each makes 8 of the codes.
struct CodeTable {
  uint32_t words[4];  // codes 0 to 3, 4 to 7, ...

  // Every lane of the warp, each with its block's maximum.
  __device__ CodeTable(const float* nf4, float absmax, float inverse) {
    const bool upper = threadIdx.x % 2 == 1;
    const float* values = nf4 + (upper ? 8 : 0);
    uint32_t own[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 pair{__fmul_rn(__fmul_rn(values[4 * w + i], absmax), inverse),
                          __fmul_rn(__fmul_rn(values[4 * w + i + 1], absmax), inverse)};
        word |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3))
                << (8 * i);
      }
      own[w] = word;
    }
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, own[w], 1);
      words[w] = upper ? other : own[w];
      words[2 + w] = upper ? own[w] : other;
    }
  }

  // Byte i is the byte of b:a that nibble i of `places` names; where the nibble has its upper bit,
  // the sign of that byte, spread. (__byte_perm does not look at the upper bit.)
  __device__ static uint32_t Permute(uint32_t a, uint32_t b, uint32_t places) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(places));
    return out;
  }
  // Of the four nibbles of 16 bits, the lowest first.
  __device__ uint32_t Four(uint32_t nibbles) const {
    const uint32_t place = nibbles & 0x7777u;
    const uint32_t low = Permute(words[0], words[1], place);
    const uint32_t high = Permute(words[2], words[3], place);
    // 0xff where the nibble has its upper bit, else 0x80.
    const uint32_t spread = Permute(0x80808080u, 0x80808080u, nibbles);
    const uint32_t mask = (spread & 0x7f7f7f7fu) | (spread & 0x01010101u) << 7;
    return (low & ~mask) | (high & mask);
  }
  // Of 8 elements: the upper nibble of a byte is the first.
  __device__ uint2 Eight(uint32_t bytes) const {
    const uint32_t nibbles = (bytes & 0x0f0f0f0fu) << 4 | (bytes >> 4 & 0x0f0f0f0fu);
    return {Four(nibbles), Four(nibbles >> 16)};
  }
};

// A thread turns 32 elements, half a block, per step.
__global__ __launch_bounds__(kThreads) void ToFp8Kernel(const __grid_constant__ Tables tables,
                                                        const __grid_constant__ ToFp8 x) {
  __shared__ float nf4[16];
  __shared__ float map[256];
  if (threadIdx.x < 16) nf4[threadIdx.x] = tables.nf4[threadIdx.x];
  map[threadIdx.x] = tables.map[threadIdx.x];
  __syncthreads();
  const uint4* packed = reinterpret_cast<const uint4*>(x.source.packed);
  const float inverse = __frcp_rn(*x.scale);
  const uint32_t halves = static_cast<uint32_t>(x.columns / 32);
  const uint32_t total = static_cast<uint32_t>(x.rows) * halves;
  const uint32_t step = gridDim.x * kThreads;
  for (uint32_t begin = blockIdx.x * kThreads; begin < total; begin += step) {
    const uint32_t wanted = begin + threadIdx.x, i = min(wanted, total - 1);
    const uint4 bytes = __ldg(packed + i);
    const CodeTable table(nf4, x.source.AbsMax(map, i / 2), inverse);
    if (wanted >= total) continue;
    const uint32_t row = i / halves;
    const uint2 a = table.Eight(bytes.x), b = table.Eight(bytes.y), c = table.Eight(bytes.z),
                d = table.Eight(bytes.w);
    uint4* to = reinterpret_cast<uint4*>(x.q + row * x.stride +
                                         32 * static_cast<int64_t>(i - row * halves));
    to[0] = {a.x, a.y, b.x, b.y};
    to[1] = {c.x, c.y, d.x, d.y};
  }
}

// W^T: a block of threads turns 128 rows by 64 columns of W, a thread half a row of that.
constexpr int kTurnRows = 128;
constexpr int kTurnColumns = 64;

__global__ __launch_bounds__(kThreads) void ToFp8TurnedKernel(const __grid_constant__ Tables tables,
                                                              const __grid_constant__ ToFp8 x) {
  __shared__ float nf4[16];
  __shared__ float map[256];
  __shared__ alignas(4) uint8_t tile[kTurnColumns][kTurnRows + 4];
  if (threadIdx.x < 16) nf4[threadIdx.x] = tables.nf4[threadIdx.x];
  map[threadIdx.x] = tables.map[threadIdx.x];
  __syncthreads();
  const float inverse = __frcp_rn(*x.scale);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTurnRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTurnColumns;
  {
    const int row = threadIdx.x / 2, column = threadIdx.x % 2 * 32;
    const int64_t e = min(row0 + row, x.rows - 1) * x.columns + column0 + column;
    const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(x.source.packed) + e / 32);
    const CodeTable table(nf4, x.source.AbsMax(map, e / kNf4Block), inverse);
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint2 codes = table.Eight(words[w]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        tile[column + 8 * w + j][row] = static_cast<uint8_t>(codes.x >> (8 * j));
        tile[column + 8 * w + 4 + j][row] = static_cast<uint8_t>(codes.y >> (8 * j));
      }
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t row = row0 + 4 * lane;
  for (int j = threadIdx.x / 32; j < kTurnColumns; j += kThreads / 32) {
    uint8_t* to = x.q + (column0 + j) * x.stride + row;
    const uint8_t* from = &tile[j][4 * lane];
    if (row + 4 <= x.rows) {
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
    } else {
      for (int64_t i = 0; row + i < x.rows; ++i) to[i] = from[i];
    }
  }
}

// Any shape, an element at a time.
struct ToFp8Element {
  static constexpr int kPack = 1;
  Tables tables;
  ToFp8 x;
  bool turned;
  __device__ void operator()(int64_t row, int64_t column) const {
    const int64_t e = row * x.columns + column;
    const int byte = x.source.packed[e / 2];
    const float value = __fmul_rn(tables.nf4[(e & 1) != 0 ? byte & 15 : byte >> 4],
                                  x.source.AbsMax(tables.map, e / kNf4Block));
    const uint8_t code = ToFp8::Encode(__fmul_rn(value, __frcp_rn(*x.scale)));
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
  const ToFp8 x{SourceOf(a, 0), Data<const float>(a.scale), Data<uint8_t>(out),
                out.stride(0),  out.dim(turned ? 1 : 0),    out.dim(turned ? 0 : 1)};
  if (x.rows == 0 || x.columns == 0) return;
  const cudaStream_t stream = StreamOf(exec.stream);
  const auto aligned = [](const void* p, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
  };
  const bool packable = x.columns % (turned ? kTurnColumns : 32) == 0 &&
                        aligned(x.source.packed, 16) && aligned(x.q, 16) && x.stride % 16 == 0 &&
                        x.rows * x.columns / 32 < (int64_t{1} << 31);
  if (!packable) {
    ForEachPack(ToFp8Element{MakeTables(), x, turned}, x.rows, x.columns, exec.stream);
    return;
  }
  if (turned) {
    const dim3 grid(static_cast<unsigned>(x.columns / kTurnColumns),
                    static_cast<unsigned>((x.rows + kTurnRows - 1) / kTurnRows));
    ToFp8TurnedKernel<<<grid, kThreads, 0, stream>>>(MakeTables(), x);
  } else {
    const int64_t total = x.rows * x.columns / 32;
    const auto blocks = static_cast<uint32_t>(
        std::min<int64_t>((total + kThreads - 1) / kThreads, 16 * MultiprocessorCount()));
    ToFp8Kernel<<<blocks, kThreads, 0, stream>>>(MakeTables(), x);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
