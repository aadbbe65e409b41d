// What the passes over the gradients of rows share on the device.
#pragma once

#include "kernels/core/tensor_core.cuh"
#include "kernels/lora/lora_pass.h"

namespace attune {

__device__ inline int FirstTile(const PassGrid& grid, int block) {
  return static_cast<int>(int64_t{block} * grid.strips * grid.tiles / grid.blocks);
}
__device__ inline int BlockOf(const PassGrid& grid, int tile) {
  return static_cast<int>(((tile + int64_t{1}) * grid.blocks - 1) / (grid.strips * grid.tiles));
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

// Tiles of kColumns columns on their way through shared memory, of kLoads matrices whose rows are
// copied there; what is left in the places of the first kStores goes back to memory. One tile is
// worked on while the next one is copied and the one before goes back: three stages.
//
// Every warp copies a row, a lane for each matrix: one warp would be busy with all rows as long as
// the others multiply.
template <int kLoads, int kStores, int kColumns>
struct TilePipe {
  static constexpr int kStages = 3;
  // Rows lie apart so that no two of eight share a bank.
  static constexpr int kPitch = kColumns + 8;
  static constexpr int kTileElements = kPassRows * kPitch;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kBytes = kBarrierBytes + 2 * kStages * kLoads * kTileElements;
  static_assert(8 * kStages <= kBarrierBytes && kStores <= kLoads);

  unsigned char* memory;  // kBytes, at a multiple of 128
  int rows, row_bytes;    // of a matrix; of a tile's row
  // The strip's first row, of the matrix that this lane copies, if any; and where it goes back to.
  const Bf16* from = nullptr;
  Bf16* back = nullptr;
  int64_t stride = 0, back_stride = 0;
  int stage = 0, turn = 0;  // of the tile that is worked on; the turn's parity

  __device__ uint64_t* Barriers() const { return reinterpret_cast<uint64_t*>(memory); }
  __device__ Bf16* Tile(int at, int which) const {
    return reinterpret_cast<Bf16*>(memory + kBarrierBytes) + (at * kLoads + which) * kTileElements;
  }
  __device__ int Next() const { return stage == kStages - 1 ? 0 : stage + 1; }
  __device__ int Before() const { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ void Advance() {
    stage = Next();
    turn ^= stage == 0;
  }

  // Lane `which` copies this one.
  __device__ void Aim(int which, const Bf16* first_row, int64_t row_stride) {
    if (threadIdx.x % 32 == which) from = first_row, stride = row_stride;
  }
  __device__ void AimBack(int which, Bf16* first_row, int64_t row_stride) {
    if (threadIdx.x % 32 == which) back = first_row, back_stride = row_stride;
  }
  // By all threads, before the first Load. What no copy writes must be a number: it is multiplied
  // with zeros.
  __device__ void Prepare() const {
    if (threadIdx.x < kStages) InitBarrier(Barriers() + threadIdx.x, kLoads * kPassRows);
    if (rows % kPassRows != 0) {
      for (int i = threadIdx.x * 8; i < kStages * kLoads * kTileElements; i += kPassThreads * 8) {
        *reinterpret_cast<uint4*>(Tile(0, 0) + i) = make_uint4(0, 0, 0, 0);
      }
    }
    FenceBarriers();
    __syncthreads();
  }
  // Into a stage whose last tile is on its way back.
  __device__ void Load(int tile, int to) const {
    const int lane_row = threadIdx.x / 32, which = threadIdx.x % 32;
    if (which >= kLoads) return;
    const int64_t row = tile * kPassRows + lane_row;
    const int bytes = row < rows ? row_bytes : 0;
    WaitForBulkReads();
    ExpectBytes(Barriers() + to, bytes);
    if (bytes == 0) return;
    BulkCopy(Tile(to, which) + lane_row * kPitch, from + row * stride, bytes, Barriers() + to);
  }
  __device__ void Wait() const { WaitFor(Barriers() + stage, turn); }
  // Behind a barrier behind FenceBulkCopies by those who wrote.
  __device__ void Store(int tile, int at) const {
    const int lane_row = threadIdx.x / 32, which = threadIdx.x % 32;
    const int64_t row = tile * kPassRows + lane_row;
    if (which >= kStores || row >= rows) return;
    BulkStore(back + row * back_stride, Tile(at, which) + lane_row * kPitch, row_bytes);
    CommitBulkStores();
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

// A pair of bf16.
__device__ inline uint32_t RoundedPair(float2 x) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(x.x, x.y);
  return reinterpret_cast<const uint32_t&>(rounded);
}
__device__ inline float2 PairAsFloats(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Adds up `count` times four sums, `stride` apart.
__device__ inline Pack<float, 4> SumOf(const float* from, int64_t stride, int count) {
  using P = Pack<float, 4>;
  P sum = P::Load(from);
#pragma unroll 8
  for (int i = 1; i < count; ++i) {
    const P next = P::Load(from + i * stride);
    for (int k = 0; k < 4; ++k) sum.v[k] += next.v[k];
  }
  return sum;
}

// The same of what the blocks have left of a strip in their slots of `slot_size`; of the first
// slot.
__device__ inline Pack<float, 4> SumOfStrip(const PassGrid& grid, int strip, const float* from,
                                            int64_t slot_size) {
  const int first = BlockOf(grid, strip * grid.tiles);
  const int last = BlockOf(grid, (strip + 1) * grid.tiles - 1);
  return SumOf(from + SlotOf(strip, first) * slot_size, slot_size, last - first + 1);
}

// A thread per pack, 256 to a block. The blocks may start while the last of the kernel before still
// run; they wait for its end.
template <typename Params>
void LaunchBehind(const Exec& exec, void (*kernel)(Params), const Params& x, int64_t packs) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(DivideUp(packs, 256)));
  config.blockDim = dim3(256);
  config.stream = StreamOf(exec.stream);
  config.attrs = &early;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, x));
}

}  // namespace attune
