// What the passes over the gradients of rows share on the device.
#pragma once

#include "kernels/core/early_launch.cuh"
#include "kernels/core/tensor_map.cuh"
#include "kernels/core/warpgroup.cuh"
#include "kernels/lora/lora_pass.h"

namespace attune {

__device__ inline int FirstTile(const PassGrid& grid, int block) {
  return block * grid.strips * grid.tiles / grid.blocks;
}
__device__ inline int BlockOf(const PassGrid& grid, int tile) {
  return ((tile + 1) * grid.blocks - 1) / (grid.strips * grid.tiles);
}
__device__ inline int SlotOf(int strip, int block) {
  return strip + block;
}

// Calls f(strip, first tile, tile behind the last, slot) for each strip of which this block has
// tiles.
template <typename F>
__device__ void ForEachRun(const PassGrid& grid, F&& f) {
  const int block = static_cast<int>(blockIdx.x), end = FirstTile(grid, block + 1);
  for (int at = FirstTile(grid, block); at < end;) {
    const int strip = at / grid.tiles, first = at % grid.tiles;
    const int behind = min(grid.tiles, first + end - at);
    f(strip, first, behind, SlotOf(strip, block));
    at += behind - first;
  }
}

// One more warpgroup copies, so that those which compute do not wait for it; it leaves them most of
// its registers. A block begins with 96 for each thread and can only share those out anew.
constexpr int kPassBlock = kPassThreads + kWarpgroup;
constexpr int kPassCopyingRegisters = 24, kPassComputingRegisters = 112;
static_assert(kPassThreads * kPassComputingRegisters + kWarpgroup * kPassCopyingRegisters <=
              kPassBlock * 96);
__device__ inline bool IsCopying() {
  return threadIdx.x >= kPassThreads;
}
__device__ inline void TakePassRegisters() {
  if constexpr (kWarpgroupProducts) TakeRegisters<kPassComputingRegisters>();
}
// Of those that compute.
__device__ inline void SyncPass() {
  asm volatile("bar.sync 1, %0;" ::"n"(kPassThreads) : "memory");
}

// A strip of some matrices: boxes of kBoxColumns columns, from one on.
template <int kLoads, int kStores>
struct StripBoxes {
  const CUtensorMap* load[kLoads];
  const CUtensorMap* store[kStores == 0 ? 1 : kStores];
  int column, boxes;
};

// How many boxes a strip of at most `width` columns has, from `column` on, of a matrix of
// `columns`.
__device__ inline int BoxesIn(int column, int width, int columns) {
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
      if constexpr (kStores > 0) store(i);
      if (i + kStages >= count) continue;
      if constexpr (kStores > 0) WaitForBulkReads();
      load(i + kStages);
    }
    if constexpr (kStores > 0) WaitForBulkStores();
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

// All that a block of a pass does. Its kernel says what is copied, StripOf(strip), what it takes to
// a strip's tiles [first, behind) and what it leaves of them in a slot, Begin and End, and of each
// tile what is computed, Multiply, and what is left of that in sums of even and odd tiles,
// StoreSums. What is copied beside the rows is ready behind AwaitAhead and goes on in CopyAhead.
template <typename B>
__device__ void RunPass(const PassGrid& grid, B* block) {
  auto& pipe = block->pipe;
  pipe.Prepare();
  AwaitEarlier();
  if (IsCopying()) return pipe.Copy(grid, [&](int strip) { return block->StripOf(strip); });
  TakePassRegisters();
  ForEachRun(grid, [&](int strip, int first, int behind, int slot) {
    block->Begin(strip, first, behind);
    for (int tile = first; tile < behind; ++tile) {
      // Behind the barrier the tile before is done: its rows go back and its sums are read while
      // this one is worked on. Even and odd tiles have sums of their own, so one is enough.
      block->AwaitAhead();
      pipe.Wait();
      SyncPass();
      block->CopyAhead(tile + 1, behind);
      if (tile > first) {
        pipe.GiveBack(pipe.Before());
        block->StoreSums(strip, tile - 1);
      }
      block->Multiply(tile);
      pipe.Advance();
    }
    SyncPass();
    pipe.GiveBack(pipe.Before());
    block->StoreSums(strip, behind - 1);
    block->End(slot);
  });
}

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

// Lanes that share the slots of a strip, and where a single strip has those of all blocks.
constexpr int kSlotLanes = 4, kSlotLanesOfOne = 16;

// Adds up `count` times four sums, `stride` apart.
__device__ inline Pack<float, 4> SumOf(const float* from, int64_t stride, int count) {
  using P = Pack<float, 4>;
  P sum{};
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const P next = P::Load(from + i * stride);
    for (int k = 0; k < 4; ++k) sum.v[k] += next.v[k];
  }
  return sum;
}

// The sum over kLanes lanes side by side, in each of them.
template <int kLanes>
__device__ Pack<float, 4> SumOfLanes(Pack<float, 4> sum) {
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) {
      sum.v[k] += __shfl_xor_sync(0xffffffffu, sum.v[k], other);
    }
  }
  return sum;
}

// The same of what the blocks have left of a strip in their slots of `slot_size`, of which the
// first is at `from`. kLanes lanes side by side share the slots. By all lanes of a warp; strip < 0
// adds up nothing.
template <int kLanes>
__device__ Pack<float, 4> SumOfStrip(const PassGrid& grid, int strip, const float* from,
                                     int64_t slot_size) {
  Pack<float, 4> sum{};
  if (strip >= 0) {
    const int begin = BlockOf(grid, strip * grid.tiles);
    const int count = BlockOf(grid, (strip + 1) * grid.tiles - 1) - begin + 1;
    const int lane = threadIdx.x % kLanes;
    from += (SlotOf(strip, begin) + lane) * slot_size;
    sum = SumOf(from, kLanes * slot_size, (count - lane + kLanes - 1) / kLanes);
  }
  return SumOfLanes<kLanes>(sum);
}

// A thread per pack, 256 to a block: first those of ds, in whole warps, then `lanes` for each of
// the gradients. They begin when the pass is through: while it runs they would pile up on the
// multiprocessors that end first (H200, 1,024 columns: 40 us for 25).
__host__ __device__ inline int64_t WholeWarps(int64_t packs) {
  return (packs + 31) / 32 * 32;
}
template <typename Params>
void LaunchBehind(const Exec& exec, void (*kernel)(Params), const Params& x, int64_t ds_packs,
                  int64_t gradient_packs, int lanes = kSlotLanes) {
  const int64_t threads = WholeWarps(ds_packs) + lanes * gradient_packs;
  LaunchEarly(exec.stream, {dim3(DivideUp(threads, 256)), dim3(256)}, kernel, x);
}

}  // namespace attune
