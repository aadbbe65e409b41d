// Adafactor on CUDA, in four passes over up to kBatch tensors:
//   sums of g^2 + eps of each tile's rows and columns   -> workspace
//   averages of rows and columns                        -> v_row, v_column; sums of v_row
//   sums of each tile's squared directions (and params) -> workspace
//   the update
// A warp has a tile. What all tiles gave is added up by each block of threads that needs it, in one
// order, in f64.
// Every product and sum of the rest is rounded on its own, as on the CPU.
#include <cmath>
#include <utility>

#include "kernels/optimizer/batches.cuh"
#include "kernels/optimizer/optimizer.h"
#include "kernels/optimizer/pieces.h"

namespace attune {
namespace {

constexpr int kThreads = kOptimizerThreads, kWarps = kThreads / 32;
constexpr int kBatch = 350;  // what 32 KiB of parameters hold
// A lane has columns 32 apart.
constexpr int kPerLane = AdafactorTiles::kColumns / 32;
constexpr int kRows = 4;  // that are loaded at once, before any is stored
static_assert(AdafactorTiles::kLines == 32 && AdafactorTiles::kShares == kWarps);

// A vector is one row here, whose v is v_column; its v_row is null.
struct AdafactorBatch {
  float* param[kBatch];
  const float* grad[kBatch];
  float* v_row[kBatch];
  float* v_column[kBatch];
  float* m[kBatch];  // or null
  double* sums[kBatch];
  double lr[kBatch];
  double weight_decay[kBatch];
  AdafactorTiles tiles[kBatch];
  int32_t first_piece[kBatch];  // of the tiles
  int32_t first_line[kBatch];   // of the blocks that make averages
  int count = 0;
  // Common to all; rounded from f64 once.
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, clip_threshold;
  bool scale_parameter;
  DeviceScalar grad_scale;
};
static_assert(sizeof(AdafactorBatch) <= 32764);

// The tile of a warp of a tensor's `block`, and the columns of its thread. Without rows, if it is
// none of the tensor's.
struct Tile {
  int index, across, down;  // which one, and where it is
  int64_t row, end;
  int64_t column[kPerLane];

  __device__ Tile(const AdafactorTiles& tiles, int block)
      : index(block * kWarps + static_cast<int>(threadIdx.x) / 32),
        across(index % tiles.across),
        down(index / tiles.across),
        row(static_cast<int64_t>(down) * tiles.tile_rows),
        end(min(row + tiles.tile_rows, static_cast<int64_t>(tiles.rows))) {
    for (int k = 0; k < kPerLane; ++k) {
      column[k] = across * AdafactorTiles::kColumns + threadIdx.x % 32 + k * 32;
    }
  }
};

// A lane's elements of kRows rows from `row` on; 0 where there are none.
struct Elements {
  float v[kRows][kPerLane];
};
__device__ Elements Load(const float* x, const AdafactorTiles& tiles, const Tile& tile,
                         int64_t row) {
  Elements out;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const bool there = row + r < tile.end && tile.column[k] < tiles.columns;
      out.v[r][k] = there ? x[(row + r) * tiles.columns + tile.column[k]] : 0.0f;
    }
  }
  return out;
}

__device__ double Square(float x) {
  return static_cast<double>(x) * static_cast<double>(x);
}

// The sum of x[0, n), in every thread of the block.
__device__ double SumOf(const double* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += x[i];
  return BlockSum<kThreads>(sum);
}

__global__ __launch_bounds__(kThreads) void SumSquares(const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const AdafactorTiles tiles = b.tiles[t];
  const Tile tile(tiles, static_cast<int>(blockIdx.x) - b.first_piece[t]);
  if (tile.index >= tiles.count()) return;
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  double* const row_sums = b.sums[t] + static_cast<int64_t>(tile.across) * tiles.rows;
  double of_column[kPerLane] = {};
  for (int64_t row = tile.row; row < tile.end; row += kRows) {
    const Elements grad = Load(b.grad[t], tiles, tile, row);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= tile.end) break;
      double of_row = 0.0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (tile.column[k] >= tiles.columns) continue;
        const float g = __fmul_rn(grad.v[r][k], grad_scale);
        const double square = static_cast<double>(__fadd_rn(__fmul_rn(g, g), b.eps));
        of_row += square;
        of_column[k] += square;
      }
      of_row = WarpSum(of_row);
      if (threadIdx.x % 32 == 0) row_sums[row + r] = of_row;
    }
  }
  double* const column_sums =
      b.sums[t] + tiles.column_sums() + static_cast<int64_t>(tile.down) * tiles.columns;
  for (int k = 0; k < kPerLane; ++k) {
    if (tile.column[k] < tiles.columns) column_sums[tile.column[k]] = of_column[k];
  }
}

// A warp makes the averages of 32 rows, or columns. Where many tiles have them, several warps of a
// block of threads share the sums.
__global__ __launch_bounds__(kThreads) void AverageLines(const __grid_constant__ AdafactorBatch b) {
  __shared__ double partial[kWarps][32];
  const int t = TensorOf(b.first_line, b.count, blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const AdafactorTiles tiles = b.tiles[t];
  int64_t block = blockIdx.x - b.first_line[t];
  const bool of_rows = block < tiles.row_blocks();
  if (of_rows && b.v_row[t] == nullptr) return;
  if (!of_rows) block -= tiles.row_blocks();
  const int parts = of_rows ? tiles.across : tiles.down;
  const int shares = static_cast<int>(AdafactorTiles::Shares(parts)), share = warp % shares;
  const int64_t lines = of_rows ? tiles.rows : tiles.columns;
  const int64_t of_line = of_rows ? tiles.columns : tiles.rows;
  const int64_t piece = block * (kWarps / shares) + warp / shares;
  const int64_t line = piece * AdafactorTiles::kLines + lane;
  const double* const sums = b.sums[t] + (of_rows ? 0 : tiles.column_sums()) + line;
  double sum = 0.0;
  if (line < lines) {
#pragma unroll 8
    for (int i = share; i < parts; i += shares) sum += sums[i * lines];
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (share > 0 || piece * AdafactorTiles::kLines >= lines) return;
  for (int w = 1; w < shares; ++w) sum += partial[warp + w][lane];
  float average = 0.0f;
  if (line < lines) {
    float* const v = (of_rows ? b.v_row[t] : b.v_column[t]) + line;
    const float mean = static_cast<float>(sum / static_cast<double>(of_line));
    average = __fadd_rn(__fmul_rn(*v, b.beta2), __fmul_rn(b.one_minus_beta2, mean));
    *v = average;
  }
  if (!of_rows) return;
  sum = WarpSum(static_cast<double>(average));
  if (lane == 0) b.sums[t][tiles.average_sums() + piece] = sum;
}

// u before it is clipped, of one tile, whose columns' factors it keeps. Made by all threads of a
// block.
class Direction {
 public:
  __device__ Direction(const AdafactorBatch& b, int t, const Tile& tile)
      : v_row_(b.v_row[t]), grad_scale_(static_cast<float>(b.grad_scale.Read(1.0))) {
    const AdafactorTiles tiles = b.tiles[t];
    if (v_row_ != nullptr) {
      const double sum = SumOf(b.sums[t] + tiles.average_sums(), tiles.row_pieces());
      mean_row_ = static_cast<float>(sum / static_cast<double>(tiles.rows));
    }
    for (int k = 0; k < kPerLane; ++k) {
      const bool inside = tile.column[k] < tiles.columns;
      column_factor_[k] = inside ? Inverse(__fsqrt_rn(b.v_column[t][tile.column[k]])) : 0.0f;
    }
  }
  __device__ float RowFactor(int64_t row) const {
    return v_row_ == nullptr ? 1.0f : Inverse(__fsqrt_rn(__fdiv_rn(v_row_[row], mean_row_)));
  }
  __device__ float Of(float grad, float row_factor, int k) const {
    return __fmul_rn(__fmul_rn(row_factor, column_factor_[k]), __fmul_rn(grad, grad_scale_));
  }

 private:
  __device__ static float Inverse(float x) { return __fdiv_rn(1.0f, x); }

  const float* v_row_;
  float grad_scale_, mean_row_ = 1.0f;
  float column_factor_[kPerLane];
};

__global__ __launch_bounds__(kThreads) void SumDirections(
    const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const AdafactorTiles tiles = b.tiles[t];
  const Tile tile(tiles, static_cast<int>(blockIdx.x) - b.first_piece[t]);
  const Direction direction(b, t, tile);
  if (tile.index >= tiles.count()) return;
  double directions = 0.0, params = 0.0;
  for (int64_t row = tile.row; row < tile.end; row += kRows) {
    const Elements grad = Load(b.grad[t], tiles, tile, row);
    const Elements param = b.scale_parameter ? Load(b.param[t], tiles, tile, row) : Elements{};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= tile.end) break;
      const float factor = direction.RowFactor(row + r);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (tile.column[k] >= tiles.columns) continue;
        directions += Square(direction.Of(grad.v[r][k], factor, k));
        params += Square(param.v[r][k]);
      }
    }
  }
  directions = WarpSum(directions);
  params = WarpSum(params);
  if (threadIdx.x % 32 != 0) return;
  b.sums[t][tiles.direction_sums() + tile.index] = directions;
  b.sums[t][tiles.param_sums() + tile.index] = params;
}

template <bool kMoment>
__global__ __launch_bounds__(kThreads, kMoment ? 2 : 3) void UpdateTiles(
    const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const AdafactorTiles tiles = b.tiles[t];
  const Tile tile(tiles, static_cast<int>(blockIdx.x) - b.first_piece[t]);
  const Direction direction(b, t, tile);
  const auto rms_of = [&](int64_t sums) {
    const double sum = SumOf(b.sums[t] + sums, tiles.count());
    return static_cast<float>(sqrt(sum / (static_cast<double>(tiles.rows) * tiles.columns)));
  };
  const float over = __fdiv_rn(rms_of(tiles.direction_sums()), b.clip_threshold);
  const float clip = over > 1.0f ? over : 1.0f;
  double lr = b.lr[t];
  if (b.scale_parameter) lr *= fmax(1e-3, static_cast<double>(rms_of(tiles.param_sums())));
  const float step = static_cast<float>(lr);
  const float decay = static_cast<float>(-b.weight_decay[t] * lr);
  float* const m = b.m[t];
  for (int64_t row = tile.row; row < tile.end; row += kRows) {
    const Elements grad = Load(b.grad[t], tiles, tile, row);
    const Elements param = Load(b.param[t], tiles, tile, row);
    const Elements moment = kMoment ? Load(m, tiles, tile, row) : Elements{};
    float factor[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      factor[r] = row + r < tile.end ? direction.RowFactor(row + r) : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (row + r >= tile.end || tile.column[k] >= tiles.columns) continue;
        const int64_t i = (row + r) * tiles.columns + tile.column[k];
        const float p = param.v[r][k];
        float u = __fmul_rn(__fdiv_rn(direction.Of(grad.v[r][k], factor[r], k), clip), step);
        if constexpr (kMoment) {
          u = __fadd_rn(__fmul_rn(moment.v[r][k], b.beta1), __fmul_rn(b.one_minus_beta1, u));
          m[i] = u;
        }
        b.param[t][i] = __fsub_rn(__fadd_rn(p, __fmul_rn(decay, p)), u);
      }
    }
  }
}

AdafactorBatch NewBatch(const AdafactorArgs& a) {
  AdafactorBatch b{};
  const double beta2 = 1.0 - std::pow(static_cast<double>(a.step), -a.decay_rate);
  b.beta1 = static_cast<float>(a.beta1);
  b.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  b.beta2 = static_cast<float>(beta2);
  b.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  b.eps = static_cast<float>(a.eps);
  b.clip_threshold = static_cast<float>(a.clip_threshold);
  b.scale_parameter = a.scale_parameter;
  b.grad_scale = DeviceScalarOf(a.grad_scale);
  return b;
}

}  // namespace

void AdafactorCuda(const Exec& exec, const AdafactorArgs& a) {
  AdafactorBatch b = NewBatch(a);
  double* sums = static_cast<double*>(a.workspace.data);
  int64_t lines = 0;
  const auto fill = [&](int i, const AdafactorTensor& t) {
    CHECK(t.param.dtype == DType::kF32 && "the CUDA backend keeps parameters in f32");
    const bool vector = t.param.rank == 1;
    const AdafactorTiles tiles = AdafactorTiles::Of(t.param);
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.v_row[i] = vector ? nullptr : Data<float>(t.v_row);
    b.v_column[i] = Data<float>(vector ? t.v_row : t.v_column);
    b.m[i] = a.beta1 > 0 ? Data<float>(t.m) : nullptr;
    b.sums[i] = sums;
    b.lr[i] = a.lr * t.lr_scale;
    b.weight_decay[i] = t.weight_decay;
    b.tiles[i] = tiles;
    b.first_line[i] = static_cast<int32_t>(lines);
    sums += tiles.sums();
    lines += tiles.row_blocks() + tiles.column_blocks();
    return AdafactorTiles::Ceil(tiles.count(), kWarps);
  };
  InBatches<kBatch>(&b, a.tensors, fill, [&](unsigned grid) {
    const cudaStream_t stream = StreamOf(exec.stream);
    SumSquares<<<grid, kThreads, 0, stream>>>(b);
    AverageLines<<<static_cast<unsigned>(std::exchange(lines, 0)), kThreads, 0, stream>>>(b);
    SumDirections<<<grid, kThreads, 0, stream>>>(b);
    const auto update = a.beta1 > 0 ? UpdateTiles<true> : UpdateTiles<false>;
    update<<<grid, kThreads, 0, stream>>>(b);
  });
}

}  // namespace attune
