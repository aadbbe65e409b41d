// GatedLoraBackward in one pass, on the tensor cores.
//
// A strip is some columns of gate and as many of up, h and dh (PassGrid). Tiles come through shared
// memory (TilePipe); dgate, dup and h take the place of gate, up and dh there, and the first two go
// back. A warp has 16 or 32 columns: its shares of the gradients of
// B_gate, B_up and A_down (as columns x ranks) stay in registers to the end; its share of ds of a
// tile goes through shared memory, where the block adds up those of its warps. The sums of a strip
// and tile (ds) and of a block (the others) go to the workspace; a second, small kernel adds them
// up in the order of strips and blocks.
#include "kernels/fp8/fp8.cuh"
#include "kernels/gated_activation/activate.cuh"
#include "kernels/lora/gated_lora_backward.h"
#include "kernels/lora/lora_pass.cuh"

namespace attune {

bool GatedLoraBackwardCuda(const Exec& exec, const GatedLoraBackwardArgs& a);

namespace {

enum { kGate, kUp, kDown };  // s and gradients of parameters
enum { kGateTile, kUpTile, kDhTile, kTiles };

template <int kGroups>
struct Shape : GatedPassShape<kGroups> {
  using Pass = GatedPassShape<kGroups>;
  static constexpr int kStages = 3;
  using Pipe = TilePipe<kTiles, 2, Pass::kColumns, kStages>;
  using Sums = WarpSums<2 * Pass::kRank>;
  static constexpr int kSPitch = Pass::kMatrices * Pass::kRank + 8;
  static constexpr int kSElements = kPassRows * kSPitch;
  static constexpr int kBytes = Pipe::kBytes + 2 * kStages * kSElements + 4 * 2 * Sums::kElements;
  static_assert(kBytes <= 227 << 10);
};

struct Params {
  int r, rows, columns;  // F columns
  PassGrid grid;
  CUtensorMap gate_boxes, up_boxes, dh_boxes;
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

template <int kGroups, Activation kActivation>
struct Block {
  using S = Shape<kGroups>;
  static constexpr int kHalves = 2 * kGroups;                   // 8 ranks each
  static constexpr int kSCopies = S::kMatrices * S::kRank / 8;  // of 16 bytes, in a row
  static_assert(kPassRows * kSCopies <= kPassThreads);

  const Params& x;
  typename S::Pipe pipe;
  Bf16* s_tiles;    // kStages
  float* sums;      // two
  int strip_begin;  // in gate, up and dh
  // Of this warp and thread: (column, column + 8; rank, rank + 1) of each 16 columns and 8 ranks;
  // and B, whose rows are columns of the tile.
  float gradient[S::kMatrices][S::kWarpBlocks][kHalves][4];
  uint32_t b[2][S::kWarpBlocks][kHalves][2];

  // Of even and odd tiles.
  __device__ typename S::Sums SumsOf(int tile) const {
    return {sums + tile % 2 * S::Sums::kElements};
  }
  __device__ int Column() const { return threadIdx.x / 32 * S::kWarpColumns; }
  // Whether the warp's block k of 16 columns is behind the last one.
  __device__ bool Beyond(int k) const { return strip_begin + Column() + k * 16 >= x.columns; }

  __device__ auto StripOf(int strip) const {
    const int column = strip * S::kColumns;
    return StripBoxes<kTiles, 2>{{&x.gate_boxes, &x.up_boxes, &x.dh_boxes},
                                 {&x.gate_boxes, &x.up_boxes},
                                 column,
                                 BoxesIn(column, S::kColumns, x.columns)};
  }

  __device__ void AwaitAhead() const { WaitForCopies<0>(); }
  __device__ void CopyAhead(int tile, int behind) const {
    if (tile < behind) LoadS(tile, pipe.Next());
  }
  __device__ void LoadS(int tile, int stage) const {
    const int row_begin = tile * kPassRows, thread = threadIdx.x;
    if (thread < kPassRows * kSCopies) {
      const int row = thread / kSCopies, c = thread % kSCopies * 8;
      const int matrix = c / S::kRank, rank = c % S::kRank;
      const bool any = row_begin + row < x.rows && rank < x.r;
      const Bf16* from = matrix == kDown
                             ? x.down_ds + (row_begin + row) * x.down_ds_stride + rank
                             : x.s + (row_begin + row) * x.s_stride + matrix * x.r + rank;
      CopyOrZero(SharedAddress(s_tiles + stage * S::kSElements + row * S::kSPitch + c),
                 any ? from : x.s, any);
    }
    CommitCopies();
  }

  __device__ void Begin(int strip, int first, int) {
    strip_begin = strip * S::kColumns;
    LoadS(first, pipe.stage);
    const int lane = threadIdx.x % 32;
    const int n0 = strip_begin + Column() + lane % 4 * 2, c0 = lane / 4;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const auto value = [&](int n, int c) {
        return n < x.columns && c < x.r ? x.b[p][n * x.b_stride[p] + c] : FromFloat<Bf16>(0.0f);
      };
#pragma unroll
      for (int k = 0; k < S::kWarpBlocks; ++k) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int n = n0 + k * 16 + i * 8, c = c0 + half * 8;
            b[p][k][half][i] = PairOf(value(n, c), value(n + 1, c));
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < S::kMatrices; ++m) {
#pragma unroll
      for (int k = 0; k < S::kWarpBlocks; ++k) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) gradient[m][k][half][i] = 0.0f;
        }
      }
    }
  }

  __device__ void End(int slot) const {
    const int lane = threadIdx.x % 32;
    float* to = x.matrix_sums + int64_t{slot} * S::kMatrices * S::kColumns * S::kRank;
    to += (Column() + lane / 4) * S::kRank + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < S::kMatrices; ++m) {
#pragma unroll
      for (int k = 0; k < S::kWarpBlocks; ++k) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const float(&sum)[4] = gradient[m][k][half];
          float* pair = to + (m * S::kColumns + k * 16) * S::kRank + half * 8;
          *reinterpret_cast<float2*>(pair) = make_float2(sum[0], sum[1]);
          *reinterpret_cast<float2*>(pair + 8 * S::kRank) = make_float2(sum[2], sum[3]);
        }
      }
    }
  }

  // += v^T s of 16 rows and of the warp's columns, where `v_tile` has them.
  template <int kMatrix>
  __device__ void AddGradient(const Bf16* v_tile, const Bf16* s_tile) {
    const int lane = threadIdx.x % 32;
    uint32_t s[kGroups][4];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      LoadTransposed(s[group], s_tile + lane % 16 * S::kSPitch + kMatrix * S::kRank + group * 16 +
                                   lane / 16 * 8);
    }
#pragma unroll
    for (int k = 0; k < S::kWarpBlocks; ++k) {
      if (Beyond(k)) break;
      uint32_t v[4];
      LoadTransposed(v, v_tile + S::Pipe::Place(lane / 16 * 8 + lane % 8,
                                                Column() + k * 16 + lane / 8 % 2 * 8));
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        MultiplyAdd(gradient[kMatrix][k][2 * group], v, s[group][0], s[group][1]);
        MultiplyAdd(gradient[kMatrix][k][2 * group + 1], v, s[group][2], s[group][3]);
      }
    }
  }

  __device__ void Multiply(int tile) {
    const typename S::Sums to = SumsOf(tile);
    const int lane = threadIdx.x % 32;
    const Bf16* s_tile = s_tiles + pipe.stage * S::kSElements;
    Bf16* gate_tile = pipe.Tile(pipe.stage, kGateTile);
    Bf16* up_tile = pipe.Tile(pipe.stage, kUpTile);
    Bf16* dh_tile = pipe.Tile(pipe.stage, kDhTile);
    float ds[2][kHalves][4] = {};
#pragma unroll
    for (int k = 0; k < S::kWarpBlocks; ++k) {
      if (Beyond(k)) break;
      const int at = S::Pipe::Place(lane % 16, Column() + k * 16 + lane / 16 * 8);
      uint32_t gate[4], up[4], dh[4];
      LoadMatrices(gate, gate_tile + at);
      LoadMatrices(up, up_tile + at);
      LoadMatrices(dh, dh_tile + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 g = PairAsFloats(gate[i]), u = PairAsFloats(up[i]), d = PairAsFloats(dh[i]);
        float2 slope;
        const float2 act = {Activate<kActivation>(g.x, &slope.x),
                            Activate<kActivation>(g.y, &slope.y)};
        gate[i] = RoundedPair({d.x * u.x * slope.x, d.y * u.y * slope.y});
        up[i] = RoundedPair({d.x * act.x, d.y * act.y});
        dh[i] = RoundedPair({act.x * u.x, act.y * u.y});
      }
      StoreMatrices(gate_tile + at, gate);
      StoreMatrices(up_tile + at, up);
      StoreMatrices(dh_tile + at, dh);  // h
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        MultiplyAdd(ds[kGate][half], gate, b[kGate][k][half][0], b[kGate][k][half][1]);
        MultiplyAdd(ds[kUp][half], up, b[kUp][k][half][0], b[kUp][k][half][1]);
      }
    }
    __syncwarp();
    AddGradient<kGate>(gate_tile, s_tile);
    AddGradient<kUp>(up_tile, s_tile);
    AddGradient<kDown>(dh_tile, s_tile);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) to.Put(p * S::kRank + half * 8, ds[p][half]);
    }
    FenceBulkCopies();
  }

  __device__ void StoreSums(int strip, int tile) const {
    float* to = x.ds_sums + static_cast<int64_t>(strip) * x.rows * 2 * S::kRank;
    SumsOf(tile).Store(tile * kPassRows, x.rows, to);
  }
};

template <int kGroups, Activation kActivation>
__global__ __launch_bounds__(kPassBlock, 1) void PassKernel(const __grid_constant__ Params x) {
  if constexpr (kSm90) {
    using S = Shape<kGroups>;
    extern __shared__ __align__(1024) unsigned char memory[];
    Bf16* s_tiles = reinterpret_cast<Bf16*>(memory + S::Pipe::kBytes);
    float* sums = reinterpret_cast<float*>(s_tiles + S::kStages * S::kSElements);
    Block<kGroups, kActivation> block{x, {memory}, s_tiles, sums};
    RunPass(x.grid, &block);
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
  const float* from = x.matrix_sums + (matrix * S::kColumns + n % S::kColumns) * S::kRank + c;
  const Pack<float, 4> sum = SumOfStrip<kSlotLanes>(x.grid, real ? n / S::kColumns : -1, from,
                                                    S::kMatrices * S::kColumns * S::kRank);
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
  x.gate_boxes = BoxesOf(gate, x.rows, x.columns, a.lora.dy.stride(0), kPassRows);
  x.up_boxes = BoxesOf(gate + x.columns, x.rows, x.columns, a.lora.dy.stride(0), kPassRows);
  x.dh_boxes = BoxesOf(Data<const Bf16>(a.dh), x.rows, x.columns, a.dh.stride(0), kPassRows);
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
  constexpr int kBytes = Shape<kGroups>::kBytes;
  CUDA_CHECK(cudaFuncSetAttribute(pass, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  LaunchEarly(exec.stream, {dim3(x.grid.blocks), dim3(kPassBlock), kBytes}, pass, x);
  LaunchBehind(exec, AddUpKernel<kGroups>, x, int64_t{x.rows} * (x.ds_columns / 4),
               int64_t{Shape<kGroups>::kMatrices} * x.columns * (x.r / 4));
}

}  // namespace

bool GatedLoraBackwardCuda(const Exec& exec, const GatedLoraBackwardArgs& a) {
  if (!HasSm90()) return false;
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
