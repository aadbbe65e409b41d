// GatedLoraBackward in one pass, by products of warpgroups.
//
// A strip is kColumns columns of gate and as many of up and dh, a tile 64 rows of it (PassGrid).
// The block's two warpgroups have every other panel of 64 columns each. Of a panel and tile, gate,
// up and dh come to shared memory, dgate, dup and h take their places there, and out of those, as
// they lie, come the products
//   ds (64 rows x ranks)                  += panel B, of which B is turned once in a strip
//   B's, A_down's gradients (64 columns x ranks)  += panel^T s, of which s is turned once in a tile
// while the next panel is worked on; dgate and dup go back to memory from the same place. The
// gradients of a warpgroup's panels stay in its registers to the end of the strip, ds to the end of
// the tile, where the two add up theirs through shared memory. The sums of a strip and tile (ds)
// and of a block (the others) go to the workspace; a second, small kernel adds them up in the order
// of strips and blocks.
//
// Why two warpgroups: they share all registers, so gradients of wide strips fit, and the wider a
// strip, the fewer sums of ds leave the block (16 ranks: a twentieth of all traffic). Why they copy
// by themselves: a warpgroup's barrier of a panel says that the products of the panel before are
// through and that this one is written, so the thread behind it can fill the place of the one and
// give back the other: nobody waits for a place, and the two warpgroups meet only where a tile
// begins.
#include "kernels/core/tensor_map.cuh"
#include "kernels/core/warpgroup.cuh"
#include "kernels/fp8/fp8.cuh"
#include "kernels/gated_activation/activate.cuh"
#include "kernels/lora/gated_lora_backward.h"
#include "kernels/lora/lora_pass.cuh"

namespace attune {

bool GatedLoraBackwardCuda(const Exec& exec, const GatedLoraBackwardArgs& a);

namespace {

enum { kGate, kUp, kDown };  // s and gradients of parameters; panels: gate, up, and dh or h

template <int kGroups>
struct Shape : GatedPassShape<kGroups> {
  using Pass = GatedPassShape<kGroups>;
  static constexpr int kThreads = Pass::kWarpgroups * kWarpgroup;
  static constexpr int kStages = 3;
  static_assert(Pass::kPanels >= kStages - 1);  // those that are copied first are of one tile
  static_assert(Pass::kPanelWidth == kBoxColumns && kBoxColumns == kPanelColumns);

  // Shared memory, in bytes.
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kPanelBytes = Pass::kTileRows * kPanelRowBytes;
  static constexpr int kStageBytes = Pass::kMatrices * kPanelBytes;
  static constexpr int kTurnedBytes = Pass::kRank * kPanelRowBytes;  // 64 columns or tokens
  static constexpr int kMailBytes = 4 * Pass::kTileRows * Pass::kRank;
  static constexpr int kStagesAt = kBarrierBytes;
  static constexpr int kBAt = kStagesAt + Pass::kWarpgroups * kStages * kStageBytes;
  static constexpr int kSAt = kBAt + 2 * Pass::kWarpgroups * Pass::kPanels * kTurnedBytes;
  static constexpr int kMailAt = kSAt + Pass::kMatrices * kTurnedBytes;
  static constexpr int kBytes = kMailAt + Pass::kWarpgroups * kMailBytes;
  static_assert(8 * Pass::kWarpgroups * kStages <= kBarrierBytes && kTurnedBytes % 1024 == 0);
  static_assert(kBytes <= 227 << 10);
};

struct Params {
  int r, rows, columns;  // F columns
  PassGrid grid;
  CUtensorMap boxes[3];  // gate, up, dh
  const Bf16* s;
  const Bf16* down_ds;
  int64_t s_stride, down_ds_stride;
  const Bf16* b[2];
  float* db[2];
  float* down_da;
  int64_t b_stride[2], db_stride[2], down_da_stride;
  Bf16* ds;
  int64_t ds_stride;
  int ds_columns;
  float* ds_sums;      // (strips, rows, 2 kRank)
  float* matrix_sums;  // (slots, kMatrices, kColumns, kRank)
  float scale, db_scale, down_da_scale;
};

// In place, of eight elements at once.
template <Activation kActivation>
__device__ void ActivatePack(uint4* gate_pack, uint4* up_pack, uint4* dh_pack) {
  uint32_t gate[4] = {gate_pack->x, gate_pack->y, gate_pack->z, gate_pack->w};
  uint32_t up[4] = {up_pack->x, up_pack->y, up_pack->z, up_pack->w};
  uint32_t dh[4] = {dh_pack->x, dh_pack->y, dh_pack->z, dh_pack->w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 g = PairAsFloats(gate[i]), u = PairAsFloats(up[i]), d = PairAsFloats(dh[i]);
    float2 slope;
    const float2 act = {Activate<kActivation>(g.x, &slope.x), Activate<kActivation>(g.y, &slope.y)};
    gate[i] = RoundedPair({d.x * u.x * slope.x, d.y * u.y * slope.y});
    up[i] = RoundedPair({d.x * act.x, d.y * act.y});
    dh[i] = RoundedPair({act.x * u.x, act.y * u.y});
  }
  *gate_pack = make_uint4(gate[0], gate[1], gate[2], gate[3]);
  *up_pack = make_uint4(up[0], up[1], up[2], up[3]);
  *dh_pack = make_uint4(dh[0], dh[1], dh[2], dh[3]);
}

// A thread's view of the block's work.
template <int kGroups, Activation kActivation>
struct Block {
  using S = Shape<kGroups>;
  static constexpr int kSums = S::kRank / 2;  // of a product of 64 x kRank, in a thread
  // Of s a thread reads some times two ranks of four tokens, which become 8 bytes of two rows.
  static constexpr int kRankPairs = S::kMatrices * S::kRank / 2;
  static constexpr int kSPieces = kRankPairs * (S::kTileRows / 4);
  static constexpr int kSTurns = (kSPieces + S::kThreads - 1) / S::kThreads;
  // Packs of eight that a thread works on side by side; two where registers are left for it.
  static constexpr int kPacksAtOnce = kGroups == 1 || kActivation != Activation::kGeluErf ? 2 : 1;

  const Params& x;
  unsigned char* memory;
  int warpgroup, thread;    // of the warpgroup
  int stage = 0, turn = 0;  // of the panel that is worked on; the turn's parity
  // The tile whose panels are copied next, and how many are left with it.
  int next_row, next_column, next_tiles;
  float gradient[S::kPanels][S::kMatrices][kSums];
  float ds[2][kSums] = {};

  __device__ Block(const Params& params, unsigned char* shared)
      : x(params),
        memory(shared),
        // The same in all lanes, as the compiler is to know.
        warpgroup(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0)),
        thread(static_cast<int>(threadIdx.x) % kWarpgroup) {}

  __device__ uint64_t* Full(int at) const {
    return reinterpret_cast<uint64_t*>(memory) + warpgroup * S::kStages + at;
  }
  __device__ unsigned char* Panel(int at, int which) const {
    return memory + S::kStagesAt + (warpgroup * S::kStages + at) * S::kStageBytes +
           which * S::kPanelBytes;
  }
  // B_gate or B_up, of 64 columns of the strip: kRank rows of them.
  __device__ unsigned char* TurnedB(int which, int panel) const {
    return memory + S::kBAt + (which * S::kWarpgroups * S::kPanels + panel) * S::kTurnedBytes;
  }
  // kRank rows of the tile's 64 tokens.
  __device__ unsigned char* TurnedS(int which) const {
    return memory + S::kSAt + which * S::kTurnedBytes;
  }
  // What this warpgroup leaves for the other, or the other way round.
  __device__ float2* Mail(int from) const {
    return reinterpret_cast<float2*>(memory + S::kMailAt + from * S::kMailBytes) + thread;
  }
  // In the strip; neighbours are copied at about the same time.
  __device__ int PanelOf(int k) const { return k * S::kWarpgroups + warpgroup; }

  // threadIdx.x, read anew: what is computed from it once in a tile is not kept in registers
  // through all of a strip.
  __device__ static int FreshThread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  }
  __device__ void SyncWarpgroup() const {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  }

  // ---- Copies, by the warpgroup's first thread ----

  // The warpgroup's panel k of the next tile. What is outside of the matrix comes as zeros.
  __device__ void Load(int k, int at) const {
    if (next_tiles == 0) return;
    ExpectBytes(Full(at), S::kStageBytes);
#pragma unroll
    for (int which = 0; which < S::kMatrices; ++which) {
      LoadBox(reinterpret_cast<Bf16*>(Panel(at, which)), x.boxes[which], next_row,
              next_column + PanelOf(k) * kBoxColumns, Full(at));
    }
  }
  __device__ void Store(int k, int row, int column) const {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      StoreBox(x.boxes[which], row, column + PanelOf(k) * kBoxColumns,
               reinterpret_cast<const Bf16*>(Panel(stage, which)));
    }
    CommitBulkStores();
  }
  // Behind a barrier behind the products of the panel before and FenceBulkCopies by those who wrote
  // this one, k: it goes back, and the place of the one before is filled.
  __device__ void Copy(int k, int row, int column) {
    constexpr int kAhead = S::kStages - 1;
    if (k + kAhead == S::kPanels) AdvanceNext();
    if (thread == 0) {
      WaitForBulkReads();  // of the panel before
      Load((k + kAhead) % S::kPanels, stage == 0 ? S::kStages - 1 : stage - 1);
      Store(k, row, column);
    }
    __syncwarp();
  }
  __device__ void AdvanceNext() {
    --next_tiles;
    next_row += S::kTileRows;
    if (next_row < x.grid.tiles * S::kTileRows) return;
    next_row = 0;
    next_column += S::kColumns;
  }

  // ---- What is turned ----

  // Of a strip's columns, from `column` on; behind the last column and rank there are zeros.
  __device__ void TurnB(int column) const {
    constexpr int kPacks = 2 * S::kColumns / 8 * S::kRank;  // eight columns of a rank
    static_assert(kPacks % S::kThreads == 0);
#pragma unroll 4
    for (int i = 0; i < kPacks / S::kThreads; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * S::kThreads;
      const int c = at % S::kRank, pack = at / S::kRank % (S::kColumns / 8);
      const int p = at / (S::kRank * (S::kColumns / 8)), n = column + pack * 8;
      const bool real = n < x.columns && c < x.r;
      const Bf16* from = real ? x.b[p] + n * x.b_stride[p] + c : nullptr;
      Bf16 v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = real ? from[j * x.b_stride[p]] : FromFloat<Bf16>(0.0f);
      *reinterpret_cast<uint4*>(TurnedB(p, pack / 8) + c * kPanelRowBytes +
                                ((pack % 8) ^ (c % 8)) * 16) =
          make_uint4(PairOf(v[0], v[1]), PairOf(v[2], v[3]), PairOf(v[4], v[5]),
                     PairOf(v[6], v[7]));
    }
  }
  // Both of a tile: read long before they are turned. Behind the last row and rank there are zeros.
  __device__ void ReadS(int row_begin, uint32_t (&s)[kSTurns][4]) const {
    const int first = FreshThread();
#pragma unroll
    for (int i = 0; i < kSTurns; ++i) {
      const int at = first + i * S::kThreads;
      const int matrix = at % kRankPairs / (S::kRank / 2), rank = at % (S::kRank / 2) * 2;
      const int row = row_begin + at / kRankPairs * 4;
      const int64_t stride = matrix == kDown ? x.down_ds_stride : x.s_stride;
      const Bf16* from = (matrix == kDown ? x.down_ds : x.s + matrix * x.r) + row * stride + rank;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool real = at < kSPieces && row + j < x.rows && rank < x.r;
        s[i][j] = real ? *reinterpret_cast<const uint32_t*>(from + j * stride) : 0;
      }
    }
  }
  __device__ void TurnS(const uint32_t (&s)[kSTurns][4]) const {
    const int first = FreshThread();
#pragma unroll
    for (int i = 0; i < kSTurns; ++i) {
      const int at = first + i * S::kThreads;
      const int matrix = at % kRankPairs / (S::kRank / 2), rank = at % (S::kRank / 2) * 2;
      const int quad = at / kRankPairs;
      if (at >= kSPieces) continue;
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int c = rank + high, halves = high ? 0x7632 : 0x5410;
        *reinterpret_cast<uint2*>(TurnedS(matrix) + c * kPanelRowBytes +
                                  ((quad / 2) ^ (c % 8)) * 16 + quad % 2 * 8) =
            make_uint2(__byte_perm(s[i][0], s[i][1], halves),
                       __byte_perm(s[i][2], s[i][3], halves));
      }
    }
  }

  // ---- Products ----

  // Of the warpgroup's panel k, in `stage`. The sums of ds begin with the tile's first panel.
  __device__ void Multiply(int k) {
    // Descriptors are one but for their lower halves, which count in 16 bytes. Through a shuffle,
    // which nothing is left of, they are not computed before the loop, to wait in registers.
    constexpr uint64_t kUpper = uint64_t{0xffffffff} << 32;
    const uint32_t base = static_cast<uint32_t>(DescriptorOf(0)) +
                          __shfl_sync(0xffffffffu, SharedAddress(memory) / 16, 0);
    const uint32_t panel =
        base + S::kStagesAt / 16 + (warpgroup * S::kStages + stage) * (S::kStageBytes / 16);
    const uint32_t b = base + S::kBAt / 16 + PanelOf(k) * (S::kTurnedBytes / 16);
    const uint32_t s = base + S::kSAt / 16;
    const auto behind = [&](uint32_t at, int bytes) {
      return (DescriptorOf(0) & kUpper) | (at + bytes / 16);
    };
    constexpr int kBothB = S::kWarpgroups * S::kPanels * S::kTurnedBytes;  // from B_gate to B_up
    FenceProducts();
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 16 columns of B, 16 tokens of s
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        MultiplyNarrow<S::kRank, false>(ds[p], behind(panel, p * S::kPanelBytes + step * 32),
                                        behind(b, p * kBothB + step * 32), k > 0 || step > 0);
      }
#pragma unroll
      for (int m = 0; m < S::kMatrices; ++m) {
        MultiplyNarrow<S::kRank, true>(
            gradient[k][m], behind(panel, m * S::kPanelBytes + step * 16 * kPanelRowBytes),
            behind(s, m * S::kTurnedBytes + step * 32), true);
      }
    }
    CommitProducts();
  }
  __device__ void AwaitProducts(int k) {
    WaitForProducts<0>();
    Pin(gradient[k]);
    Pin(ds);
  }

  // ---- Sums ----

  // The first warpgroup stores gate's ds, the second one up's: each has a share of the other's.
  __device__ void SendSums() const {
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      Mail(warpgroup)[i * kWarpgroup] = warpgroup == 0
                                            ? make_float2(ds[1][2 * i], ds[1][2 * i + 1])
                                            : make_float2(ds[0][2 * i], ds[0][2 * i + 1]);
    }
  }
  __device__ void StoreSums(int strip, int row_begin) const {
    const int at = FreshThread() % kWarpgroup, lane = at % 32;
    const int row = row_begin + at / 32 * 16 + lane / 4;
    float* to = x.ds_sums + (static_cast<int64_t>(strip) * x.rows + row) * 2 * S::kRank +
                warpgroup * S::kRank + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const float2 other = Mail(1 - warpgroup)[i * kWarpgroup];
      const float2 own = warpgroup == 0 ? make_float2(ds[0][2 * i], ds[0][2 * i + 1])
                                        : make_float2(ds[1][2 * i], ds[1][2 * i + 1]);
      if (row + i % 2 * 8 >= x.rows) continue;
      *reinterpret_cast<float2*>(to + i % 2 * 8 * 2 * S::kRank + i / 2 * 8) =
          make_float2(own.x + other.x, own.y + other.y);
    }
  }
  __device__ void StoreGradients(int slot) const {
    const int at = FreshThread() % kWarpgroup, lane = at % 32;
    float* to = x.matrix_sums + int64_t{slot} * S::kMatrices * S::kColumns * S::kRank;
    to += (at / 32 * 16 + lane / 4) * S::kRank + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < S::kPanels; ++k) {
#pragma unroll
      for (int m = 0; m < S::kMatrices; ++m) {
        float* of_panel = to + (m * S::kColumns + PanelOf(k) * kPanelColumns) * S::kRank;
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
          *reinterpret_cast<float2*>(of_panel + i % 2 * 8 * S::kRank + i / 2 * 8) =
              make_float2(gradient[k][m][2 * i], gradient[k][m][2 * i + 1]);
        }
      }
    }
  }

  // ---- All of it ----

  __device__ void Tile(int strip, int tile, bool is_first) {
    const int row = tile * S::kTileRows, column = strip * S::kColumns;
#pragma unroll
    for (int k = 0; k < S::kPanels; ++k) {
      uint32_t s[kSTurns][4];
      if (k == 0) ReadS(row, s);
      WaitFor(Full(stage), turn);
      uint4* packs = reinterpret_cast<uint4*>(Panel(stage, 0)) + thread;
      constexpr int kPacks = S::kPanelBytes / 16;
#pragma unroll kPacksAtOnce
      for (int i = 0; i < kPacks; i += kWarpgroup) {
        ActivatePack<kActivation>(packs + i, packs + kPacks + i, packs + 2 * kPacks + i);
      }
      FenceBulkCopies();
      AwaitProducts(k == 0 ? S::kPanels - 1 : k - 1);
      if (k > 0) {
        SyncWarpgroup();
        Copy(k, row, column);
      } else {
        // Behind the first barrier nobody reads the turned s of the tile before any more, and its
        // sums are there; behind the second one they have been read, and this tile's s is there.
        if (!is_first) SendSums();
        __syncthreads();
        Copy(k, row, column);
        TurnS(s);
        FenceBulkCopies();
        if (!is_first) StoreSums(strip, row - S::kTileRows);
        __syncthreads();
      }
      Multiply(k);
      stage = stage == S::kStages - 1 ? 0 : stage + 1;
      turn ^= stage == 0;
    }
  }

  __device__ void Run() {
    if (threadIdx.x < S::kWarpgroups * S::kStages) {
      InitBarrier(reinterpret_cast<uint64_t*>(memory) + threadIdx.x, 1);
    }
    FenceBarriers();
    __syncthreads();
    AwaitEarlier();
    const int block = static_cast<int>(blockIdx.x), begin = FirstTile(x.grid, block);
    next_row = begin % x.grid.tiles * S::kTileRows;
    next_column = begin / x.grid.tiles * S::kColumns;
    next_tiles = FirstTile(x.grid, block + 1) - begin;
    if (thread == 0) {
      for (int k = 0; k < S::kStages - 1; ++k) Load(k, k);
    }
    __syncwarp();
    ForEachRun(x.grid, [&](int strip, int first, int behind, int slot) {
      TurnB(strip * S::kColumns);
      FenceBulkCopies();  // the first tile's barriers come before its products
#pragma unroll
      for (int k = 0; k < S::kPanels; ++k) {
#pragma unroll
        for (int m = 0; m < S::kMatrices; ++m) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) gradient[k][m][i] = 0.0f;
        }
        Pin(gradient[k]);
      }
      for (int tile = first; tile < behind; ++tile) Tile(strip, tile, tile == first);
      AwaitProducts(S::kPanels - 1);
      SendSums();
      __syncthreads();  // and nobody reads the strip's turned B any more
      StoreSums(strip, (behind - 1) * S::kTileRows);
      StoreGradients(slot);
    });
    if (thread == 0) WaitForBulkStores();
  }
};

template <int kGroups, Activation kActivation>
__global__ __launch_bounds__(Shape<kGroups>::kThreads,
                             1) void PassKernel(const __grid_constant__ Params x) {
  if constexpr (kWarpgroupProducts) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Block<kGroups, kActivation>(x, memory).Run();
  } else {
    __trap();
  }
}

// A thread per four elements of ds, then kSlotLanes per matrix, column and four ranks.
template <int kGroups>
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
    if (p < 2) {
      const int64_t stride = static_cast<int64_t>(x.rows) * 2 * S::kRank;
      const float* from = x.ds_sums + row * 2 * S::kRank + p * S::kRank + column - p * x.r;
      const Pack<float, 4> sum = SumOf(from, stride, x.grid.strips);
      for (int k = 0; k < 4; ++k) ds.Set(k, x.scale * sum.v[k]);
    }
    ds.Store(x.ds + row * x.ds_stride + column);
    return;
  }
  at = (at - ds_threads) / kSlotLanes;
  // Neighbours have neighbouring columns: the rows of A_down's gradient are those of ranks.
  const int n = at % x.columns, rest = at / x.columns, c = rest % rank_packs * 4;
  const int matrix = rest / rank_packs;
  const bool real = matrix < S::kMatrices;
  const int strip = real ? n / S::kColumns : -1;
  const float* from = x.matrix_sums + (matrix * S::kColumns + n % S::kColumns) * S::kRank + c;
  const Pack<float, 4> sum =
      SumOfStrip<kSlotLanes>(strip, from, S::kMatrices * S::kColumns * S::kRank, [&] {
        const int tiles = x.grid.tiles;
        return Blocks{BlockOf(x.grid, strip * tiles), BlockOf(x.grid, (strip + 1) * tiles - 1)};
      });
  if (!real || threadIdx.x % kSlotLanes != 0) return;
  if (matrix == kDown) {
    float* to = x.down_da + c * x.down_da_stride + n;
    for (int k = 0; k < 4; ++k) to[k * x.down_da_stride] += x.down_da_scale * sum.v[k];
    return;
  }
  float* to = x.db[matrix] + n * x.db_stride[matrix] + c;
  for (int k = 0; k < 4; ++k) to[k] += x.db_scale * sum.v[k];
}

template <int kGroups>
Params ParamsOf(const GatedLoraBackwardArgs& a) {
  using S = Shape<kGroups>;
  Params x{};
  x.r = static_cast<int>(a.down_da.dim(0));
  x.rows = static_cast<int>(a.dh.dim(0));
  x.columns = static_cast<int>(a.dh.dim(1));
  x.grid = S::GridOf(x.rows, x.columns);
  const Bf16* gate = Data<const Bf16>(a.lora.dy);
  const auto boxes = [&](const Bf16* data, int64_t stride) {
    return BoxesOf(data, x.rows, x.columns, stride, S::kTileRows);
  };
  x.boxes[kGate] = boxes(gate, a.lora.dy.stride(0));
  x.boxes[kUp] = boxes(gate + x.columns, a.lora.dy.stride(0));
  x.boxes[kDown] = boxes(Data<const Bf16>(a.dh), a.dh.stride(0));
  x.s = Data<const Bf16>(a.lora.s);
  x.down_ds = Data<const Bf16>(a.down_ds);
  x.s_stride = a.lora.s.stride(0);
  x.down_ds_stride = a.down_ds.stride(0);
  for (int p = 0; p < 2; ++p) {
    const LoraBackwardPart& part = a.lora.parts[p];
    x.b[p] = Data<const Bf16>(part.b);
    x.db[p] = Data<float>(part.db);
    x.b_stride[p] = part.b.stride(0);
    x.db_stride[p] = part.db.stride(0);
  }
  x.down_da = Data<float>(a.down_da);
  x.down_da_stride = a.down_da.stride(0);
  x.ds = Data<Bf16>(a.lora.ds);
  x.ds_stride = a.lora.ds.stride(0);
  x.ds_columns = static_cast<int>(a.lora.ds.dim(1));
  x.matrix_sums = Data<float>(a.workspace);
  x.ds_sums = x.matrix_sums + S::MatrixSums(x.grid);
  x.scale = static_cast<float>(a.lora.scale);
  x.db_scale = static_cast<float>(a.lora.db_scale);
  x.down_da_scale = static_cast<float>(a.down_da_scale);
  return x;
}

template <int kGroups, Activation kActivation>
void Run(const Exec& exec, const GatedLoraBackwardArgs& a) {
  const auto pass = PassKernel<kGroups, kActivation>;
  const Params x = ParamsOf<kGroups>(a);
  constexpr int kBytes = Shape<kGroups>::kBytes, kThreads = Shape<kGroups>::kThreads;
  CUDA_CHECK(cudaFuncSetAttribute(pass, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  LaunchEarly(exec.stream, {dim3(x.grid.blocks), dim3(kThreads), kBytes}, pass, x);
  LaunchBehind(exec, AddUpKernel<kGroups>, x, int64_t{x.rows} * (x.ds_columns / 4),
               int64_t{Shape<kGroups>::kMatrices} * x.columns * (x.r / 4));
}

}  // namespace

bool GatedLoraBackwardCuda(const Exec& exec, const GatedLoraBackwardArgs& a) {
  if (!HasWarpgroupProducts()) return false;
  const OpTraceScope trace(exec, "GatedLoraBackward");
  for (const TensorView* view : {&a.dh, &a.lora.dy, &a.lora.s, &a.down_ds}) {
    CHECK(reinterpret_cast<uintptr_t>(view->data) % 16 == 0);
  }
  CHECK(reinterpret_cast<uintptr_t>(a.lora.ds.data) % 8 == 0);
  DispatchActivation(a.activation, [&]<Activation kActivation>() {
    if (a.down_da.dim(0) <= 16) return Run<1, kActivation>(exec, a);
    Run<2, kActivation>(exec, a);
  });
  if (a.fp8.defined()) Fp8QuantizeCuda(exec, Fp8QuantizeOf(a.lora.dy, a.fp8));
  return true;
}

}  // namespace attune
