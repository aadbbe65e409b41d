// What the passes over the gradients of rows share on the device.
#pragma once

#include "kernels/core/cuda.cuh"
#include "kernels/core/early_launch.cuh"
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
struct Blocks {
  int first, last;
};

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

// The sum of what the blocks have left of a strip in their slots of `slot_size`, of which the first
// is at `from`; blocks() is the first and the last of them. kLanes lanes side by side share
// the slots. By all lanes of a warp; strip < 0 adds up nothing.
template <int kLanes, typename F>
__device__ Pack<float, 4> SumOfStrip(int strip, const float* from, int64_t slot_size, F&& blocks) {
  Pack<float, 4> sum{};
  if (strip >= 0) {
    const auto [begin, last] = blocks();
    const int count = last - begin + 1;
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
