// LoraBackward in one pass over dy, on Hopper's tensor cores.
//
// dy_p is cut into strips of columns and those into tiles of 64 rows; chunks of a tile, four panels
// (64 columns each, as products read them) side by side, come one after the other through a ring in
// shared memory. One warpgroup copies them, and turns s so that its rows are along the sum; one
// adds up ds of a tile over the chunks of the strip; four have a panel of every chunk each and keep
// their db in registers from the first to the last of the block's rows of a strip. Nobody waits for
// anybody but for what is copied and for room. Sums of a strip and tile (ds) and of a block (db) go
// to the workspace; a second, small kernel adds them up in the order of strips and blocks. So the
// order of every sum hangs on T, N_p and r alone.
//
// Partial sums: of ds, 4 r bytes for each row and strip, of db, 4 r for each column of a block's
// strips.
#include "kernels/core/tensor_map.cuh"
#include "kernels/core/warpgroup.cuh"
#include "kernels/lora/lora_backward_grid.h"
#include "kernels/lora/lora_pass.cuh"

namespace attune {

bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a);

namespace {

using Grid = LoraBackwardGrid;
constexpr int kTileRows = Grid::kTileRows, kChunkColumns = Grid::kChunkColumns;
constexpr int kDbGroups = kChunkColumns / kPanelColumns;  // warpgroups
constexpr int kPanelBytes = kTileRows * kPanelRowBytes;
constexpr int kChunkBytes = kDbGroups * kPanelBytes;
enum { kCopying, kDs, kFirstDb, kWarpgroups = kFirstDb + kDbGroups };
constexpr int kThreads = kWarpgroups * kWarpgroup;
constexpr int kMultiplying = kThreads - kWarpgroup;
constexpr int kTurners = kWarpgroup - 32;  // threads of the copying warpgroup that turn s
// Chunks that are asked for before b has come: it would arrive behind all of them.
constexpr int kFirstChunks = 2;
// A block begins with 80 for each thread and can only share those out anew.
constexpr int kCopyingRegisters = 32, kDsRegisters = 64, kDbRegisters = 96;
static_assert(kCopyingRegisters + kDsRegisters + kDbGroups * kDbRegisters <= kWarpgroups * 80);

template <int kWidth>
struct Shape {
  static constexpr int kRank = kWidth;
  static constexpr int kStripChunks = Grid::kMostChunks;
  // Sums of ds of which each waits for its own products alone.
  static constexpr int kDsChains = 64 / kRank;
  // r rows of 64 columns or tokens.
  static constexpr int kTurnedBytes = kRank * kPanelRowBytes;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kTurned = kStripChunks * kDbGroups + 2;  // panels of b, and two of s
  static constexpr int kStages =
      ((227 << 10) - kBarrierBytes - kTurned * kTurnedBytes) / kChunkBytes;
  static constexpr int kBytes = kBarrierBytes + kTurned * kTurnedBytes + kStages * kChunkBytes;
  static_assert(8 * (2 * (kStages + 2) + 1) <= kBarrierBytes && kStages > kFirstChunks);
};

struct Part {
  CUtensorMap dy;
  const Bf16* b;
  float* db;
  int64_t b_stride, db_stride;
  int columns;
  int first_strip;
  int first_work;  // chunks of tiles before it
};
struct Params {
  Part part[kMaxLoraParts];
  int parts, r;
  int rows;  // of dy, s and ds
  Grid grid;
  const Bf16* s;
  Bf16* ds;
  int64_t s_stride, ds_stride;
  int ds_columns;
  float* ds_sums;  // (strips, rows, kRank)
  float* db_sums;  // (slots, columns of a strip, kRank)
  float scale, db_scale;
};

// ---- Shares ----

__device__ int PartOf(const Params& x, int strip) {
  int p = 0;
  while (p + 1 < x.parts && strip >= x.part[p + 1].first_strip) ++p;
  return p;
}
struct Strip {
  int part, column;  // of the part
  int chunks;
};
__device__ Strip StripOf(const Params& x, int strip) {
  const int p = PartOf(x, strip), width = x.grid.strip_chunks * kChunkColumns;
  const int column = (strip - x.part[p].first_strip) * width;
  return {p, column, (min(x.part[p].columns - column, width) + kChunkColumns - 1) / kChunkColumns};
}
// The first of a block's tiles: the first one that begins at its share of the work, or behind.
__device__ int FirstTile(const Params& x, int block) {
  const Grid& grid = x.grid;
  if (block == grid.blocks) return grid.strips * grid.tiles;
  const int at = block * grid.work / grid.blocks;
  int p = 0;
  while (p + 1 < x.parts && at >= x.part[p + 1].first_work) ++p;
  const int rest = at - x.part[p].first_work, strip_work = grid.strip_chunks * grid.tiles;
  const int strip = x.part[p].first_strip + rest / strip_work;
  const int chunks = StripOf(x, strip).chunks;
  return strip * grid.tiles + (rest % strip_work + chunks - 1) / chunks;
}
// The block that has tile `tile` of a strip.
__device__ int BlockOf(const Params& x, int strip, int tile) {
  const Strip of = StripOf(x, strip);
  const int at =
      x.part[of.part].first_work + of.column / kChunkColumns * x.grid.tiles + of.chunks * tile;
  return ((at + 1) * x.grid.blocks - 1) / x.grid.work;
}
// Calls f(strip, first tile, tile behind the last, slot) for each strip of which this block has
// tiles.
template <typename F>
__device__ void ForEachShare(const Params& x, F&& f) {
  const int block = static_cast<int>(blockIdx.x), end = FirstTile(x, block + 1);
  for (int at = FirstTile(x, block); at < end;) {
    const int strip = at / x.grid.tiles, first = at % x.grid.tiles;
    const int behind = min(x.grid.tiles, first + end - at);
    f(strip, first, behind, SlotOf(strip, block));
    at += behind - first;
  }
}

// ---- The pass ----

// A place in a ring, and the parity of the turn in which it is used.
template <int kCount>
struct RingPlace {
  int at = 0, turn = 0;

  __device__ void Advance() {
    at = at == kCount - 1 ? 0 : at + 1;
    turn ^= at == 0;
  }
};

// Eight neighbours of column j of a matrix, rank 8 `eight` and on, as rows of the turned one.
__device__ void PutTurned(Bf16* turned, int eight, int j, const Pack<Bf16, 8>& values) {
  Bf16* to = turned + eight * 8 * kPanelColumns + j % 8;
#pragma unroll
  for (int k = 0; k < 8; ++k) to[k * kPanelColumns + ((j / 8) ^ k) * 8] = values.v[k];
}

template <int kWidth>
struct Block {
  using S = Shape<kWidth>;
  static constexpr int kRank = S::kRank;
  static constexpr int kPacks = kRank / 8;

  const Params& x;
  unsigned char* memory;

  __device__ uint64_t* Full(int stage) const { return reinterpret_cast<uint64_t*>(memory) + stage; }
  __device__ uint64_t* Empty(int stage) const { return Full(S::kStages + stage); }
  __device__ uint64_t* SFull(int which) const { return Full(2 * S::kStages + which); }
  __device__ uint64_t* SEmpty(int which) const { return SFull(2 + which); }
  __device__ uint64_t* BFull() const { return SFull(4); }  // of the first strip
  __device__ Bf16* Turned(int which) const {
    return reinterpret_cast<Bf16*>(memory + S::kBarrierBytes + which * S::kTurnedBytes);
  }
  __device__ Bf16* TurnedB(int panel) const { return Turned(panel); }
  __device__ Bf16* TurnedS(int which) const { return Turned(S::kTurned - 2 + which); }
  __device__ Bf16* Chunk(int stage) const { return Turned(S::kTurned) + stage * (kChunkBytes / 2); }

  __device__ void Prepare() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < S::kStages) {
      InitBarrier(Full(thread), 1);
      InitBarrier(Empty(thread), kMultiplying / 32);
    }
    if (thread == 0) InitBarrier(BFull(), 1);
    if (thread < 2) {
      InitBarrier(SFull(thread), kTurners);
      InitBarrier(SEmpty(thread), 4 * kDbGroups);
    }
    FenceBarriers();
    __syncthreads();
  }

  __device__ void CopyChunks() const {
    const uint64_t policy = ReadOncePolicy();
    RingPlace<S::kStages> place;
    bool fresh = true;  // in the first turn there is room
    bool b_comes = true;
    ForEachShare(x, [&](int index, int first, int behind, int) {
      const Strip strip = StripOf(x, index);
      const CUtensorMap& dy = x.part[strip.part].dy;
      for (int tile = first; tile < behind; ++tile) {
        for (int chunk = 0; chunk < strip.chunks; ++chunk) {
          if (!fresh) WaitFor(Empty(place.at), place.turn ^ 1);
          if (b_comes && place.at == kFirstChunks) {
            WaitFor(BFull(), 0);
            b_comes = false;
          }
          ExpectBytes(Full(place.at), kChunkBytes);
#pragma unroll
          for (int panel = 0; panel < kDbGroups; ++panel) {
            LoadBox(Chunk(place.at) + panel * (kPanelBytes / 2), dy, tile * kTileRows,
                    strip.column + chunk * kChunkColumns + panel * kPanelColumns, Full(place.at),
                    policy);
          }
          place.Advance();
          fresh = fresh && place.at != 0;
        }
      }
    });
  }

  __device__ void TurnS() const {
    const int thread = static_cast<int>(threadIdx.x) - 32;
    RingPlace<2> place;
    bool fresh = true;
    ForEachShare(x, [&](int index, int first, int behind, int) {
      const Bf16* s = x.s + StripOf(x, index).part * x.r;
      for (int tile = first; tile < behind; ++tile) {
        if (!fresh) WaitFor(SEmpty(place.at), place.turn ^ 1);
        for (int at = thread; at < kTileRows * kPacks; at += kTurners) {
          const int row = at % kTileRows, eight = at / kTileRows, c = eight * 8;
          const int64_t from = int64_t{tile} * kTileRows + row;
          Pack<Bf16, 8> values{};
          if (from < x.rows && c < x.r) values = Pack<Bf16, 8>::Load(s + from * x.s_stride + c);
          PutTurned(TurnedS(place.at), eight, row, values);
        }
        FenceBulkCopies();
        Arrive(SFull(place.at));
        place.Advance();
        fresh = fresh && place.at != 0;
      }
    });
  }

  // By all that multiply, before the first of a strip's tiles.
  __device__ void TurnB(const Strip& strip) const {
    const Part& part = x.part[strip.part];
    const int thread = static_cast<int>(threadIdx.x) - kDs * kWarpgroup;
    SyncProducts();  // nobody still multiplies with the strip before
#pragma unroll 1
    for (int at = thread; at < strip.chunks * kChunkColumns * kPacks; at += kMultiplying) {
      const int column = at / kPacks, eight = at % kPacks, c = eight * 8;
      const int n = strip.column + column;
      Pack<Bf16, 8> values{};
      if (n < part.columns && c < x.r) {
        values = Pack<Bf16, 8>::Load(part.b + n * part.b_stride + c);
      }
      PutTurned(TurnedB(column / kPanelColumns), eight, column % kPanelColumns, values);
    }
    FenceBulkCopies();
    SyncProducts();
  }
  __device__ static void SyncProducts() {
    asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory");
  }

  // Behind a chunk's products: those of the chunk before it are through, and its place is free.
  __device__ void EndChunk(int chunk, bool tells, int* before, RingPlace<S::kStages>* place) const {
    CommitProducts();
    if (chunk > 0) {
      WaitForProducts<1>();
      if (tells) Arrive(Empty(*before));
    }
    *before = place->at;
    place->Advance();
  }

  // (row, row + 8; rank, rank + 1) of each eight ranks.
  __device__ void StoreDs(int strip, int tile, const float (&ds)[S::kDsChains][kRank / 2]) const {
    const auto sum = [&](int i) {
      float of_chains = ds[0][i];
#pragma unroll
      for (int chain = 1; chain < S::kDsChains; ++chain) of_chains += ds[chain][i];
      return of_chains;
    };
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % 32;
    const int row = tile * kTileRows + thread / 32 * 16 + lane / 4;
    float* to = x.ds_sums + (static_cast<int64_t>(strip) * x.rows + row) * kRank + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= x.rows) break;
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        *reinterpret_cast<float2*>(to + half * 8 * kRank + j * 8) =
            make_float2(sum(j * 4 + half * 2), sum(j * 4 + half * 2 + 1));
      }
    }
  }

  __device__ void AddDs() const {
    const bool tells = threadIdx.x % 32 == 0;
    RingPlace<S::kStages> place;
    float ds[S::kDsChains][kRank / 2];
    bool is_first = true;
    ForEachShare(x, [&](int index, int first, int behind, int) {
      const Strip strip = StripOf(x, index);
      TurnB(strip);
      if (is_first && threadIdx.x % kWarpgroup == 0) Arrive(BFull());
      is_first = false;
      for (int tile = first; tile < behind; ++tile) {
        int before = 0;
        for (int chunk = 0; chunk < strip.chunks; ++chunk) {
          WaitFor(Full(place.at), place.turn);
          const uint64_t rows = DescriptorOf(SharedAddress(Chunk(place.at)));
          const uint64_t b = DescriptorOf(SharedAddress(TurnedB(chunk * kDbGroups)));
          FenceProducts();
#pragma unroll
          for (int i = 0; i < 4 * kDbGroups; ++i) {
            const int panel = i / 4, k = i % 4;
            MultiplyNarrow<kRank, false>(
                ds[i % S::kDsChains], rows + panel * (kPanelBytes / 16) + k * 2,
                b + panel * (S::kTurnedBytes / 16) + k * 2, chunk > 0 || i >= S::kDsChains);
          }
          EndChunk(chunk, tells, &before, &place);
        }
        WaitForProducts<0>();
        Pin(ds);
        if (tells) Arrive(Empty(before));
        StoreDs(index, tile, ds);
      }
    });
  }

  // Of a panel: (column, column + 8; rank, rank + 1) of each eight ranks.
  __device__ void StoreDb(int slot, int panel, const float (&db)[kRank / 2]) const {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % 32;
    const int column = panel * kPanelColumns + thread / 32 * 16 + lane / 4;
    float* to = x.db_sums + (slot * x.grid.strip_columns() + column) * kRank + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        *reinterpret_cast<float2*>(to + half * 8 * kRank + j * 8) =
            make_float2(db[j * 4 + half * 2], db[j * 4 + half * 2 + 1]);
      }
    }
  }

  __device__ void AddDb(int group) const {
    const bool tells = threadIdx.x % 32 == 0;
    RingPlace<S::kStages> place;
    RingPlace<2> s_place;
    float db[S::kStripChunks][kRank / 2];
    ForEachShare(x, [&](int index, int first, int behind, int slot) {
      const Strip strip = StripOf(x, index);
      TurnB(strip);
      for (int tile = first; tile < behind; ++tile) {
        WaitFor(SFull(s_place.at), s_place.turn);
        const uint64_t s = DescriptorOf(SharedAddress(TurnedS(s_place.at)));
        int before = 0;
#pragma unroll
        for (int chunk = 0; chunk < S::kStripChunks; ++chunk) {
          if (chunk == strip.chunks) break;
          WaitFor(Full(place.at), place.turn);
          const uint64_t columns =
              DescriptorOf(SharedAddress(Chunk(place.at)) + group * kPanelBytes);
          FenceProducts();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            MultiplyNarrow<kRank, true>(db[chunk], columns + k * (16 * kPanelRowBytes / 16),
                                        s + k * 2, tile > first || k > 0);
          }
          EndChunk(chunk, tells, &before, &place);
        }
        WaitForProducts<0>();
        Pin(db);
        if (tells) {
          Arrive(Empty(before));
          Arrive(SEmpty(s_place.at));
        }
        s_place.Advance();
      }
#pragma unroll
      for (int chunk = 0; chunk < S::kStripChunks; ++chunk) {
        if (chunk < strip.chunks) StoreDb(slot, chunk * kDbGroups + group, db[chunk]);
      }
    });
  }
};

template <int kWidth>
__global__ __launch_bounds__(kThreads, 1) void PassKernel(const __grid_constant__ Params x) {
  if constexpr (kWarpgroupProducts) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Block<kWidth> block{x, memory};
    block.Prepare();
    AwaitEarlier();
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
    if (warpgroup == kCopying) {
      GiveRegisters<kCopyingRegisters>();
      if (threadIdx.x == 0) block.CopyChunks();
      if (threadIdx.x >= 32) block.TurnS();
    } else if (warpgroup == kDs) {
      GiveRegisters<kDsRegisters>();
      block.AddDs();
    } else {
      TakeRegisters<kDbRegisters>();
      block.AddDb(warpgroup - kFirstDb);
    }
  }
}

// A thread per four elements of ds, then kLanes per column of a strip and four ranks.
template <int kRank, int kLanes>
__global__ __launch_bounds__(256, 4) void AddUpKernel(const __grid_constant__ Params x) {
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
      const int64_t stride = static_cast<int64_t>(x.rows) * kRank;
      const float* from = x.ds_sums + begin * stride + row * kRank + column - p * x.r;
      const Pack<float, 4> sum = SumOf(from, stride, end - begin);
      for (int k = 0; k < 4; ++k) ds.Set(k, x.scale * sum.v[k]);
    }
    ds.Store(x.ds + row * x.ds_stride + column);
    return;
  }
  at = (at - ds_threads) / kLanes;
  const int width = static_cast<int>(x.grid.strip_columns());
  const int line = at / rank_packs, c = (at - line * rank_packs) * 4;
  const int strip = line / width, column = line % width;
  const Part& part = x.part[PartOf(x, strip)];
  const int n = (strip - part.first_strip) * width + column;
  const bool real = strip < x.grid.strips && n < part.columns;
  const int summed = real ? strip : -1;
  const Pack<float, 4> sum =
      SumOfStrip<kLanes>(summed, x.db_sums + column * kRank + c, int64_t{width} * kRank, [&] {
        return Blocks{BlockOf(x, summed, 0), BlockOf(x, summed, x.grid.tiles - 1)};
      });
  if (!real || threadIdx.x % kLanes != 0) return;
  float* to = part.db + n * part.db_stride + c;
  Pack<float, 4> db = Pack<float, 4>::Load(to);
  for (int k = 0; k < 4; ++k) db.v[k] += x.db_scale * sum.v[k];
  db.Store(to);
}

// ---- Launches ----

// How many rows' partial sums fit into the workspace; in whole tiles, and in equal shares of T.
int64_t RowsAtOnce(const LoraBackwardArgs& a, const Grid& grid) {
  const int64_t T = a.dy.dim(0), left = a.workspace.bytes() / 4 - grid.DbSums();
  const int64_t most = left / (int64_t{grid.strips} * grid.width) / kTileRows * kTileRows;
  if (most <= 0) return 0;
  return int64_t{DivideUp(DivideUp(T, DivideUp(T, most)), kTileRows)} * kTileRows;
}

Params ParamsOf(const LoraBackwardArgs& a, int64_t begin, int64_t rows, int strip_chunks) {
  Params x{};
  x.parts = static_cast<int>(a.parts.size());
  x.r = static_cast<int>(a.parts[0].b.dim(1));
  x.grid = Grid(a, rows, strip_chunks);
  int strips = 0;
  int work = 0;
  for (int p = 0; p < x.parts; ++p) {
    const LoraBackwardPart& part = a.parts[p];
    const int64_t columns = part.b.dim(0);
    const Bf16* dy = Data<const Bf16>(a.dy) + begin * a.dy.stride(0) + part.column_begin;
    x.part[p] = {BoxesOf(dy, rows, columns, a.dy.stride(0), kTileRows),
                 Data<const Bf16>(part.b),
                 Data<float>(part.db),
                 part.b.stride(0),
                 part.db.stride(0),
                 static_cast<int>(columns),
                 strips,
                 work};
    strips += DivideUp(columns, x.grid.strip_columns());
    work += x.grid.tiles * DivideUp(columns, kChunkColumns);
  }
  x.rows = static_cast<int>(rows);
  x.s_stride = a.s.stride(0);
  x.ds_stride = a.ds.stride(0);
  x.s = Data<const Bf16>(a.s) + begin * x.s_stride;
  x.ds = Data<Bf16>(a.ds) + begin * x.ds_stride;
  x.ds_columns = static_cast<int>(a.ds.dim(1));
  x.db_sums = Data<float>(a.workspace);
  x.ds_sums = x.db_sums + x.grid.DbSums();
  x.scale = static_cast<float>(a.scale);
  x.db_scale = static_cast<float>(a.db_scale);
  return x;
}

template <int kRank>
bool Run(const Exec& exec, const LoraBackwardArgs& a) {
  using S = Shape<kRank>;
  const Grid grid = Grid::Of(a);
  const int64_t T = a.dy.dim(0), step = RowsAtOnce(a, grid);
  if (step == 0) return false;
  const OpTraceScope trace(exec, "LoraBackward");
  CUDA_CHECK(cudaFuncSetAttribute(PassKernel<kRank>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  S::kBytes));
  for (int64_t begin = 0; begin < T; begin += step) {
    const Params x = ParamsOf(a, begin, std::min(step, T - begin), grid.strip_chunks);
    LaunchEarly(exec.stream, {dim3(x.grid.blocks), dim3(kThreads), S::kBytes}, PassKernel<kRank>,
                x);
    const int64_t ds_packs = int64_t{x.rows} * (x.ds_columns / 4);
    const int64_t db_packs = x.grid.strips * x.grid.strip_columns() * (x.r / 4);
    if (x.grid.strips == 1) {
      LaunchBehind(exec, AddUpKernel<kRank, kSlotLanesOfOne>, x, ds_packs, db_packs,
                   kSlotLanesOfOne);
    } else {
      LaunchBehind(exec, AddUpKernel<kRank, kSlotLanes>, x, ds_packs, db_packs);
    }
  }
  return true;
}

}  // namespace

bool LoraBackwardCuda(const Exec& exec, const LoraBackwardArgs& a) {
  const int64_t r = a.parts[0].b.dim(1);
  if (!HasWarpgroupProducts() || a.dy.dtype != DType::kBF16 || !PassTakesRank(r)) return false;
  if (a.dy.dim(0) == 0 || !Packable(4, {&a.ds})) return false;
  for (const TensorView* view : {&a.dy, &a.s}) {
    if (reinterpret_cast<uintptr_t>(view->data) % 16 != 0) return false;
    if (view->dim(0) > 1 && view->stride(0) % 8 != 0) return false;
  }
  for (const LoraBackwardPart& part : a.parts) {
    if (part.column_begin % 8 != 0 || part.b.dim(0) % 8 != 0 || part.b.dim(0) == 0) return false;
    if (!Packable(8, {&part.b}) || !Packable(4, {&part.db})) return false;
  }
  return r <= 16 ? Run<16>(exec, a) : Run<32>(exec, a);
}

}  // namespace attune
