// GatedLoraForward in one pass, on the tensor cores. A block goes down a strip of columns
// (PassGrid, TilePipe): h takes the place of gate in shared memory and goes back from there; a
// warp's share of s, of its 32 columns, goes through shared memory, where the block adds up those
// of its warps. The sums of a strip and tile go to the workspace; a second, small kernel adds up
// those of the strips.
#include "kernels/gated_activation/activate.cuh"
#include "kernels/lora/gated_lora_forward.h"
#include "kernels/lora/lora_pass.cuh"

namespace attune {

bool GatedLoraForwardCuda(const Exec& exec, const GatedLoraForwardArgs& a);

namespace {

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

  __device__ void AwaitAhead() const {}
  __device__ void CopyAhead(int, int) const {}

  __device__ void Begin(int strip, int, int) {
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
  __device__ void End(int) const {}
};

template <int kGroups, Activation kActivation>
__global__ __launch_bounds__(kPassBlock, 1) void PassKernel(const __grid_constant__ Params x) {
  if constexpr (kSm90) {
    using S = Shape<kGroups>;
    extern __shared__ __align__(1024) unsigned char memory[];
    float* sums = reinterpret_cast<float*>(memory + S::Pipe::kBytes);
    Block<kGroups, kActivation> block{x, {memory}, sums};
    RunPass(x.grid, &block);
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
