// NormedGradient in one pass over x, on the tensor cores; and what is beside the product where that
// does not suit.
//
// A cluster of blocks has a strip of x's columns, each block an equal share of the rows. Tiles of x
// come by the tensor memory accelerator; those of ds through registers, where they are scaled. A
// warp has 32 columns, whose sums stay in registers to the end. Then the blocks of the cluster add
// theirs up, each some ranks, in the order of the blocks: nothing goes through a workspace, and the
// order of every sum hangs on T alone.
#include <limits>

#include "kernels/core/cluster.cuh"
#include "kernels/core/tensor_map.cuh"
#include "kernels/fp8/fp8.cuh"
#include "kernels/lora/normed_gradient.h"
#include "kernels/lora/normed_gradient_parts.h"

namespace attune {

bool NormedGradientCuda(const Exec& exec, const NormedGradientArgs& a);

namespace {

constexpr int kShares = 8;  // of the rows: blocks of a cluster
constexpr int kGradientWarps = 8, kGradientThreads = 32 * kGradientWarps;
constexpr int kWarpColumns = 32, kStripColumns = kGradientWarps * kWarpColumns;
constexpr int kTileRows = 64, kStages = 3;
// With fewer strips too many multiprocessors have nothing to do.
constexpr int kLeastStrips = 8;
constexpr int kMaxGroups = 4;

struct GradientParams {
  CUtensorMap x;
  const Bf16* ds;
  int64_t ds_stride;
  const float* rstd;
  const Bf16* w;
  float* da;
  int64_t da_stride;
  int rows, columns, ranks;
  float offset, scale;
};

// With kGroups times 16 ranks.
template <int kGroups>
struct GradientBlock {
  static constexpr int kRank = 16 * kGroups;
  static constexpr int kBoxElements = kTileRows * kBoxColumns;
  static constexpr int kTileElements = kTileRows * kStripColumns;
  // Rows of ds lie apart so that no two of eight share a bank, those of sums likewise.
  static constexpr int kDsPitch = kRank + 8, kSumPitch = kStripColumns + 4;
  static constexpr int kDsElements = kTileRows * kDsPitch;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kBytes = kBarrierBytes + 2 * (kStages * kTileElements + 2 * kDsElements);
  static_assert(4 * kRank * kSumPitch <= 2 * kStages * kTileElements);
  static_assert(kBytes <= 227 << 10);
  // Of 16 bytes each: of a tile of ds, and of this block's share of the sums, for each thread.
  static constexpr int kCopies = kTileRows * kRank / 8, kSums = kRank * kStripColumns / 4 / kShares;
  static constexpr int kThreadCopies = (kCopies + kGradientThreads - 1) / kGradientThreads;
  static constexpr int kThreadSums = (kSums + kGradientThreads - 1) / kGradientThreads;

  const GradientParams& x;
  unsigned char* memory;  // kBytes, at a multiple of 1024
  int strip_begin, boxes;
  int first, count;  // tiles
  Words<Bf16, 8> ds[kThreadCopies];
  float rstd[kThreadCopies];
  // (column, column + 8; rank, rank + 1) of twice 16 columns and of each 8 ranks.
  float sum[2][2 * kGroups][4];

  __device__ uint64_t* Full(int tile) const {
    return reinterpret_cast<uint64_t*>(memory) + tile % kStages;
  }
  __device__ Bf16* Tile(int tile) const {
    return reinterpret_cast<Bf16*>(memory + kBarrierBytes) + tile % kStages * kTileElements;
  }
  __device__ Bf16* DsTile(int tile) const {
    return reinterpret_cast<Bf16*>(memory + kBarrierBytes) + kStages * kTileElements +
           tile % 2 * kDsElements;
  }

  __device__ void Load(int tile) const {
    ExpectBytes(Full(tile), 2 * boxes * kBoxElements);
    for (int box = 0; box < boxes; ++box) {
      LoadBox(Tile(tile) + box * kBoxElements, x.x, (first + tile) * kTileRows,
              strip_begin + box * kBoxColumns, Full(tile));
    }
  }
  __device__ void LoadDs(int tile) {
#pragma unroll
    for (int k = 0; k < kThreadCopies; ++k) {
      const int at = static_cast<int>(threadIdx.x) + k * kGradientThreads;
      const int row = (first + tile) * kTileRows + at / (kRank / 8), c = at % (kRank / 8) * 8;
      const bool real = tile < count && at < kCopies && row < x.rows && c < x.ranks;
      ds[k] = {};
      rstd[k] = 0.0f;
      if (!real) continue;
      ds[k] = Words<Bf16, 8>::Load(x.ds + row * x.ds_stride + c);
      rstd[k] = x.rstd[row];
    }
  }
  __device__ void StoreDs(int tile) {
#pragma unroll
    for (int k = 0; k < kThreadCopies; ++k) {
      const int at = static_cast<int>(threadIdx.x) + k * kGradientThreads;
      if (at >= kCopies) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = ds[k].Pair(i);
        ds[k].SetPair(i, {rstd[k] * pair.x, rstd[k] * pair.y});
      }
      Bf16* to = DsTile(tile) + at / (kRank / 8) * kDsPitch + at % (kRank / 8) * 8;
      ds[k].words.Store(reinterpret_cast<uint32_t*>(to));
    }
  }

  __device__ void Multiply(int tile) {
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * kWarpColumns;
    // Rows 0-7, 0-7, 8-15, 8-15 of columns 0-7, 8-15, 0-7, 8-15; of ds across.
    const int down = lane / 16 * 8 + lane % 8, right = column % kBoxColumns + lane / 8 % 2 * 8;
    const Bf16* box = Tile(tile) + column / kBoxColumns * kBoxElements;
    const Bf16* ds_rows = DsTile(tile) + lane % 16 * kDsPitch + lane / 16 * 8;
#pragma unroll
    for (int row = 0; row < kTileRows; row += 16) {
      uint32_t s[kGroups][4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        LoadTransposed(s[group], ds_rows + row * kDsPitch + group * 16);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t columns[4];
        LoadTransposed(columns, box + BoxPlace(row + down, right + k * 16));
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          MultiplyAdd(sum[k][2 * group], columns, s[group][0], s[group][1]);
          MultiplyAdd(sum[k][2 * group + 1], columns, s[group][2], s[group][3]);
        }
      }
    }
  }

  // What this block has summed up, in the place of the tiles, as (rank, column).
  __device__ float* Sums() const {
    return reinterpret_cast<float*>(memory + kBarrierBytes);
  }
  __device__ void PutSums() const {
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * kWarpColumns + lane / 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int half = 0; half < 2 * kGroups; ++half) {
        float* to = Sums() + (half * 8 + lane % 4 * 2) * kSumPitch + column + k * 16;
        to[0] = sum[k][half][0];
        to[kSumPitch] = sum[k][half][1];
        to[8] = sum[k][half][2];
        to[kSumPitch + 8] = sum[k][half][3];
      }
    }
  }
  __device__ void AddUp() const {
    const auto cluster = ThisCluster();
    Pack<float, 4> da[kThreadSums];
    Pack<Bf16, 4> w[kThreadSums];
    // Of this thread's sums in turn: f(k, rank, column in the strip).
    const auto for_each = [&](auto&& f) {
#pragma unroll
      for (int k = 0; k < kThreadSums; ++k) {
        const int at = static_cast<int>(threadIdx.x) + k * kGradientThreads;
        const int pack = static_cast<int>(cluster.block_rank()) * kSums + at;
        const int rank = pack / (kStripColumns / 4), column = pack % (kStripColumns / 4) * 4;
        if (at < kSums && rank < x.ranks && strip_begin + column < x.columns) f(k, rank, column);
      }
    };
    const auto place = [&](int rank, int column) {
      return x.da + rank * x.da_stride + strip_begin + column;
    };
    for_each([&](int k, int rank, int column) {
      da[k] = Pack<float, 4>::Load(place(rank, column));
      w[k] = Pack<Bf16, 4>::Load(x.w + strip_begin + column);
    });
    ClusterFence();
    ClusterArriveRelaxed();
    cluster.barrier_wait();
    for_each([&](int k, int rank, int column) {
      Pack<float, 4> whole{};
#pragma unroll
      for (int share = 0; share < kShares; ++share) {
        const float* from = cluster.map_shared_rank(Sums(), share);
        const auto part = Pack<float, 4>::Load(from + rank * kSumPitch + column);
        for (int i = 0; i < 4; ++i) whole.v[i] += part.v[i];
      }
      for (int i = 0; i < 4; ++i) da[k].v[i] += x.scale * (w[k][i] + x.offset) * whole.v[i];
      da[k].Store(place(rank, column));
    });
    ClusterArriveRelaxed();  // what was read has arrived; what is stored, none of the others reads
    cluster.barrier_wait();
  }

  __device__ void Run() {
    if (threadIdx.x == 0) PrefetchMap(x.x);
    if (threadIdx.x < kStages) InitBarrier(Full(static_cast<int>(threadIdx.x)), 1);
    FenceBarriers();
    __syncthreads();
    AwaitEarlier();
    if (threadIdx.x == 0) {
      for (int tile = 0; tile < min(count, kStages); ++tile) Load(tile);
    }
    LoadDs(0);
    StoreDs(0);
    LoadDs(1);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int half = 0; half < 2 * kGroups; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[k][half][i] = 0.0f;
      }
    }
    for (int tile = 0; tile < count; ++tile) {
      WaitFor(Full(tile), tile / kStages % 2);
      __syncthreads();  // the tile of ds is there, and the tile before has been read
      const int next = tile - 1 + kStages;
      if (threadIdx.x == 0 && tile > 0 && next < count) Load(next);
      Multiply(tile);
      StoreDs(tile + 1);
      LoadDs(tile + 2);
    }
    __syncthreads();
    PutSums();
    AddUp();
  }
};

template <int kGroups>
__global__ __launch_bounds__(kGradientThreads,
                             2) void GradientKernel(const __grid_constant__ GradientParams x) {
  if constexpr (kSm90) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int strip = static_cast<int>(blockIdx.x) / kShares, share = blockIdx.x % kShares;
    const int strip_begin = strip * kStripColumns;
    const int width = min(x.columns - strip_begin, kStripColumns);
    const int tiles = (x.rows + kTileRows - 1) / kTileRows;
    const int first = share * tiles / kShares, behind = (share + 1) * tiles / kShares;
    GradientBlock<kGroups> block{
        x, memory, strip_begin, (width + kBoxColumns - 1) / kBoxColumns, first, behind - first};
    block.Run();
  }
}

template <int kGroups>
void RunGradient(const Exec& exec, const NormedGradientArgs& a) {
  const int64_t T = a.x.dim(0), C = a.x.dim(1);
  const GradientParams x{BoxesOf(Data<const Bf16>(a.x), T, C, a.x.stride(0), kTileRows),
                         Data<const Bf16>(a.ds),
                         a.ds.stride(0),
                         Data<const float>(a.rstd),
                         Data<const Bf16>(a.w),
                         Data<float>(a.da),
                         a.da.stride(0),
                         static_cast<int>(T),
                         static_cast<int>(C),
                         static_cast<int>(a.ds.dim(1)),
                         static_cast<float>(a.weight_offset),
                         static_cast<float>(a.scale)};
  constexpr int kBytes = GradientBlock<kGroups>::kBytes;
  CUDA_CHECK(cudaFuncSetAttribute(GradientKernel<kGroups>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const auto strips = static_cast<unsigned>((C + kStripColumns - 1) / kStripColumns);
  LaunchEarly(exec.stream, {dim3(strips * kShares), dim3(kGradientThreads), kBytes, kShares},
              GradientKernel<kGroups>, x);
}

template <typename T, int N>
struct ScaleRowsOp {
  static constexpr int kPack = N;
  Rows<const T> x;
  const float* factor;
  Rows<T> y;
  __device__ void operator()(int64_t row, int64_t c) const {
    Pack<T, N> v = Pack<T, N>::Load(x(row, c));
    const float own = factor[row];
    for (int i = 0; i < N; ++i) v.Set(i, own * v[i]);
    v.Store(y(row, c));
  }
};

template <typename T, int N>
struct AddColumnsOp {
  static constexpr int kPack = N;
  Rows<const float> product;
  const T* w;
  Rows<float> da;
  float offset, scale;
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<float, N> p = Pack<float, N>::Load(product(row, c));
    const Pack<T, N> own = Pack<T, N>::Load(w + c);
    Pack<float, N> sum = Pack<float, N>::Load(da(row, c));
    for (int i = 0; i < N; ++i) sum.v[i] += scale * (own[i] + offset) * p[i];
    sum.Store(da(row, c));
  }
};

}  // namespace

void ScaleRowsCuda(const Exec& exec, const ScaleRowsArgs& a) {
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(
          ScaleRowsOp<T, N>{RowsOf<const T>(a.x), Data<const float>(a.factor), RowsOf<T>(a.y)},
          a.x.dim(0), a.x.dim(1), exec.stream);
    };
    Packable(kPackSize<T>, {&a.x, &a.y}) ? run.template operator()<kPackSize<T>>()
                                         : run.template operator()<1>();
  });
}

void AddColumnsCuda(const Exec& exec, const AddColumnsArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(AddColumnsOp<T, N>{RowsOf<const float>(a.product), Data<const T>(a.w),
                                     RowsOf<float>(a.da), static_cast<float>(a.offset),
                                     static_cast<float>(a.scale)},
                  a.da.dim(0), a.da.dim(1), exec.stream);
    };
    Packable(4, {&a.product, &a.w, &a.da}) ? run.template operator()<4>()
                                           : run.template operator()<1>();
  });
}

bool NormedGradientCuda(const Exec& exec, const NormedGradientArgs& a) {
  const int64_t T = a.x.dim(0), C = a.x.dim(1), J = a.ds.dim(1);
  if (!HasSm90() || a.x.dtype != DType::kBF16 || T == 0 || J == 0 || J > 16 * kMaxGroups ||
      T > std::numeric_limits<int32_t>::max() / 16 || C <= (kLeastStrips - 1) * kStripColumns)
    return false;
  if (!Packable(8, {&a.x, &a.ds}) || !Packable(4, {&a.w, &a.da})) return false;
  const OpTraceScope trace(exec, "NormedGradient");
  switch ((J + 15) / 16) {
    case 1:
      RunGradient<1>(exec, a);
      return true;
    case 2:
      RunGradient<2>(exec, a);
      return true;
    case 3:
      RunGradient<3>(exec, a);
      return true;
    default:
      RunGradient<4>(exec, a);
      return true;
  }
}

}  // namespace attune
