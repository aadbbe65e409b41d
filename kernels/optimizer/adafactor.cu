// Adafactor on CUDA of tensors that no cluster of blocks holds (see adafactor_strips.cu), in four
// passes over up to AdafactorBatch::kMost of them:
//   sums of g^2 + eps of each tile's rows and columns   -> workspace
//   averages of rows and columns                        -> v_row, v_column; sums of v_row
//   sums of each tile's squared directions (and params) -> workspace
//   the update
// A warp has a tile. What all tiles gave is added up by each block of threads that needs it, in one
// order, in f64.
// Each pass starts while the one before ends. It lets the next one start after it has waited for
// the one before: so from the second pass on, what no pass writes before may be loaded at once.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

#include "kernels/optimizer/adafactor.cuh"
#include "kernels/optimizer/optimizer.h"
#include "kernels/optimizer/pieces.h"

namespace attune {
namespace {

constexpr int kThreads = kOptimizerThreads, kWarps = kThreads / 32;
// A lane has columns 32 apart.
constexpr int kPerLane = AdafactorTiles::kColumns / 32;
constexpr int kRows = 4;  // that are loaded at once, before any is stored
static_assert(AdafactorTiles::kLines == 32 && AdafactorTiles::kShares == kWarps);

// The tile of a warp of a tensor's `block`, and the columns of its thread. Without rows, if it is
// none of the tensor's.
struct Tile {
  int index, across, down;  // which one, and where it is
  int64_t row, end;
  int64_t column, columns;  // of the thread: `column` and those 32, 64.. behind it

  __device__ Tile(const AdafactorTiles& tiles, int block)
      : index(block * kWarps + static_cast<int>(threadIdx.x) / 32),
        across(index % tiles.across),
        down(index / tiles.across),
        row(static_cast<int64_t>(down) * tiles.tile_rows),
        end(min(row + tiles.tile_rows, static_cast<int64_t>(tiles.rows))),
        column(static_cast<int64_t>(across) * AdafactorTiles::kColumns + threadIdx.x % 32),
        columns(tiles.columns) {}
  __device__ bool Has(int k) const { return column + 32 * k < columns; }
};

// A lane's elements of kRows rows from `row` on; 0 where there are none.
struct Elements {
  float v[kRows][kPerLane];
};
__device__ Elements Load(const float* x, const Tile& tile, int64_t row) {
  Elements out;
  x += row * tile.columns + tile.column;
#pragma unroll
  for (int r = 0; r < kRows; ++r, x += tile.columns) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      out.v[r][k] = row + r < tile.end && tile.Has(k) ? x[32 * k] : 0.0f;
    }
  }
  return out;
}

// The sum of x[0, n), in every thread of the block.
__device__ double SumOf(const double* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += x[i];
  return BlockSum<kThreads>(sum);
}

// The sums over the warp of x[r], for r = lane / 8.
__device__ double SumOfRow(const double (&x)[kRows]) {
  const auto from = [](double value, int offset) {
    return __shfl_xor_sync(0xffffffffu, value, offset);
  };
  const bool lower = (threadIdx.x & 16) != 0, odd = (threadIdx.x & 8) != 0;
  // Each half of the warp goes on with two rows, each quarter with one.
  const double even_row = (lower ? x[2] : x[0]) + from(lower ? x[0] : x[2], 16);
  const double odd_row = (lower ? x[3] : x[1]) + from(lower ? x[1] : x[3], 16);
  double sum = (odd ? odd_row : even_row) + from(odd ? even_row : odd_row, 8);
  for (int offset = 4; offset > 0; offset /= 2) sum += from(sum, offset);
  return sum;
}

__global__ __launch_bounds__(kThreads) void SumSquares(const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const AdafactorTiles tiles = b.tiles[t];
  const Tile tile(tiles, static_cast<int>(blockIdx.x) - b.first_piece[t]);
  AwaitEarlier();
  LetNextStart();
  if (tile.index >= tiles.count()) return;
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  double* const row_sums = b.sums[t] + static_cast<int64_t>(tile.across) * tiles.rows;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double of_column[kPerLane] = {};
  Elements next = Load(b.grad[t], tile, tile.row);
  for (int64_t row = tile.row; row < tile.end; row += kRows) {
    const Elements grad = next;
    next = Load(b.grad[t], tile, row + kRows);
    double of_row[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const float g = __fmul_rn(grad.v[r][k], grad_scale);
        const bool there = row + r < tile.end && tile.Has(k);
        const double square = static_cast<double>(there ? __fadd_rn(__fmul_rn(g, g), b.eps) : 0.0f);
        of_row[r] += square;
        of_column[k] += square;
      }
    }
    const double sum = SumOfRow(of_row);
    if (lane % 8 == 0 && row + lane / 8 < tile.end) row_sums[row + lane / 8] = sum;
  }
  double* const column_sums =
      b.sums[t] + tiles.column_sums() + static_cast<int64_t>(tile.down) * tiles.columns;
  for (int k = 0; k < kPerLane; ++k) {
    if (tile.Has(k)) column_sums[tile.column + 32 * k] = of_column[k];
  }
}

// A warp makes the averages of 32 rows, or columns. Where many tiles have them, several warps of a
// block of threads share the sums.
__global__ __launch_bounds__(kThreads) void AverageLines(const __grid_constant__ AdafactorBatch b) {
  __shared__ double partial[kWarps][32];
  const int t = TensorOf(b.first_line, b.count, blockIdx.x);
  AwaitEarlier();
  LetNextStart();
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
      : v_row_(b.v_row[t]), tile_(tile), grad_scale_(static_cast<float>(b.grad_scale.Read(1.0))) {
    const AdafactorTiles tiles = b.tiles[t];
    if (v_row_ != nullptr) {
      const double sum = SumOf(b.sums[t] + tiles.average_sums(), tiles.row_pieces());
      mean_row_ = static_cast<float>(sum / static_cast<double>(tiles.rows));
    }
    for (int k = 0; k < kPerLane; ++k) {
      const float* const v = b.v_column[t] + tile.column + 32 * k;
      column_factor_[k] = tile.Has(k) ? Inverse(__fsqrt_rn(*v)) : 0.0f;
    }
  }
  // Makes the factors of rows from `row` on, one of the tile's after the other: those of 32 rows
  // at once, each in a lane. By all threads of a warp.
  __device__ void RowFactors(int64_t row, float (&factor)[kRows]) {
    const int at = static_cast<int>(row - tile_.row) % 32;
    if (at == 0) {
      const int64_t of_lane = row + threadIdx.x % 32;
      row_factor_ = v_row_ == nullptr || of_lane >= tile_.end
                        ? 1.0f
                        : Inverse(__fsqrt_rn(__fdiv_rn(v_row_[of_lane], mean_row_)));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) factor[r] = __shfl_sync(0xffffffffu, row_factor_, at + r);
  }
  __device__ float Of(float grad, float row_factor, int k) const {
    return __fmul_rn(__fmul_rn(row_factor, column_factor_[k]), __fmul_rn(grad, grad_scale_));
  }

 private:
  __device__ static float Inverse(float x) {
    return __fdiv_rn(1.0f, x);
  }

  const float* v_row_;
  const Tile& tile_;
  float grad_scale_, mean_row_ = 1.0f, row_factor_ = 1.0f;
  float column_factor_[kPerLane];
};

template <bool kParams>  // their squares, too
__global__ __launch_bounds__(kThreads) void SumDirections(
    const __grid_constant__ AdafactorBatch b) {
  // From the end: what the first pass read last is still in the L2 cache; the update then begins
  // with what is read last here.
  const int piece = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int t = TensorOf(b.first_piece, b.count, piece);
  const AdafactorTiles tiles = b.tiles[t];
  const Tile tile(tiles, piece - b.first_piece[t]);
  Elements next = Load(b.grad[t], tile, tile.row);
  AwaitEarlier();
  LetNextStart();
  Direction direction(b, t, tile);
  if (tile.index >= tiles.count()) return;
  double directions = 0.0, params = 0.0;
  for (int64_t row = tile.row; row < tile.end; row += kRows) {
    const Elements grad = next;
    next = Load(b.grad[t], tile, row + kRows);
    const Elements param = kParams ? Load(b.param[t], tile, row) : Elements{};
    float factor[kRows];
    direction.RowFactors(row, factor);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (row + r >= tile.end || !tile.Has(k)) continue;
        directions += Square(direction.Of(grad.v[r][k], factor[r], k));
        if constexpr (kParams) params += Square(param.v[r][k]);
      }
    }
  }
  directions = WarpSum(directions);
  if constexpr (kParams) params = WarpSum(params);
  if (threadIdx.x % 32 != 0) return;
  b.sums[t][tiles.direction_sums() + tile.index] = directions;
  if constexpr (kParams) b.sums[t][tiles.param_sums() + tile.index] = params;
}

template <bool kMoment>
__global__ __launch_bounds__(kThreads, kMoment ? 2 : 3) void UpdateTiles(
    const __grid_constant__ AdafactorBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const AdafactorTiles tiles = b.tiles[t];
  const Tile tile(tiles, static_cast<int>(blockIdx.x) - b.first_piece[t]);
  float* const m = b.m[t];
  Elements grad, param, moment;
  const auto load = [&](int64_t row) {
    grad = Load(b.grad[t], tile, row);
    param = Load(b.param[t], tile, row);
    if constexpr (kMoment) moment = Load(m, tile, row);
  };
  load(tile.row);
  AwaitEarlier();
  LetNextStart();
  Direction direction(b, t, tile);
  const auto rms_of = [&](int64_t sums) {
    const double sum = SumOf(b.sums[t] + sums, tiles.count());
    return static_cast<float>(sqrt(sum / (static_cast<double>(tiles.rows) * tiles.columns)));
  };
  const float over = __fdiv_rn(rms_of(tiles.direction_sums()), b.clip_threshold);
  const float clip = over > 1.0f ? over : 1.0f;
  double lr = b.lr[t];
  if (b.scale_parameter) lr *= fmax(1e-3, static_cast<double>(rms_of(tiles.param_sums())));
  const float step = static_cast<float>(lr / clip);
  const float decay = static_cast<float>(-b.weight_decay[t] * lr);
  for (int64_t row = tile.row; row < tile.end; row += kRows) {
    float factor[kRows];
    direction.RowFactors(row, factor);
    const int64_t first = row * tile.columns + tile.column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (row + r >= tile.end || !tile.Has(k)) continue;
        const int64_t i = first + r * tile.columns + 32 * k;
        const float p = param.v[r][k];
        float u = __fmul_rn(direction.Of(grad.v[r][k], factor[r], k), step);
        if constexpr (kMoment) {
          u = __fadd_rn(__fmul_rn(moment.v[r][k], b.beta1), __fmul_rn(b.one_minus_beta1, u));
          m[i] = u;
        }
        b.param[t][i] = __fsub_rn(__fadd_rn(p, __fmul_rn(decay, p)), u);
      }
    }
    load(row + kRows);
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
  // Up to so many bytes of strips: for four, two and one block of threads a multiprocessor.
  constexpr int64_t kHeld[] = {55 << 10, 111 << 10, 222 << 10};
  std::vector<AdafactorTensor> held[std::size(kHeld)], tiled;
  for (const AdafactorTensor& t : a.tensors) {
    const AdafactorTiles tiles = AdafactorTiles::Of(t.param);
    const int64_t bytes = AdafactorStrip{tiles.rows, tiles.columns}.bytes();
    const size_t fit = std::lower_bound(std::begin(kHeld), std::end(kHeld), bytes) - kHeld;
    const bool strips = HasSm90() && tiles.rows <= tiles.columns && fit < std::size(kHeld);
    (strips ? held[fit] : tiled).push_back(t);
  }

  AdafactorBatch b = NewBatch(a);
  double* sums = static_cast<double*>(a.workspace.data);
  int64_t lines = 0, bytes = 0;
  const auto fill = [&](int i, const AdafactorTensor& t) {
    CHECK(t.param.dtype == DType::kF32 && "the CUDA backend keeps parameters in f32");
    const bool vector = t.param.rank == 1;
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.v_row[i] = vector ? nullptr : Data<float>(t.v_row);
    b.v_column[i] = Data<float>(vector ? t.v_row : t.v_column);
    b.m[i] = a.beta1 > 0 ? Data<float>(t.m) : nullptr;
    b.lr[i] = a.lr * t.lr_scale;
    b.weight_decay[i] = t.weight_decay;
    b.tiles[i] = AdafactorTiles::Of(t.param);
    return b.tiles[i];
  };
  const auto fill_strips = [&](int i, const AdafactorTensor& t) {
    const AdafactorTiles tiles = fill(i, t);
    bytes = std::max(bytes, AdafactorStrip{tiles.rows, tiles.columns}.bytes());
    return tiles.count() > 0 ? AdafactorStrip::kBlocks : 0;
  };
  for (const std::vector<AdafactorTensor>& tensors : held) {
    InBatches<AdafactorBatch::kMost>(&b, tensors, fill_strips, [&](unsigned grid) {
      LaunchAdafactorStrips(b, grid, std::exchange(bytes, 0), exec.stream);
    });
  }
  const auto fill_tiles = [&](int i, const AdafactorTensor& t) {
    const AdafactorTiles tiles = fill(i, t);
    b.sums[i] = sums;
    b.first_line[i] = static_cast<int32_t>(lines);
    sums += tiles.sums();
    lines += tiles.row_blocks() + tiles.column_blocks();
    return AdafactorTiles::Ceil(tiles.count(), kWarps);
  };
  InBatches<AdafactorBatch::kMost>(&b, tiled, fill_tiles, [&](unsigned grid) {
    const unsigned line_grid = static_cast<unsigned>(std::exchange(lines, 0));
    LaunchEarly(exec.stream, {dim3(grid), dim3(kThreads)}, SumSquares, b);
    LaunchEarly(exec.stream, {dim3(line_grid), dim3(kThreads)}, AverageLines, b);
    LaunchEarly(exec.stream, {dim3(grid), dim3(kThreads)},
                a.scale_parameter ? SumDirections<true> : SumDirections<false>, b);
    LaunchEarly(exec.stream, {dim3(grid), dim3(kThreads)},
                a.beta1 > 0 ? UpdateTiles<true> : UpdateTiles<false>, b);
  });
}

}  // namespace attune
