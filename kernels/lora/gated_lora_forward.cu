// GatedLoraForward in one pass, on the tensor cores. A block goes down a strip of columns
// (PassGrid, TilePipe): h takes the place of gate in shared memory and goes back from there; a
// warp's share of s, of its 32 columns, goes through shared memory, where the block adds up those
// of its warps. The sums of a strip and tile go to the workspace; a second, small kernel adds up
// those of the strips.
#include "kernels/core/tensor_map.cuh"
#include "kernels/core/warpgroup.cuh"
#include "kernels/gated_activation/activate.cuh"
#include "kernels/lora/gated_lora_forward.h"
#include "kernels/lora/lora_pass.cuh"

namespace attune {

bool GatedLoraForwardCuda(const Exec& exec, const GatedLoraForwardArgs& a);

namespace {

// One more warpgroup copies, so that those which compute do not wait for it; it leaves them most of
// its registers. A block begins with 96 for each thread and can only share those out anew.
constexpr int kPassBlock = kPassThreads + kWarpgroup;
constexpr int kPassCopyingRegisters = 24, kPassComputingRegisters = 112;
static_assert(kPassThreads * kPassComputingRegisters + kWarpgroup * kPassCopyingRegisters <=
              kPassBlock * 96);
__device__ bool IsCopying() {
  return threadIdx.x >= kPassThreads;
}
__device__ void TakePassRegisters() {
  if constexpr (kWarpgroupProducts) TakeRegisters<kPassComputingRegisters>();
}
// Of those that compute.
__device__ void SyncPass() {
  asm volatile("bar.sync 1, %0;" ::"n"(kPassThreads) : "memory");
}

// A strip of some matrices: boxes of kBoxColumns columns, from one on.
template <int kLoads, int kStores>
struct StripBoxes {
  const CUtensorMap* load[kLoads];
  const CUtensorMap* store[kStores];
  int column, boxes;
};

// How many boxes a strip of at most `width` columns has, from `column` on, of a matrix of
// `columns`.
__device__ int BoxesIn(int column, int width, int columns) {
  return (min(columns - column, width) + kBoxColumns - 1) / kBoxColumns;
}

// Tiles of kColumns columns on their way through shared memory, of kLoads matrices; what is left in
// the places of the first kStores goes back to memory. A stage is worked on while others are copied
// to, or back.
template <int kLoads, int kStores, int kColumns, int kStages>
struct TilePipe {
  static constexpr int kBoxElements = kPassRows * kBoxColumns;
  static constexpr int kTileElements = kPassRows * kColumns;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kBytes = kBarrierBytes + 2 * kStages * kLoads * kTileElements;
  static_assert(16 * kStages <= kBarrierBytes && kStores <= kLoads);

  unsigned char* memory;    // kBytes, at a multiple of 1024
  int stage = 0, turn = 0;  // of the tile that is worked on; the turn's parity

  __device__ uint64_t* Full(int at) const { return reinterpret_cast<uint64_t*>(memory) + at; }
  __device__ uint64_t* Done(int at) const { return Full(kStages + at); }
  __device__ Bf16* Tile(int at, int which) const {
    return reinterpret_cast<Bf16*>(memory + kBarrierBytes) + (at * kLoads + which) * kTileElements;
  }
  // Of a tile; columns in multiples of 8.
  __device__ static int Place(int row, int column) {
    return column / kBoxColumns * kBoxElements + BoxPlace(row, column % kBoxColumns);
  }
  __device__ int Next() const { return stage == kStages - 1 ? 0 : stage + 1; }
  __device__ int Before() const { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ void Advance() {
    stage = Next();
    turn ^= stage == 0;
  }

  // By all threads, first of all.
  __device__ void Prepare() const {
    if (threadIdx.x < 2 * kStages) InitBarrier(Full(static_cast<int>(threadIdx.x)), 1);
    FenceBarriers();
    __syncthreads();
  }
  // All of the copying warpgroup's work. boxes_of(strip) is a StripBoxes.
  template <typename F>
  __device__ void Copy(const PassGrid& grid, F&& boxes_of) const {
    if constexpr (kWarpgroupProducts) GiveRegisters<kPassCopyingRegisters>();
    if (threadIdx.x != kPassThreads) return;
    const int block = static_cast<int>(blockIdx.x), begin = FirstTile(grid, block);
    const int count = FirstTile(grid, block + 1) - begin;
    const auto load = [&](int i) {
      const int strip = (begin + i) / grid.tiles, row = (begin + i) % grid.tiles * kPassRows;
      const StripBoxes<kLoads, kStores> from = boxes_of(strip);
      const int at = i % kStages;
      ExpectBytes(Full(at), 2 * kLoads * from.boxes * kBoxElements);
#pragma unroll
      for (int which = 0; which < kLoads; ++which) {
        for (int box = 0; box < from.boxes; ++box) {
          LoadBox(Tile(at, which) + box * kBoxElements, *from.load[which], row,
                  from.column + box * kBoxColumns, Full(at));
        }
      }
    };
    const auto store = [&](int i) {
      const int strip = (begin + i) / grid.tiles, row = (begin + i) % grid.tiles * kPassRows;
      const StripBoxes<kLoads, kStores> to = boxes_of(strip);
#pragma unroll
      for (int which = 0; which < kStores; ++which) {
        for (int box = 0; box < to.boxes; ++box) {
          StoreBox(*to.store[which], row, to.column + box * kBoxColumns,
                   Tile(i % kStages, which) + box * kBoxElements);
        }
      }
      CommitBulkStores();
    };
    for (int i = 0; i < min(count, kStages); ++i) load(i);
    for (int i = 0; i < count; ++i) {
      WaitFor(Done(i % kStages), i / kStages & 1);
      store(i);
      if (i + kStages >= count) continue;
      WaitForBulkReads();
      load(i + kStages);
    }
    WaitForBulkStores();
  }
  // For those that compute.
  __device__ void Wait() const {
    WaitFor(Full(stage), turn);
  }
  // Behind SyncPass behind FenceBulkCopies by those who wrote.
  __device__ void GiveBack(int at) const {
    if (threadIdx.x == 0) Arrive(Done(at));
  }
};

// Sums of products of kWarps warps with 16 rows, each of kWidth columns: where a warp leaves its
// own, and the block's of element `at`, in a fixed order.
template <int kWidth>
struct WarpSums {
  static constexpr int kElements = kPassWarps * kPassRows * kWidth;

  float* memory;  // kElements

  // So that no two of four rows share a bank: by eights of columns.
  __device__ static int Place(int row, int column) {
    static_assert(kWidth % 32 == 0 || kWidth == 16);
    return column ^ (kWidth == 16 ? row / 2 % 2 : row % 4) * 8;
  }
  // The accumulator of a product, of columns [column, column + 8).
  __device__ void Put(int column, const float (&sum)[4]) const {
    const int lane = threadIdx.x % 32, row = lane / 4;
    float* to =
        memory + (threadIdx.x / 32 * kPassRows + row) * kWidth + Place(row, column) + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2*>(to + 8 * kWidth) = make_float2(sum[2], sum[3]);
  }
  __device__ float Of(int at) const {
    const int row = at / kWidth;
    const float* from = memory + row * kWidth + Place(row, at % kWidth);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kPassWarps; ++w) sum += from[w * kPassRows * kWidth];
    return sum;
  }
  // Of `rows` rows from row_begin on, into `to` (rows, kWidth).
  __device__ void Store(int row_begin, int rows, float* to) const {
    for (int at = threadIdx.x; at < kPassRows * kWidth; at += kPassThreads) {
      if (row_begin + at / kWidth < rows)
        to[static_cast<int64_t>(row_begin) * kWidth + at] = Of(at);
    }
  }
};

enum { kGateTile, kUpTile, kTiles };

template <int kGroups>
struct Shape : GatedForwardShape<kGroups> {
  using Pass = GatedForwardShape<kGroups>;
  using Pipe = TilePipe<kTiles, 1, Pass::kColumns, 5>;
  using Sums = WarpSums<Pass::kRank>;
  static constexpr int kBytes = Pipe::kBytes + 4 * 2 * Sums::kElements;
  static_assert(kBytes <= 227 << 10);
};

struct Params {
  int r, rows, columns;  // F columns
  PassGrid grid;
  CUtensorMap gate_boxes, up_boxes, h_boxes;
  const Bf16* a;  // (r, F)
  Bf16* s;
  int64_t s_stride;
  int s_columns;
  float* sums;  // (strips, rows, kRank)
};

template <int kGroups, Activation kActivation>
struct Block {
  using S = Shape<kGroups>;
  static constexpr int kBlocks = S::kWarpColumns / 16, kHalves = 2 * kGroups;  // 8 ranks each

  const Params& x;
  typename S::Pipe pipe;
  float* sums;  // two
  int strip_begin;
  uint32_t a[kBlocks][kHalves][2];  // of this warp's columns and thread: pairs of columns of a rank

  __device__ typename S::Sums SumsOf(int tile) const {
    return {sums + tile % 2 * S::Sums::kElements};
  }
  __device__ int Column() const { return threadIdx.x / 32 * S::kWarpColumns; }

  __device__ auto StripOf(int strip) const {
    const int column = strip * S::kColumns;
    return StripBoxes<kTiles, 1>{{&x.gate_boxes, &x.up_boxes},
                                 {&x.h_boxes},
                                 column,
                                 BoxesIn(column, S::kColumns, x.columns)};
  }

  __device__ void Begin(int strip) {
    strip_begin = strip * S::kColumns;
    const int lane = threadIdx.x % 32;
    const int n0 = strip_begin + Column() + lane % 4 * 2, c0 = lane / 4;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int n = n0 + k * 16 + i * 8, c = c0 + half * 8;
          const Bf16* pair = x.a + static_cast<int64_t>(c) * x.columns + n;
          a[k][half][i] = n < x.columns && c < x.r ? PairOf(pair[0], pair[1]) : 0;
        }
      }
    }
  }

  __device__ void Multiply(int tile) {
    const typename S::Sums to = SumsOf(tile);
    const int lane = threadIdx.x % 32;
    Bf16* gate_tile = pipe.Tile(pipe.stage, kGateTile);
    const Bf16* up_tile = pipe.Tile(pipe.stage, kUpTile);
    float s[kHalves][4] = {};
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      if (strip_begin + Column() + k * 16 >= x.columns) break;
      const int at = S::Pipe::Place(lane % 16, Column() + k * 16 + lane / 16 * 8);
      uint32_t h[4], up[4];
      LoadMatrices(h, gate_tile + at);
      LoadMatrices(up, up_tile + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 g = PairAsFloats(h[i]), u = PairAsFloats(up[i]);
        float slope;
        h[i] = RoundedPair(
            {Activate<kActivation>(g.x, &slope) * u.x, Activate<kActivation>(g.y, &slope) * u.y});
      }
      StoreMatrices(gate_tile + at, h);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        MultiplyAdd(s[half], h, a[k][half][0], a[k][half][1]);
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) to.Put(half * 8, s[half]);
    FenceBulkCopies();
  }

  __device__ void StoreSums(int strip, int tile) const {
    float* to = x.sums + static_cast<int64_t>(strip) * x.rows * S::kRank;
    SumsOf(tile).Store(tile * kPassRows, x.rows, to);
  }

  __device__ void Run() {
    pipe.Prepare();
    AwaitEarlier();
    if (IsCopying()) return pipe.Copy(x.grid, [&](int strip) { return StripOf(strip); });
    TakePassRegisters();
    ForEachRun(x.grid, [&](int strip, int first, int behind, int) {
      Begin(strip);
      for (int tile = first; tile < behind; ++tile) {
        // Behind the barrier the tile before is done: its rows go back and its sums are read while
        // this one is worked on. Even and odd tiles have sums of their own, so one is enough.
        pipe.Wait();
        SyncPass();
        if (tile > first) {
          pipe.GiveBack(pipe.Before());
          StoreSums(strip, tile - 1);
        }
        Multiply(tile);
        pipe.Advance();
      }
      SyncPass();
      pipe.GiveBack(pipe.Before());
      StoreSums(strip, behind - 1);
    });
  }
};

template <int kGroups, Activation kActivation>
__global__ __launch_bounds__(kPassBlock, 1) void PassKernel(const __grid_constant__ Params x) {
  if constexpr (kSm90) {
    using S = Shape<kGroups>;
    extern __shared__ __align__(1024) unsigned char memory[];
    float* sums = reinterpret_cast<float*>(memory + S::Pipe::kBytes);
    Block<kGroups, kActivation>{x, {memory}, sums}.Run();
  }
}

// A thread per four elements of s.
template <int kGroups>
__global__ __launch_bounds__(256) void AddUpKernel(const __grid_constant__ Params x) {
  using S = Shape<kGroups>;
  AwaitEarlier();  // the sums are there
  const int at = static_cast<int>(blockIdx.x * 256 + threadIdx.x), packs = x.s_columns / 4;
  const int row = at / packs, column = (at - row * packs) * 4;
  if (row >= x.rows) return;
  Pack<Bf16, 4> s;
  for (int k = 0; k < 4; ++k) s.Set(k, 0.0f);
  if (column < x.r) {
    const float* from = x.sums + static_cast<int64_t>(row) * S::kRank + column;
    const auto sum = SumOf(from, static_cast<int64_t>(x.rows) * S::kRank, x.grid.strips);
    for (int k = 0; k < 4; ++k) s.Set(k, sum.v[k]);
  }
  s.Store(x.s + row * x.s_stride + column);
}

template <int kGroups, Activation kActivation>
void Run(const Exec& exec, const GatedLoraForwardArgs& a) {
  using S = Shape<kGroups>;
  Params x{};
  x.r = static_cast<int>(a.a.dim(0));
  x.rows = static_cast<int>(a.h.dim(0));
  x.columns = static_cast<int>(a.h.dim(1));
  x.grid = S::GridOf(x.rows, x.columns);
  const Bf16* gate = Data<const Bf16>(a.rows);
  x.gate_boxes = BoxesOf(gate, x.rows, x.columns, a.rows.stride(0), kPassRows);
  x.up_boxes = BoxesOf(gate + x.columns, x.rows, x.columns, a.rows.stride(0), kPassRows);
  x.h_boxes = BoxesOf(Data<const Bf16>(a.h), x.rows, x.columns, a.h.stride(0), kPassRows);
  x.a = Data<const Bf16>(a.a);
  x.s = Data<Bf16>(a.s);
  x.s_stride = a.s.stride(0);
  x.s_columns = static_cast<int>(a.s.dim(1));
  x.sums = Data<float>(a.workspace);
  const auto pass = PassKernel<kGroups, kActivation>;
  constexpr int kBytes = S::kBytes;
  CUDA_CHECK(cudaFuncSetAttribute(pass, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  LaunchEarly(exec.stream, {dim3(x.grid.blocks), dim3(kPassBlock), kBytes}, pass, x);
  LaunchBehind(exec, AddUpKernel<kGroups>, x, int64_t{x.rows} * (x.s_columns / 4), 0);
}

}  // namespace

bool GatedLoraForwardCuda(const Exec& exec, const GatedLoraForwardArgs& a) {
  if (!HasSm90()) return false;
  const OpTraceScope trace(exec, "GatedLoraForward");
  for (const TensorView* view : {&a.rows, &a.h}) {
    CHECK(reinterpret_cast<uintptr_t>(view->data) % 16 == 0);
  }
  CHECK(reinterpret_cast<uintptr_t>(a.s.data) % 8 == 0);
  DispatchActivation(a.activation, [&]<Activation kActivation>() {
    if (a.a.dim(0) <= 16) return Run<1, kActivation>(exec, a);
    Run<2, kActivation>(exec, a);
  });
  return true;
}

}  // namespace attune
