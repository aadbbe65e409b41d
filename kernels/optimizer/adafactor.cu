// Adafactor on CUDA, in four passes over up to kBatch tensors:
//   sums of g^2 + eps of each tile's rows and columns   -> workspace
//   averages of rows and columns                        -> v_row, v_column; sums of v_row
//   sums of each tile's squared directions (and params) -> workspace
//   the update
// A warp has a tile. What all tiles gave is added up by each block of threads that needs it, in one
// order, in f64.
// Every product and sum of the rest is rounded on its own, as on the CPU.
#include <cmath>
#include <limits>

#include "kernels/optimizer/batches.cuh"
#include "kernels/optimizer/optimizer.h"
#include "kernels/optimizer/pieces.h"

namespace attune {
namespace {

constexpr int kThreads = kOptimizerThreads, kWarps = kThreads / 32;
constexpr int kBatch = 48;  // what 4 KiB of parameters hold
// A lane has columns 32 apart.
constexpr int kPerLane = AdafactorTiles::kColumns / 32;
static_assert(AdafactorTiles::kLines == kThreads);

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
  int32_t rows[kBatch];
  int32_t columns[kBatch];
  int32_t first_piece[kBatch];
  int count = 0;
  // Common to all; rounded from f64 once.
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, clip_threshold;
  bool scale_parameter;
  DeviceScalar grad_scale;

  __device__ AdafactorTiles Tiles(int t) const { return {rows[t], columns[t]}; }
};
static_assert(sizeof(AdafactorBatch) <= 4096);

// The tile of a warp of a tensor's `block`, and the columns of its thread. Without rows, if it is
// none of the tensor's.
struct Tile {
  int64_t index, across, down;  // which one, and where it is
  int64_t row, end;
  int64_t column[kPerLane];

  __device__ Tile(const AdafactorTiles& tiles, int64_t block)
      : index(block * kWarps + threadIdx.x / 32),
        across(index % tiles.across()),
        down(index / tiles.across()),
        row(down * tiles.tile_rows()),
        end(min(row + tiles.tile_rows(), tiles.rows)) {
    for (int k = 0; k < kPerLane; ++k) {
      column[k] = across * AdafactorTiles::kColumns + threadIdx.x % 32 + k * 32;
    }
  }
};

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
  const int t = TensorOf(b, blockIdx.x);
  const AdafactorTiles tiles = b.Tiles(t);
  const Tile tile(tiles, blockIdx.x - b.first_piece[t]);
  if (tile.index >= tiles.count()) return;
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  double* const row_sums = b.sums[t] + tile.across * tiles.rows;
  double of_column[kPerLane] = {};
#pragma unroll 4
  for (int64_t row = tile.row; row < tile.end; ++row) {
    const float* grad = b.grad[t] + row * tiles.columns;
    double of_row = 0.0;
    for (int k = 0; k < kPerLane; ++k) {
      if (tile.column[k] >= tiles.columns) continue;
      const float g = __fmul_rn(grad[tile.column[k]], grad_scale);
      const double square = static_cast<double>(__fadd_rn(__fmul_rn(g, g), b.eps));
      of_row += square;
      of_column[k] += square;
    }
    of_row = WarpSum(of_row);
    if (threadIdx.x % 32 == 0) row_sums[row] = of_row;
  }
  double* const column_sums = b.sums[t] + tiles.column_sums() + tile.down * tiles.columns;
  for (int k = 0; k < kPerLane; ++k) {
    if (tile.column[k] < tiles.columns) column_sums[tile.column[k]] = of_column[k];
  }
}

// v * beta2 + (1 - beta2) * mean, whose n numbers have sums of parts, `stride` apart.
__device__ float Average(const AdafactorBatch& b, float v, const double* sums, int64_t parts,
                         int64_t stride, int64_t n) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = 0; i < parts; ++i) sum += sums[i * stride];
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  return __fadd_rn(__fmul_rn(v, b.beta2), __fmul_rn(b.one_minus_beta2, mean));
}

// A thread per row, then a thread per column.
__global__ __launch_bounds__(kThreads) void AverageLines(const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b, blockIdx.x);
  const AdafactorTiles tiles = b.Tiles(t);
  double* const sums = b.sums[t];
  const int64_t piece = blockIdx.x - b.first_piece[t];
  if (piece < tiles.row_pieces()) {
    if (b.v_row[t] == nullptr) return;
    const int64_t row = piece * kThreads + threadIdx.x;
    float v = 0.0f;
    if (row < tiles.rows) {
      v = Average(b, b.v_row[t][row], sums + row, tiles.across(), tiles.rows, tiles.columns);
      b.v_row[t][row] = v;
    }
    const double sum = BlockSum<kThreads>(static_cast<double>(v));
    if (threadIdx.x == 0) sums[tiles.average_sums() + piece] = sum;
    return;
  }
  const int64_t column = (piece - tiles.row_pieces()) * kThreads + threadIdx.x;
  if (column >= tiles.columns) return;
  float* const v = b.v_column[t] + column;
  *v = Average(b, *v, sums + tiles.column_sums() + column, tiles.down(), tiles.columns, tiles.rows);
}

// u before it is clipped, of one tile, whose columns' factors it keeps. Made by all threads of a
// block.
class Direction {
 public:
  __device__ Direction(const AdafactorBatch& b, int t, const Tile& tile)
      : v_row_(b.v_row[t]), grad_scale_(static_cast<float>(b.grad_scale.Read(1.0))) {
    const AdafactorTiles tiles = b.Tiles(t);
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
  const int t = TensorOf(b, blockIdx.x);
  const AdafactorTiles tiles = b.Tiles(t);
  const Tile tile(tiles, blockIdx.x - b.first_piece[t]);
  const Direction direction(b, t, tile);
  if (tile.index >= tiles.count()) return;
  double directions = 0.0, params = 0.0;
#pragma unroll 4
  for (int64_t row = tile.row; row < tile.end; ++row) {
    const float factor = direction.RowFactor(row);
    for (int k = 0; k < kPerLane; ++k) {
      if (tile.column[k] >= tiles.columns) continue;
      const int64_t i = row * tiles.columns + tile.column[k];
      directions += Square(direction.Of(b.grad[t][i], factor, k));
      if (b.scale_parameter) params += Square(b.param[t][i]);
    }
  }
  directions = WarpSum(directions);
  params = WarpSum(params);
  if (threadIdx.x % 32 != 0) return;
  b.sums[t][tiles.direction_sums() + tile.index] = directions;
  b.sums[t][tiles.param_sums() + tile.index] = params;
}

__global__ __launch_bounds__(kThreads) void UpdateTiles(const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b, blockIdx.x);
  const AdafactorTiles tiles = b.Tiles(t);
  const Tile tile(tiles, blockIdx.x - b.first_piece[t]);
  const Direction direction(b, t, tile);
  const auto rms_of = [&](int64_t sums) {
    const double sum = SumOf(b.sums[t] + sums, tiles.count());
    return static_cast<float>(sqrt(sum / static_cast<double>(tiles.rows * tiles.columns)));
  };
  const float over = __fdiv_rn(rms_of(tiles.direction_sums()), b.clip_threshold);
  const float clip = over > 1.0f ? over : 1.0f;
  double lr = b.lr[t];
  if (b.scale_parameter) lr *= fmax(1e-3, static_cast<double>(rms_of(tiles.param_sums())));
  const float step = static_cast<float>(lr);
  const float decay = static_cast<float>(-b.weight_decay[t] * lr);
  float* const m = b.m[t];
#pragma unroll 4
  for (int64_t row = tile.row; row < tile.end; ++row) {
    const float factor = direction.RowFactor(row);
    for (int k = 0; k < kPerLane; ++k) {
      if (tile.column[k] >= tiles.columns) continue;
      const int64_t i = row * tiles.columns + tile.column[k];
      float u = __fmul_rn(__fdiv_rn(direction.Of(b.grad[t][i], factor, k), clip), step);
      if (m != nullptr) {
        u = __fadd_rn(__fmul_rn(m[i], b.beta1), __fmul_rn(b.one_minus_beta1, u));
        m[i] = u;
      }
      const float param = b.param[t][i];
      b.param[t][i] = __fsub_rn(__fadd_rn(param, __fmul_rn(decay, param)), u);
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
  const auto fill = [&](int i, const AdafactorTensor& t) {
    CHECK(t.param.dtype == DType::kF32 && "the CUDA backend keeps parameters in f32");
    const bool vector = t.param.rank == 1;
    const AdafactorTiles tiles = AdafactorTiles::Of(t.param);
    CHECK(std::max(tiles.rows, tiles.columns) <= std::numeric_limits<int32_t>::max());
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.v_row[i] = vector ? nullptr : Data<float>(t.v_row);
    b.v_column[i] = Data<float>(vector ? t.v_row : t.v_column);
    b.m[i] = a.beta1 > 0 ? Data<float>(t.m) : nullptr;
    b.sums[i] = sums;
    b.lr[i] = a.lr * t.lr_scale;
    b.weight_decay[i] = t.weight_decay;
    b.rows[i] = static_cast<int32_t>(tiles.rows);
    b.columns[i] = static_cast<int32_t>(tiles.columns);
    sums += tiles.sums();
    return std::max(AdafactorTiles::Ceil(tiles.count(), kWarps),
                    tiles.row_pieces() + tiles.column_pieces());
  };
  InBatches<kBatch>(&b, a.tensors, fill, [&](unsigned grid) {
    cudaStream_t stream = StreamOf(exec.stream);
    SumSquares<<<grid, kThreads, 0, stream>>>(b);
    AverageLines<<<grid, kThreads, 0, stream>>>(b);
    SumDirections<<<grid, kThreads, 0, stream>>>(b);
    UpdateTiles<<<grid, kThreads, 0, stream>>>(b);
  });
}

}  // namespace attune
