// From NF4 on CUDA. Every product and sum is rounded on its own (no fused multiply-add), as
// on the CPU: the bits are the same.
#include "kernels/fp8/fp8.cuh"
#include "kernels/nf4/nf4.cuh"

namespace attune {
namespace {

using namespace nf4;

// Quotients by a number that the host knows, of numbers below 2^31.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t rest = (uint64_t{1} << shift_) - divisor;
    factor_ = static_cast<uint32_t>((rest << 32) / divisor + 1);
  }
  __device__ uint32_t Quotient(uint32_t n) const { return (__umulhi(n, factor_) + n) >> shift_; }

 private:
  uint32_t factor_ = 0, shift_ = 0;
};

// What one launch does: parts, each of so many units of work, which blocks of threads take.
constexpr int kMostParts = 4;

template <typename Part>
struct Parts {
  Part part[kMostParts] = {};
  uint32_t end[kMostParts] = {};  // of a part's units, counted over all parts
  int count = 0;

  void Add(const Part& added, int64_t units) {
    const uint32_t begin = this->units();
    for (int i = count; i < kMostParts; ++i) end[i] = begin + static_cast<uint32_t>(units);
    part[count++] = added;
  }
  __host__ __device__ uint32_t units() const { return end[kMostParts - 1]; }
  // The part of a unit, which becomes one of this part's own.
  __device__ const Part& Find(uint32_t* unit) const {
    int found = 0;
    uint32_t begin = 0;
#pragma unroll
    for (int i = 1; i < kMostParts; ++i) {
      if (*unit < end[i - 1]) continue;
      found = i;
      begin = end[i - 1];
    }
    *unit -= begin;
    return part[found];
  }
};

// The tables that are looked into by what differs between threads.
struct alignas(16) SharedTables {
  float map[256];
  float nf4[16];

  // By every thread of a block of kThreads. Parameters come to a warp one address at a time, so in
  // words of 16 bytes.
  __device__ void Fill(const Tables& tables) {
    const auto copy = [](const float* from, float* to) {
      *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
    };
    const unsigned t = threadIdx.x;
    if (t < 64) copy(tables.map + 4 * t, map + 4 * t);
    if (t >= 64 && t < 68) copy(tables.nf4 + 4 * (t - 64), nf4 + 4 * (t - 64));
    __syncthreads();
  }
};

// ---- Dequantise ----

// A block's maximum as it is stored, so that it can be on its way while other things are done.
struct Maximum {
  uint32_t code;
  float scale, offset;
  __device__ float Value(const float* map) const {
    return __fadd_rn(__fmul_rn(code < 256 ? map[code] : 1.0f, scale), offset);
  }
};

// A range of a weight, from the block on that its first element is in.
struct Source {
  const uint8_t* packed;
  const uint8_t* codes;
  const float* absmax;
  const float* absmax2;
  const float* offset;
  uint32_t group_begin;  // of the first group: blocks before the first
  uint32_t lead;         // of the first block: elements before the first

  template <typename Index>  // unsigned
  __device__ Maximum Load(Index block) const {
    if (absmax != nullptr) return {256, absmax[block], 0.0f};
    return {codes[block], absmax2[(group_begin + block) / static_cast<Index>(kNf4Group)], *offset};
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
    out.offset = Data<const float>(a.offset);
  }
  out.group_begin = static_cast<uint32_t>(in_groups % kNf4Group);
  out.lead = static_cast<uint32_t>(first_element % kNf4Block);
  return out;
}

constexpr uint32_t kPacks = 4;  // of a thread
constexpr uint32_t kWarpPacks = 32 * kPacks;
constexpr int64_t kMostPacks = int64_t{1} << 29;  // of one part: counts stay below 2^31
constexpr uint32_t kBlockPacks = kNf4Block / 8;

// 8 elements, which one 4-byte load brings, are a pack. Rows of `packs`, flattened where they are
// contiguous.
template <typename T>
struct Dequantization {
  Source source;
  T* out;
  int64_t stride;
  uint32_t packs, total;
  Divisor by_packs;
};

// A unit is kThreads * kPacks packs, a block of threads. A warp has kWarpPacks of them, one behind
// the other, and decodes the maxima of their blocks at once, one in each lane.
template <typename T>
__global__ __launch_bounds__(kThreads) void DequantizeKernel(
    const __grid_constant__ Tables tables, const __grid_constant__ Parts<Dequantization<T>> parts) {
  __shared__ SharedTables shared;
  LetNextStart();
  shared.Fill(tables);
  AwaitEarlier();
  uint32_t unit = blockIdx.x;
  const Dequantization<T>& x = parts.Find(&unit);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first = (unit * (kThreads / 32) + threadIdx.x / 32) * kWarpPacks;
  const uint32_t lead = x.source.lead / 8, last = x.total - 1;
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(x.source.packed) + lead;
  uint32_t loaded[kPacks];
#pragma unroll
  for (uint32_t u = 0; u < kPacks; ++u) {
    loaded[u] = __ldg(packed + min(first + lane + 32 * u, last));
  }
  const Maximum maximum =
      x.source.Load(min(first / kBlockPacks + lane, (lead + last) / kBlockPacks));
  const float own = maximum.Value(shared.map);
#pragma unroll
  for (uint32_t u = 0; u < kPacks; ++u) {
    const uint32_t i = first + lane + 32 * u, bytes = loaded[u];
    const float absmax = __shfl_sync(0xffffffffu, own, (lead + lane + 32 * u) / kBlockPacks);
    const auto value = [&](uint32_t places) {  // of a nibble, times 4
      const char* at = reinterpret_cast<const char*>(shared.nf4) + (places & 0x3c);
      return __fmul_rn(*reinterpret_cast<const float*>(at), absmax);
    };
    Words<T, 8> y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // the upper nibble of a byte is the first
      const uint32_t low = j == 0 ? bytes << 2 : bytes >> (8 * j - 2);
      y.SetPair(j, {value(bytes >> (8 * j + 2)), value(low)});
    }
    const uint32_t row = x.by_packs.Quotient(i);
    if (i < x.total) y.Store(x.out + row * x.stride + 8 * static_cast<int64_t>(i - row * x.packs));
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
    const float absmax = source.Load(e / kNf4Block).Value(tables.map);
    *out(row, column) = FromFloat<T>(__fmul_rn(value, absmax));
  }
};

template <typename T>
void Dequantize(const Exec& exec, std::span<const Nf4DequantizeArgs> all) {
  Parts<Dequantization<T>> parts;
  const auto launch = [&] {
    if (parts.count == 0) return;
    LaunchEarly(exec.stream, {dim3(parts.units()), dim3(kThreads)}, DequantizeKernel<T>,
                MakeTables(), parts);
    parts = {};
  };
  for (const Nf4DequantizeArgs& a : all) {
    const Source source = SourceOf(a, a.first_block, a.first_element);
    const int64_t N = a.out.dim(0), K = a.out.dim(1), size = N * K;
    if (size == 0) continue;
    const bool packable = source.lead % 8 == 0 && Aligned(source.packed, 4) &&
                          Packable(8, {&a.out}) && size / 8 < kMostPacks;
    if (!packable) {
      ForEachPack(DequantizeElement<T>{MakeTables(), source, K, RowsOf<T>(a.out)}, N, K,
                  exec.stream);
      continue;
    }
    const auto total = static_cast<uint32_t>(size / 8);
    const uint32_t packs = a.out.contiguous() ? total : static_cast<uint32_t>(K / 8);
    parts.Add({source, Data<T>(a.out), a.out.stride(0), packs, total, Divisor(packs)},
              (total + kThreads * kPacks - 1) / (kThreads * kPacks));
    if (parts.count == kMostParts) launch();
  }
  launch();
}

// ---- To codes of 8-bit floats ----

struct ToFp8 {
  Source source;
  const float* scale;
  uint8_t* q;
  int64_t stride, rows, columns;  // rows and columns of W
  uint32_t blocks;                // of 64
  uint32_t across;                // blocks, or turned squares, in a row
  Divisor by_across;
};

// Four values of a block as codes.
__device__ uint32_t CodesOf(const float* values, float absmax, float inverse) {
  const auto code = [&](int i) { return __fmul_rn(__fmul_rn(values[i], absmax), inverse); };
  return Fp8EncodeTwo(code(0), code(1)) | Fp8EncodeTwo(code(2), code(3)) << 16;
}

// A block of 64 has 16 values at most, so 16 codes: looked up by the nibbles themselves, four at a
// time.
struct CodeTable {
  uint32_t words[4];  // codes 0 to 3, 4 to 7, ...

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
};

// Four lanes have a block of 64, 16 elements each, so what a warp writes at once lies together. A
// warp has kSteps times 8 blocks, and decodes their maxima at once; a unit is a block of threads.
constexpr uint32_t kSteps = 4;
constexpr uint32_t kWarpBlocks = 8 * kSteps;
constexpr int64_t kUnitBlocks = kThreads / 32 * kWarpBlocks;

__global__ __launch_bounds__(kThreads) void ToFp8Kernel(
    const __grid_constant__ Tables tables, const __grid_constant__ Parts<ToFp8> parts) {
  __shared__ SharedTables shared;
  LetNextStart();
  shared.Fill(tables);
  const uint32_t lane = threadIdx.x % 32, quarter = lane % 4;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = shared.nf4[4 * quarter + i];
  AwaitEarlier();
  uint32_t unit = blockIdx.x;
  const ToFp8& x = parts.Find(&unit);
  const uint32_t first = (unit * (kThreads / 32) + threadIdx.x / 32) * kWarpBlocks;
  const uint32_t last = x.blocks - 1;
  const uint2* packed = reinterpret_cast<const uint2*>(x.source.packed) + quarter;
  uint2 bytes[kSteps];
#pragma unroll
  for (uint32_t u = 0; u < kSteps; ++u) {
    bytes[u] = __ldg(packed + 4 * static_cast<int64_t>(min(first + 8 * u + lane / 4, last)));
  }
  const Maximum maximum = x.source.Load(min(first + lane % kWarpBlocks, last));
  const float inverse = __frcp_rn(*parts.part[0].scale);
  const float own = maximum.Value(shared.map);
#pragma unroll
  for (uint32_t u = 0; u < kSteps; ++u) {
    const float absmax = __shfl_sync(0xffffffffu, own, 8 * u + lane / 4);
    const uint32_t codes = CodesOf(values, absmax, inverse);
    CodeTable table;
#pragma unroll
    for (int w = 0; w < 4; ++w) table.words[w] = __shfl_sync(0xffffffffu, codes, w, 4);
    const uint32_t i = first + 8 * u + lane / 4, row = x.by_across.Quotient(i);
    const uint2 a = table.Eight(bytes[u].x), b = table.Eight(bytes[u].y);
    uint8_t* to = x.q + row * x.stride + (i - row * x.across) * kNf4Block + 16 * quarter;
    if (i < x.blocks) *reinterpret_cast<uint4*>(to) = {a.x, a.y, b.x, b.y};
  }
}

// W^T: a block of threads turns a square of W, of which a thread first has half of a block of 64,
// twice, then 16 rows of 4 columns. In between the rows lie in shared memory in the order 0, 16,
// 32, ..., 1, 17, ...: so, and with kPitch, neither way of reading it meets a bank twice.
constexpr uint32_t kSquare = 128;
constexpr uint32_t kRun = 16;  // rows, the bytes of a store
constexpr uint32_t kRuns = kSquare / kRun;
constexpr uint32_t kPitch = kSquare + 16;
constexpr uint32_t kTurnedSteps = 2;
static_assert(kTurnedSteps * kThreads == kSquare * (kSquare / 32));
static_assert(kThreads == kRuns * (kSquare / 4) && kSquare == 2 * kNf4Block);

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

// A unit is a square, a block of threads. So many of them run at once that some read while others
// write.
constexpr int kTurnedBlocks = 6;
__global__ __launch_bounds__(kThreads, kTurnedBlocks) void ToFp8TurnedKernel(
    const __grid_constant__ Tables tables, const __grid_constant__ Parts<ToFp8> parts) {
  __shared__ SharedTables shared;
  __shared__ alignas(16) uint8_t square[kSquare * kPitch];
  LetNextStart();
  shared.Fill(tables);
  const uint32_t thread = threadIdx.x, half = thread % 2;
  AwaitEarlier();
  uint32_t unit = blockIdx.x;
  const ToFp8& x = parts.Find(&unit);
  const uint32_t down = x.by_across.Quotient(unit), across = unit - down * x.across;
  const auto last_row = static_cast<uint32_t>(x.rows) - 1;
  const uint32_t in_row = static_cast<uint32_t>(x.columns) / kNf4Block;
  uint4 bytes[kTurnedSteps];
  Maximum maximum[kTurnedSteps];
#pragma unroll
  for (uint32_t u = 0; u < kTurnedSteps; ++u) {
    const uint32_t place = (u * kThreads + thread) / 4;
    const uint32_t row = min(down * kSquare + place % kRuns * kRun + place / kRuns, last_row);
    const uint32_t block = row * in_row + min(2 * across + thread % 4 / 2, in_row - 1);
    bytes[u] = __ldg(reinterpret_cast<const uint4*>(x.source.packed) + 2 * block + half);
    maximum[u] = x.source.Load(block);
  }
  const float inverse = __frcp_rn(*parts.part[0].scale);
#pragma unroll
  for (uint32_t u = 0; u < kTurnedSteps; ++u) {
    const uint32_t place = (u * kThreads + thread) / 4;
    const float absmax = maximum[u].Value(shared.map);
    const float* values = shared.nf4 + 8 * half;  // each of two lanes has half of the codes
    const uint32_t first = CodesOf(values, absmax, inverse);
    const uint32_t second = CodesOf(values + 4, absmax, inverse);
    CodeTable table;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      table.words[w] = __shfl_sync(0xffffffffu, w % 2 == 0 ? first : second, w / 2, 2);
    }
    uint4* to = reinterpret_cast<uint4*>(square + place * kPitch + thread % 4 * 32);
    const uint2 a = table.Eight(bytes[u].x), b = table.Eight(bytes[u].y);
    to[0] = {a.x, a.y, b.x, b.y};
    const uint2 c = table.Eight(bytes[u].z), d = table.Eight(bytes[u].w);
    to[1] = {c.x, c.y, d.x, d.y};
  }
  __syncthreads();
  const uint32_t run = thread % kRuns, column = thread / kRuns * 4;
  const int64_t row = static_cast<int64_t>(down) * kSquare + run * kRun;
  const int64_t column0 = static_cast<int64_t>(across) * kSquare + column;
  uint32_t turned[4][kRun / 4];  // [column][four rows]
#pragma unroll
  for (uint32_t four = 0; four < kRun / 4; ++four) {
    uint32_t words[4], out[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t place = (4 * four + i) * kRuns + run;
      words[i] = *reinterpret_cast<const uint32_t*>(square + place * kPitch + column);
    }
    Transpose(words, out);
#pragma unroll
    for (int i = 0; i < 4; ++i) turned[i][four] = out[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column0 >= x.columns) break;
    uint8_t* to = x.q + (column0 + i) * x.stride + row;
    if (row + kRun <= x.rows) {
      *reinterpret_cast<uint4*>(to) = {turned[i][0], turned[i][1], turned[i][2], turned[i][3]};
      continue;
    }
#pragma unroll
    for (uint32_t r = 0; r < kRun; ++r) {
      if (row + r < x.rows) to[r] = static_cast<uint8_t>(turned[i][r / 4] >> (8 * (r % 4)));
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
    const uint64_t e = static_cast<uint64_t>(row * x.columns + column);
    const int byte = x.source.packed[e / 2];
    const float absmax = x.source.Load(e / kNf4Block).Value(tables.map);
    const float value = __fmul_rn(tables.nf4[(e & 1) != 0 ? byte & 15 : byte >> 4], absmax);
    const uint8_t code = Fp8Encode(__fmul_rn(value, __frcp_rn(*x.scale)));
    (turned ? x.q[column * x.stride + row] : x.q[row * x.stride + column]) = code;
  }
};

}  // namespace

void Nf4DequantizeCuda(const Exec& exec, std::span<const Nf4DequantizeArgs> parts) {
  DispatchCudaFloat(parts[0].out.dtype, [&]<typename T>() { Dequantize<T>(exec, parts); });
}

void Nf4ToFp8Cuda(const Exec& exec, std::span<const Nf4ToFp8Args> all) {
  const bool turned = all[0].transposed;
  Parts<ToFp8> parts;
  const auto launch = [&] {
    if (parts.count == 0) return;
    LaunchEarly(exec.stream, {dim3(parts.units()), dim3(kThreads)},
                turned ? ToFp8TurnedKernel : ToFp8Kernel, MakeTables(), parts);
    parts = {};
  };
  for (const Nf4ToFp8Args& a : all) {
    const TensorView& out = a.q;
    ToFp8 x{.source = SourceOf(a, 0, 0),
            .scale = Data<const float>(a.scale),
            .q = Data<uint8_t>(out),
            .stride = out.stride(0),
            .rows = out.dim(turned ? 1 : 0),
            .columns = out.dim(turned ? 0 : 1)};
    if (x.rows == 0 || x.columns == 0) continue;
    const bool packable = x.columns % kNf4Block == 0 && Aligned(x.source.packed, 16) &&
                          Aligned(x.q, 16) && x.stride % 16 == 0 &&
                          x.rows * x.columns / 8 < kMostPacks;
    if (!packable) {
      ForEachPack(ToFp8Element{MakeTables(), x, turned}, x.rows, x.columns, exec.stream);
      continue;
    }
    const auto pieces = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    x.blocks = static_cast<uint32_t>(x.rows * x.columns / kNf4Block);
    x.across = static_cast<uint32_t>(pieces(x.columns, turned ? kSquare : kNf4Block));
    x.by_across = Divisor(x.across);
    parts.Add(x, turned ? x.across * pieces(x.rows, kSquare) : pieces(x.blocks, kUnitBlocks));
    if (parts.count == kMostParts) launch();
  }
  launch();
}

}  // namespace attune
