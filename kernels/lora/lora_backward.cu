// LoraBackward in one pass over dy, on the tensor cores.
//
// dy_p is cut into strips of kColumns columns, a strip into tiles of 16 rows; a unit is a tile of a
// strip. Units are numbered strip by strip, and every block takes an equal run of them, so that all
// multiprocessors are busy to the end, whatever T and N. Tiles come through shared memory, several
// ahead, by bulk copies: copies of 16 bytes, waiting for memory, were seen to hold up the loads of
// matrices behind them. A warp has 64 columns and 16 ranks: its share of db stays in registers
// until the strip ends (or the block's run), its share of ds of a tile goes through shared memory,
// where the block adds up those of its warps. The sums of a strip and tile (ds) and of a strip and
// block (db) go to the workspace; a second, small kernel adds them up in the order of their
// numbers. So the order of every sum hangs on T, N_p and r alone.
//
// Partial sums: r / kColumns of the bytes of dy twice (written and read), and 64 KiB per block and
// strip.
#include "kernels/core/cuda.cuh"
#include "kernels/lora/lora_backward.h"

namespace attune {

bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a);

namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kRows = 16;         // of a tile
constexpr int kWarpColumns = 64;  // of a warp
constexpr int kBlocks = 132;      // one per multiprocessor of an H100; others run as many
// Beyond 32 ranks there is more to add up than to read: the products of MatMul are faster.
constexpr int kMaxGroups = 2;

// kGroups groups of warps with 16 ranks each.
template <int kGroups>
struct Shape {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kColumnGroups = kWarps / kGroups;
  static constexpr int kColumns = kColumnGroups * kWarpColumns;
  static constexpr int kStages = 4 * kGroups;
  // Rows in shared memory lie apart so that no two of eight share a bank.
  static constexpr int kPitch = kColumns + 8;
  static constexpr int kRankPitch = kRank + 8;
  static constexpr int kTileElements = kRows * kPitch;
  static constexpr int kSElements = kRows * kRankPitch;
  static constexpr int kSumElements = kColumnGroups * kRows * kRankPitch;
  static constexpr int kBarrierBytes = 128;
  static_assert(8 * kStages <= kBarrierBytes);
  static constexpr int kBytes =
      kBarrierBytes + 2 * kStages * (kTileElements + kSElements) + 4 * 2 * kSumElements;
  static_assert(kBytes <= 227 << 10);
};
constexpr int kStripSums = kThreads * 32;  // of db, for every kGroups: kColumns kRank

struct Part {
  const Bf16* b;
  float* db;
  int64_t b_stride, db_stride;
  int column_begin, columns;
  int first_strip;
};
struct Params {
  Part part[kMaxLoraParts];
  int parts, r;
  int rows;           // of dy, s and ds
  int tiles, strips;  // tiles of a strip, strips of all parts
  int blocks;
  const Bf16* dy;
  const Bf16* s;
  Bf16* ds;
  int64_t dy_stride, s_stride, ds_stride;
  int ds_columns;
  bool ragged;     // some tiles are not full
  float* ds_sums;  // (strips, rows, kRank)
  float* db_sums;  // (blocks + strips - 1, kColumns, kRank): of block b and strip q at b + q
  float scale, db_scale;
};

__device__ int PartOf(const Params& x, int strip) {
  int p = 0;
  while (p + 1 < x.parts && strip >= x.part[p + 1].first_strip) ++p;
  return p;
}
// Block b has the units [FirstUnit(b), FirstUnit(b + 1)). There are fewer than 2^16 units: the
// workspace holds no more.
__device__ int FirstUnit(const Params& x, int block) {
  return block * (x.strips * x.tiles) / x.blocks;
}
__device__ int BlockOf(const Params& x, int unit) {
  return ((unit + 1) * x.blocks - 1) / (x.strips * x.tiles);
}

__device__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes, of which those behind the first `bytes` are zero.
__device__ void CopyAsync(Bf16* to, const Bf16* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The barrier of a bulk copy: its one arrival says how many bytes are to come.
__device__ void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ void ExpectBytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ void WaitFor(uint64_t* barrier, int parity) {
  int done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
}
// Bulk copies from here on see what this thread has written to shared memory.
__device__ void FenceBulkCopies() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Addresses and bytes in multiples of 16.
__device__ void BulkCopy(Bf16* to, const Bf16* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// Four matrices of 8 x 8; the lanes name their rows.
__device__ void LoadMatrices(uint32_t (&m)[4], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ void LoadTransposed(uint32_t (&m)[4], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// d (16, 8) += a (16, 16) b (16, 8).
__device__ void MultiplyAdd(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ uint32_t PairOf(Bf16 low, Bf16 high) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16 | __bfloat16_as_ushort(low);
}

// The units in their order.
struct Unit {
  int strip, tile;
  __device__ void Next(int tiles) {
    if (++tile == tiles) tile = 0, ++strip;
  }
};

template <int kGroups>
struct Block {
  using S = Shape<kGroups>;
  static constexpr int kRankCopies = S::kRank / 8;  // of 16 bytes, in a row of s
  static_assert(kRows * kRankCopies <= kThreads);

  const Params& x;
  uint64_t* barriers;  // one per stage
  Bf16* tiles;         // kStages of them
  Bf16* s_tiles;       // likewise
  float* sums;         // two
  // Of the first tile of the strip: the row that the lane copies, the bytes of a row, and what the
  // thread copies of s.
  const Bf16* dy_from;
  int row_bytes;
  const Bf16* s_from;
  // Of this warp and thread: (column, column + 8; rank, rank + 1) of four times 16 columns and
  // twice 8 ranks; and B, whose rows are columns of dy.
  float db[4][2][4];
  uint32_t b[4][2][2];

  __device__ int Column() const { return threadIdx.x / 32 / kGroups * kWarpColumns; }
  __device__ int Rank() const { return threadIdx.x / 32 % kGroups * 16; }

  __device__ void AimAt(int strip) {
    const int p = PartOf(x, strip), thread = threadIdx.x;
    const Part& part = x.part[p];
    const int column = (strip - part.first_strip) * S::kColumns;
    row_bytes = 2 * min(part.columns - column, S::kColumns);
    dy_from = x.dy + thread % 32 * x.dy_stride + part.column_begin + column;
    s_from = x.s + thread / kRankCopies * x.s_stride + p * x.r + thread % kRankCopies * 8;
  }

  __device__ void LoadTile(int tile, int stage) const {
    const int row_begin = tile * kRows, thread = threadIdx.x;
    if (thread / 32 == kWarps - 1) {
      const int lane = thread % 32, rows = min(kRows, x.rows - row_begin);
      if (lane == 0) ExpectBytes(barriers + stage, rows * row_bytes);
      __syncwarp();
      if (lane < rows) {
        BulkCopy(tiles + stage * S::kTileElements + lane * S::kPitch,
                 dy_from + row_begin * x.dy_stride, row_bytes, barriers + stage);
      }
    }
    if (thread >= kRows * kRankCopies) return;
    const int row = thread / kRankCopies, c = thread % kRankCopies * 8;
    const bool any = row_begin + row < x.rows && c < x.r;
    CopyAsync(s_tiles + stage * S::kSElements + row * S::kRankPitch + c,
              any ? s_from + row_begin * x.s_stride : x.s, any ? 16 : 0);
  }

  // What no copy writes must be a number: it is multiplied with zeros.
  __device__ void Prepare() const {
    if (threadIdx.x < S::kStages) InitBarrier(barriers + threadIdx.x);
    if (x.ragged) {
      for (int i = threadIdx.x * 8; i < S::kStages * S::kTileElements; i += kThreads * 8) {
        *reinterpret_cast<uint4*>(tiles + i) = make_uint4(0, 0, 0, 0);
      }
    }
    FenceBulkCopies();
    __syncthreads();
  }

  __device__ void BeginStrip(int strip) {
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

  __device__ void EndStrip(int strip) const {
    const int lane = threadIdx.x % 32;
    float* to = x.db_sums + static_cast<int64_t>(blockIdx.x + strip) * kStripSums;
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

  __device__ void Multiply(int stage, int buffer) {
    const int lane = threadIdx.x % 32;
    const Bf16* tile = tiles + stage * S::kTileElements + Column();
    // Rows 0-7, 8-15, 0-7, 8-15 of columns 0-7, 0-7, 8-15, 8-15; and across.
    const int down = lane % 16, right = lane / 16 * 8;
    const int across_down = lane / 16 * 8 + lane % 8, across_right = lane / 8 % 2 * 8;
    uint32_t s[4];
    LoadTransposed(s, s_tiles + stage * S::kSElements + down * S::kRankPitch + Rank() + right);
    float ds[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t rows[4], columns[4];
      LoadMatrices(rows, tile + down * S::kPitch + k * 16 + right);
      LoadTransposed(columns, tile + across_down * S::kPitch + k * 16 + across_right);
      MultiplyAdd(ds[0], rows, b[k][0][0], b[k][0][1]);
      MultiplyAdd(ds[1], rows, b[k][1][0], b[k][1][1]);
      MultiplyAdd(db[k][0], columns, s[0], s[1]);
      MultiplyAdd(db[k][1], columns, s[2], s[3]);
    }
    float* to = sums + buffer * S::kSumElements;
    to += (Column() / kWarpColumns * kRows + lane / 4) * S::kRankPitch + Rank() + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* pair = to + half * 8;
      *reinterpret_cast<float2*>(pair) = make_float2(ds[half][0], ds[half][1]);
      *reinterpret_cast<float2*>(pair + 8 * S::kRankPitch) = make_float2(ds[half][2], ds[half][3]);
    }
  }

  // The sums over the columns of the strip.
  __device__ void StoreDs(const Unit& unit, int buffer) const {
    const int row_begin = unit.tile * kRows;
    for (int at = threadIdx.x; at < kRows * S::kRank; at += kThreads) {
      const int row = at / S::kRank, c = at % S::kRank;
      const float* from = sums + buffer * S::kSumElements + row * S::kRankPitch + c;
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < S::kColumnGroups; ++g) sum += from[g * kRows * S::kRankPitch];
      if (row_begin + row >= x.rows) continue;
      x.ds_sums[(static_cast<int64_t>(unit.strip) * x.rows + row_begin + row) * S::kRank + c] = sum;
    }
  }

  __device__ void Run() {
    const int begin = FirstUnit(x, blockIdx.x), count = FirstUnit(x, blockIdx.x + 1) - begin;
    Unit unit{begin / x.tiles, begin % x.tiles}, ahead = unit, done = unit;
    int loaded = 0, stage = 0, turn = 0;  // of `unit`; the turn's parity
    Prepare();
    const auto load = [&](int to) {
      if (loaded < count) {
        if (loaded == 0 || ahead.tile == 0) AimAt(ahead.strip);
        LoadTile(ahead.tile, to);
        ahead.Next(x.tiles);
        ++loaded;
      }
      CommitCopies();
    };
    for (int i = 0; i < S::kStages - 1; ++i) load(i);
    BeginStrip(unit.strip);
    for (int i = 0; i < count; ++i) {
      // Even and odd units have sums of their own, so one barrier per unit is enough.
      WaitForCopies<S::kStages - 2>();
      WaitFor(barriers + stage, turn);
      __syncthreads();
      load(stage == 0 ? S::kStages - 1 : stage - 1);
      if (i > 0) {
        StoreDs(done, (i - 1) & 1);
        if (unit.strip != done.strip) {
          EndStrip(done.strip);
          BeginStrip(unit.strip);
        }
      }
      Multiply(stage, i & 1);
      done = unit;
      unit.Next(x.tiles);
      if (++stage == S::kStages) stage = 0, turn ^= 1;
    }
    __syncthreads();
    StoreDs(done, (count - 1) & 1);
    EndStrip(done.strip);
  }
};

template <int kGroups>
__global__ __launch_bounds__(kThreads, 1) void PassKernel(const __grid_constant__ Params x) {
  using S = Shape<kGroups>;
  cudaTriggerProgrammaticLaunchCompletion();  // AddUpKernel is brought up meanwhile
  extern __shared__ __align__(128) unsigned char memory[];
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory);
  Bf16* tiles = reinterpret_cast<Bf16*>(memory + S::kBarrierBytes);
  Bf16* s_tiles = tiles + S::kStages * S::kTileElements;
  float* sums = reinterpret_cast<float*>(s_tiles + S::kStages * S::kSElements);
  Block<kGroups>{x, barriers, tiles, s_tiles, sums, nullptr, 0, nullptr, {}, {}}.Run();
}

// Adds up `count` times four sums, `stride` apart.
__device__ Pack<float, 4> SumOf(const float* from, int64_t stride, int count) {
  using P = Pack<float, 4>;
  P sum = P::Load(from);
#pragma unroll 8
  for (int i = 1; i < count; ++i) {
    const P next = P::Load(from + i * stride);
    for (int k = 0; k < 4; ++k) sum.v[k] += next.v[k];
  }
  return sum;
}

// A thread per four elements of ds, then one per column of a strip and four ranks.
template <int kGroups>
__global__ __launch_bounds__(256) void AddUpKernel(const __grid_constant__ Params x) {
  using S = Shape<kGroups>;
  cudaGridDependencySynchronize();  // the sums are there
  int at = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  const int ds_packs = x.ds_columns / 4, rank_packs = x.r / 4;
  if (at < x.rows * ds_packs) {
    const int row = at / ds_packs, column = (at - row * ds_packs) * 4, p = column / x.r;
    Pack<Bf16, 4> ds;
    for (int k = 0; k < 4; ++k) ds.Set(k, 0.0f);
    if (p < x.parts) {
      const int begin = x.part[p].first_strip;
      const int end = p + 1 < x.parts ? x.part[p + 1].first_strip : x.strips;
      const int64_t stride = static_cast<int64_t>(x.rows) * S::kRank;
      const float* from = x.ds_sums + begin * stride + row * S::kRank + column - p * x.r;
      const Pack<float, 4> sum = SumOf(from, stride, end - begin);
      for (int k = 0; k < 4; ++k) ds.Set(k, x.scale * sum.v[k]);
    }
    ds.Store(x.ds + row * x.ds_stride + column);
    return;
  }
  at -= x.rows * ds_packs;
  const int line = at / rank_packs, c = (at - line * rank_packs) * 4;
  const int strip = line / S::kColumns, column = line % S::kColumns;
  if (strip >= x.strips) return;
  const Part& part = x.part[PartOf(x, strip)];
  const int n = (strip - part.first_strip) * S::kColumns + column;
  if (n >= part.columns) return;
  const int first = BlockOf(x, strip * x.tiles), last = BlockOf(x, (strip + 1) * x.tiles - 1);
  const float* from = x.db_sums + static_cast<int64_t>(first + strip) * kStripSums;
  const Pack<float, 4> sum = SumOf(from + column * S::kRank + c, kStripSums, last - first + 1);
  float* to = part.db + n * part.db_stride + c;
  Pack<float, 4> db = Pack<float, 4>::Load(to);
  for (int k = 0; k < 4; ++k) db.v[k] += x.db_scale * sum.v[k];
  db.Store(to);
}

int Divide(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// Strips of all parts.
template <int kGroups>
int StripsOf(const LoraBackwardArgs& a) {
  int strips = 0;
  for (const LoraBackwardPart& part : a.parts) {
    strips += Divide(part.b.dim(0), Shape<kGroups>::kColumns);
  }
  return strips;
}

// How many rows' partial sums fit into the workspace; in whole tiles, and in equal shares of T.
template <int kGroups>
int64_t RowsAtOnce(const LoraBackwardArgs& a) {
  const int64_t strips = StripsOf<kGroups>(a), T = a.dy.dim(0);
  const int64_t left = a.workspace.bytes() - (kBlocks + strips - 1) * kStripSums * 4;
  const int64_t most = left / (strips * Shape<kGroups>::kRank * 4) / kRows * kRows;
  if (most <= 0) return 0;
  return Divide(Divide(T, Divide(T, most)), kRows) * kRows;
}

template <int kGroups>
Params ParamsOf(const LoraBackwardArgs& a) {
  Params x{};
  x.parts = static_cast<int>(a.parts.size());
  x.r = static_cast<int>(a.parts[0].b.dim(1));
  for (int p = 0; p < x.parts; ++p) {
    const LoraBackwardPart& part = a.parts[p];
    x.part[p] = {Data<const Bf16>(part.b),
                 Data<float>(part.db),
                 part.b.stride(0),
                 part.db.stride(0),
                 static_cast<int>(part.column_begin),
                 static_cast<int>(part.b.dim(0)),
                 x.strips};
    x.strips += Divide(part.b.dim(0), Shape<kGroups>::kColumns);
    x.ragged = x.ragged || part.b.dim(0) % Shape<kGroups>::kColumns != 0;
  }
  x.ragged = x.ragged || a.dy.dim(0) % kRows != 0;
  x.dy_stride = a.dy.stride(0);
  x.s_stride = a.s.stride(0);
  x.ds_stride = a.ds.stride(0);
  x.ds_columns = static_cast<int>(a.ds.dim(1));
  x.db_sums = Data<float>(a.workspace);
  x.ds_sums = x.db_sums + static_cast<int64_t>(kBlocks + x.strips - 1) * kStripSums;
  x.scale = static_cast<float>(a.scale);
  x.db_scale = static_cast<float>(a.db_scale);
  return x;
}

// Its blocks may start while the last of the pass run; they wait for its end.
template <int kGroups>
void RunAddUp(const Exec& exec, const Params& x) {
  const int64_t packs = static_cast<int64_t>(x.rows) * (x.ds_columns / 4) +
                        static_cast<int64_t>(x.strips) * Shape<kGroups>::kColumns * (x.r / 4);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(Divide(packs, 256)));
  config.blockDim = dim3(256);
  config.stream = StreamOf(exec.stream);
  config.attrs = &early;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, AddUpKernel<kGroups>, x));
}

template <int kGroups>
bool Run(const Exec& exec, const LoraBackwardArgs& a) {
  using S = Shape<kGroups>;
  const int64_t T = a.dy.dim(0), step = RowsAtOnce<kGroups>(a);
  if (step == 0) return false;
  const OpTraceScope trace(exec, "LoraBackward");
  CUDA_CHECK(cudaFuncSetAttribute(PassKernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  S::kBytes));
  Params x = ParamsOf<kGroups>(a);
  for (int64_t begin = 0; begin < T; begin += step) {
    x.rows = static_cast<int>(std::min(step, T - begin));
    x.tiles = Divide(x.rows, kRows);
    x.blocks = std::min(kBlocks, x.strips * x.tiles);
    x.dy = Data<const Bf16>(a.dy) + begin * x.dy_stride;
    x.s = Data<const Bf16>(a.s) + begin * x.s_stride;
    x.ds = Data<Bf16>(a.ds) + begin * x.ds_stride;
    PassKernel<kGroups><<<x.blocks, kThreads, S::kBytes, StreamOf(exec.stream)>>>(x);
    CUDA_CHECK(cudaGetLastError());
    RunAddUp<kGroups>(exec, x);
  }
  return true;
}

}  // namespace

bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a) {
  const int64_t r = a.parts[0].b.dim(1);
  if (a.dy.dtype != DType::kBF16 || r == 0 || r % 8 != 0 || r > 16 * kMaxGroups) return false;
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
