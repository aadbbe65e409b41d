// LoraBackward in one pass over dy, on the tensor cores.
//
// dy_p is cut into strips of columns (PassGrid), whose tiles come through shared memory (TilePipe).
// A warp has 64 columns and 16 ranks: its share of db stays in registers to the end, its share of
// ds of a tile goes through shared memory, where the block adds up those of its warps. The sums of
// a strip and tile (ds) and of a block (db) go to the workspace; a second, small kernel adds them
// up in the order of strips and blocks. So the order of every sum hangs on T, N_p and r alone.
//
// Partial sums: r / kColumns of the bytes of dy twice (written and read), and 64 KiB per block.
#include "kernels/lora/lora_backward.h"
#include "kernels/lora/lora_pass.cuh"

namespace attune {

bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a);

namespace {

constexpr int kWarpColumns = 64;  // of a warp
// Beyond 32 ranks there is more to add up than to read: the products of MatMul are faster.
constexpr int kMaxGroups = 2;

// kGroups groups of warps with 16 ranks each.
template <int kGroups>
struct Shape {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kColumnGroups = kPassWarps / kGroups;
  static constexpr int kColumns = kColumnGroups * kWarpColumns;
  static constexpr int kStages = 4 * kGroups;
  using Pipe = TilePipe<1, 0, kColumns, kStages>;
  // Rows in shared memory lie apart so that no two of eight share a bank.
  static constexpr int kRankPitch = kRank + 8;
  static constexpr int kSElements = kPassRows * kRankPitch;
  static constexpr int kSumElements = kColumnGroups * kPassRows * kRankPitch;
  static constexpr int kBytes = Pipe::kBytes + 2 * kStages * kSElements + 4 * 2 * kSumElements;
  static_assert(kBytes <= 227 << 10);
};
static_assert(kWarpColumns == kBoxColumns);  // what is not loaded is nobody's

struct Part {
  CUtensorMap dy;
  const Bf16* b;
  float* db;
  int64_t b_stride, db_stride;
  int columns;
  int first_strip;
};
struct Params {
  Part part[kMaxLoraParts];
  int parts, r;
  int rows;  // of dy, s and ds
  PassGrid grid;
  const Bf16* s;
  Bf16* ds;
  int64_t s_stride, ds_stride;
  int ds_columns;
  float* ds_sums;  // (strips, rows, kRank)
  float* db_sums;  // (slots, kColumns, kRank)
  float scale, db_scale;
};

__device__ int PartOf(const Params& x, int strip) {
  int p = 0;
  while (p + 1 < x.parts && strip >= x.part[p + 1].first_strip) ++p;
  return p;
}
template <int kGroups>
struct Block {
  using S = Shape<kGroups>;
  static constexpr int kRankCopies = S::kRank / 8;  // of 16 bytes, in a row of s
  static_assert(kPassRows * kRankCopies <= kPassThreads);

  const Params& x;
  typename S::Pipe pipe;
  Bf16* s_tiles;       // kStages
  float* sums;         // two
  bool any;            // whether the warp has columns
  int ahead;           // the tile of s that is copied next
  const Bf16* s_from;  // what the thread copies of s's first row
  // Of this warp and thread: (column, column + 8; rank, rank + 1) of four times 16 columns and
  // twice 8 ranks; and B, whose rows are columns of dy.
  float db[4][2][4];
  uint32_t b[4][2][2];

  __device__ int Column() const { return threadIdx.x / 32 / kGroups * kWarpColumns; }
  __device__ int Rank() const { return threadIdx.x / 32 % kGroups * 16; }

  __device__ int Columns(int strip) const {
    const Part& part = x.part[PartOf(x, strip)];
    return min(part.columns - (strip - part.first_strip) * S::kColumns, S::kColumns);
  }
  __device__ auto StripOf(int strip) const {
    const Part& part = x.part[PartOf(x, strip)];
    const int column = (strip - part.first_strip) * S::kColumns;
    return StripBoxes<1, 0>{{&part.dy}, {}, column, BoxesIn(column, S::kColumns, part.columns)};
  }

  __device__ void AwaitAhead() const { WaitForCopies<S::kStages - 2>(); }
  __device__ void CopyAhead(int, int behind) { LoadNextS(pipe.Before(), behind); }
  __device__ void LoadNextS(int stage, int behind) {
    if (ahead < behind) LoadS(ahead++, stage);
    CommitCopies();
  }
  __device__ void LoadS(int tile, int stage) const {
    const int row_begin = tile * kPassRows, thread = threadIdx.x;
    if (thread >= kPassRows * kRankCopies) return;
    const int row = thread / kRankCopies, c = thread % kRankCopies * 8;
    const bool real = row_begin + row < x.rows && c < x.r;
    CopyOrZero(SharedAddress(s_tiles + stage * S::kSElements + row * S::kRankPitch + c),
               real ? s_from + row_begin * x.s_stride : x.s, real);
  }

  __device__ void Begin(int strip, int first, int behind) {
    const int thread = threadIdx.x;
    any = Column() < Columns(strip);
    ahead = first;
    s_from =
        x.s + thread / kRankCopies * x.s_stride + PartOf(x, strip) * x.r + thread % kRankCopies * 8;
    for (int i = 0; i < S::kStages - 1; ++i) LoadNextS((pipe.stage + i) % S::kStages, behind);
    LoadParameters(strip);
  }

  __device__ void LoadParameters(int strip) {
    const Part& part = x.part[PartOf(x, strip)];
    const int lane = threadIdx.x % 32;
    const int n0 = (strip - part.first_strip) * S::kColumns + Column() + lane % 4 * 2;
    const int c0 = Rank() + lane / 4;
    const auto value = [&](int n, int c) {
      return n < part.columns && c < x.r ? part.b[n * part.b_stride + c] : FromFloat<Bf16>(0.0f);
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int n = n0 + k * 16 + i * 8, c = c0 + half * 8;
          b[k][half][i] = PairOf(value(n, c), value(n + 1, c));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) db[k][half][i] = 0.0f;
      }
    }
  }

  __device__ void End(int slot) const {
    const int lane = threadIdx.x % 32;
    float* to = x.db_sums + int64_t{slot} * S::kColumns * S::kRank;
    to += (Column() + lane / 4) * S::kRank + Rank() + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* pair = to + k * 16 * S::kRank + half * 8;
        *reinterpret_cast<float2*>(pair) = make_float2(db[k][half][0], db[k][half][1]);
        *reinterpret_cast<float2*>(pair + 8 * S::kRank) =
            make_float2(db[k][half][2], db[k][half][3]);
      }
    }
  }

  __device__ void Multiply(int index) {
    const int lane = threadIdx.x % 32;
    const Bf16* tile = pipe.Tile(pipe.stage, 0);
    const Bf16* s_tile = s_tiles + pipe.stage * S::kSElements;
    // Rows 0-7, 8-15, 0-7, 8-15 of columns 0-7, 0-7, 8-15, 8-15; and across.
    const int down = lane % 16, right = lane / 16 * 8;
    const int across_down = lane / 16 * 8 + lane % 8, across_right = lane / 8 % 2 * 8;
    uint32_t s[4];
    LoadTransposed(s, s_tile + down * S::kRankPitch + Rank() + right);
    float ds[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!any) break;
      uint32_t rows[4], columns[4];
      LoadMatrices(rows, tile + S::Pipe::Place(down, Column() + k * 16 + right));
      LoadTransposed(columns, tile + S::Pipe::Place(across_down, Column() + k * 16 + across_right));
      MultiplyAdd(ds[0], rows, b[k][0][0], b[k][0][1]);
      MultiplyAdd(ds[1], rows, b[k][1][0], b[k][1][1]);
      MultiplyAdd(db[k][0], columns, s[0], s[1]);
      MultiplyAdd(db[k][1], columns, s[2], s[3]);
    }
    float* to = sums + index % 2 * S::kSumElements;
    to += (Column() / kWarpColumns * kPassRows + lane / 4) * S::kRankPitch + Rank() + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* pair = to + half * 8;
      *reinterpret_cast<float2*>(pair) = make_float2(ds[half][0], ds[half][1]);
      *reinterpret_cast<float2*>(pair + 8 * S::kRankPitch) = make_float2(ds[half][2], ds[half][3]);
    }
  }

  // The sums over the columns of the strip.
  __device__ void StoreSums(int strip, int tile) const {
    const int row_begin = tile * kPassRows;
    for (int at = threadIdx.x; at < kPassRows * S::kRank; at += kPassThreads) {
      const int row = at / S::kRank, c = at % S::kRank;
      const float* from = sums + tile % 2 * S::kSumElements + row * S::kRankPitch + c;
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < S::kColumnGroups; ++g) sum += from[g * kPassRows * S::kRankPitch];
      if (row_begin + row >= x.rows) continue;
      x.ds_sums[(static_cast<int64_t>(strip) * x.rows + row_begin + row) * S::kRank + c] = sum;
    }
  }
};

template <int kGroups>
__global__ __launch_bounds__(kPassBlock, 1) void PassKernel(const __grid_constant__ Params x) {
  if constexpr (kSm90) {
    using S = Shape<kGroups>;
    extern __shared__ __align__(1024) unsigned char memory[];
    Bf16* s_tiles = reinterpret_cast<Bf16*>(memory + S::Pipe::kBytes);
    float* sums = reinterpret_cast<float*>(s_tiles + S::kStages * S::kSElements);
    Block<kGroups> block{x, {memory}, s_tiles, sums};
    RunPass(x.grid, &block);
  }
}

// A thread per four elements of ds, then kLanes per column of a strip and four ranks.
template <int kGroups, int kLanes>
__global__ __launch_bounds__(256) void AddUpKernel(const __grid_constant__ Params x) {
  using S = Shape<kGroups>;
  AwaitEarlier();  // the sums are there
  int at = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  const int ds_packs = x.ds_columns / 4, rank_packs = x.r / 4;
  const int ds_threads = static_cast<int>(WholeWarps(x.rows * ds_packs));
  if (at < ds_threads) {
    if (at >= x.rows * ds_packs) return;
    const int row = at / ds_packs, column = (at - row * ds_packs) * 4, p = column / x.r;
    Pack<Bf16, 4> ds;
    for (int k = 0; k < 4; ++k) ds.Set(k, 0.0f);
    if (p < x.parts) {
      const int begin = x.part[p].first_strip;
      const int end = p + 1 < x.parts ? x.part[p + 1].first_strip : x.grid.strips;
      const int64_t stride = static_cast<int64_t>(x.rows) * S::kRank;
      const float* from = x.ds_sums + begin * stride + row * S::kRank + column - p * x.r;
      const Pack<float, 4> sum = SumOf(from, stride, end - begin);
      for (int k = 0; k < 4; ++k) ds.Set(k, x.scale * sum.v[k]);
    }
    ds.Store(x.ds + row * x.ds_stride + column);
    return;
  }
  at = (at - ds_threads) / kLanes;
  const int line = at / rank_packs, c = (at - line * rank_packs) * 4;
  const int strip = line / S::kColumns, column = line % S::kColumns;
  const Part& part = x.part[PartOf(x, strip)];
  const int n = (strip - part.first_strip) * S::kColumns + column;
  const bool real = strip < x.grid.strips && n < part.columns;
  const Pack<float, 4> sum = SumOfStrip<kLanes>(
      x.grid, real ? strip : -1, x.db_sums + column * S::kRank + c, S::kColumns * S::kRank);
  if (!real || threadIdx.x % kLanes != 0) return;
  float* to = part.db + n * part.db_stride + c;
  Pack<float, 4> db = Pack<float, 4>::Load(to);
  for (int k = 0; k < 4; ++k) db.v[k] += x.db_scale * sum.v[k];
  db.Store(to);
}

template <int kGroups>
PassGrid GridOf(const LoraBackwardArgs& a, int64_t rows) {
  int strips = 0;
  for (const LoraBackwardPart& part : a.parts) {
    strips += DivideUp(part.b.dim(0), Shape<kGroups>::kColumns);
  }
  return PassGridOf(strips, rows);
}

template <int kGroups>
int64_t DbSums(const PassGrid& grid) {
  return int64_t{grid.slots()} * Shape<kGroups>::kColumns * Shape<kGroups>::kRank;
}

// How many rows' partial sums fit into the workspace; in whole tiles, and in equal shares of T.
template <int kGroups>
int64_t RowsAtOnce(const LoraBackwardArgs& a) {
  const int64_t T = a.dy.dim(0);
  const PassGrid grid = GridOf<kGroups>(a, T);
  const int64_t left = a.workspace.bytes() - 4 * DbSums<kGroups>(grid);
  const int64_t most = left / (4 * grid.strips * Shape<kGroups>::kRank) / kPassRows * kPassRows;
  if (most <= 0) return 0;
  return int64_t{DivideUp(DivideUp(T, DivideUp(T, most)), kPassRows)} * kPassRows;
}

template <int kGroups>
Params ParamsOf(const LoraBackwardArgs& a, int64_t begin, int64_t rows) {
  Params x{};
  x.parts = static_cast<int>(a.parts.size());
  x.r = static_cast<int>(a.parts[0].b.dim(1));
  x.grid = GridOf<kGroups>(a, rows);
  int strips = 0;
  for (int p = 0; p < x.parts; ++p) {
    const LoraBackwardPart& part = a.parts[p];
    const Bf16* dy = Data<const Bf16>(a.dy) + begin * a.dy.stride(0) + part.column_begin;
    x.part[p] = {BoxesOf(dy, rows, part.b.dim(0), a.dy.stride(0), kPassRows),
                 Data<const Bf16>(part.b),
                 Data<float>(part.db),
                 part.b.stride(0),
                 part.db.stride(0),
                 static_cast<int>(part.b.dim(0)),
                 strips};
    strips += DivideUp(part.b.dim(0), Shape<kGroups>::kColumns);
  }
  x.rows = static_cast<int>(rows);
  x.s_stride = a.s.stride(0);
  x.ds_stride = a.ds.stride(0);
  x.s = Data<const Bf16>(a.s) + begin * x.s_stride;
  x.ds = Data<Bf16>(a.ds) + begin * x.ds_stride;
  x.ds_columns = static_cast<int>(a.ds.dim(1));
  x.db_sums = Data<float>(a.workspace);
  x.ds_sums = x.db_sums + DbSums<kGroups>(x.grid);
  x.scale = static_cast<float>(a.scale);
  x.db_scale = static_cast<float>(a.db_scale);
  return x;
}

template <int kGroups>
bool Run(const Exec& exec, const LoraBackwardArgs& a) {
  using S = Shape<kGroups>;
  const int64_t T = a.dy.dim(0), step = RowsAtOnce<kGroups>(a);
  if (step == 0) return false;
  const OpTraceScope trace(exec, "LoraBackward");
  CUDA_CHECK(cudaFuncSetAttribute(PassKernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  S::kBytes));
  for (int64_t begin = 0; begin < T; begin += step) {
    const Params x = ParamsOf<kGroups>(a, begin, std::min(step, T - begin));
    LaunchEarly(exec.stream, {dim3(x.grid.blocks), dim3(kPassBlock), S::kBytes},
                PassKernel<kGroups>, x);
    const int64_t ds_packs = int64_t{x.rows} * (x.ds_columns / 4);
    const int64_t db_packs = int64_t{x.grid.strips} * S::kColumns * (x.r / 4);
    if (x.grid.strips == 1) {
      LaunchBehind(exec, AddUpKernel<kGroups, kSlotLanesOfOne>, x, ds_packs, db_packs,
                   kSlotLanesOfOne);
    } else {
      LaunchBehind(exec, AddUpKernel<kGroups, kSlotLanes>, x, ds_packs, db_packs);
    }
  }
  return true;
}

}  // namespace

bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a) {
  const int64_t r = a.parts[0].b.dim(1);
  if (!HasSm90() || a.dy.dtype != DType::kBF16 || r == 0 || r % 8 != 0 || r > 16 * kMaxGroups)
    return false;
  if (a.dy.dim(0) == 0 || !Packable(4, {&a.ds})) return false;
  for (const TensorView* view : {&a.dy, &a.s}) {
    if (reinterpret_cast<uintptr_t>(view->data) % 16 != 0) return false;
    if (view->dim(0) > 1 && view->stride(0) % 8 != 0) return false;
  }
  for (const LoraBackwardPart& part : a.parts) {
    if (part.column_begin % 8 != 0 || part.b.dim(0) % 8 != 0 || part.b.dim(0) == 0) return false;
    if (!Packable(4, {&part.db})) return false;
  }
  return r <= 16 ? Run<1>(exec, a) : Run<2>(exec, a);
}

}  // namespace attune
