// Adafactor by clusters of blocks, a tensor each: the gradient is read once, and stays in shared
// memory as the passes go over it. What blocks give is added up by each of them, in one order, in
// f64.
#include <type_traits>

#include "kernels/core/cluster.cuh"
#include "kernels/core/early_launch.cuh"
#include "kernels/core/tensor_core.cuh"
#include "kernels/optimizer/adafactor.cuh"

namespace attune {
namespace {

constexpr int kThreads = kOptimizerThreads, kWarps = kThreads / 32;
constexpr int kPerLane = 8;           // elements of a unit that a lane has, 32 apart
constexpr int kUnit = 32 * kPerLane;  // columns of a row that a warp takes at once
constexpr int kRows = 4;              // after which rows lie to 16 bytes as before

// From global to shared memory, 16 bytes aligned.
__device__ void CopyBulk(float* to, const float* from, int bytes, uint64_t* arrived) {
  if constexpr (kSm90) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(SharedAddress(to)),
        "l"(from), "r"(bytes), "r"(SharedAddress(arrived))
        : "memory");
  }
}
__device__ void PrefetchBulk(const float* from, int bytes) {
  if constexpr (kSm90) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
  }
}

// Of n floats, those before the first 16 aligned bytes and those in them.
struct Aligned {
  int head, inner;
  __device__ Aligned(const float* x, int n)
      : head(min(n, static_cast<int>(-(reinterpret_cast<uintptr_t>(x) / 4) & 3))),
        inner((n - head) / 4 * 4) {}
};

// The columns of a block.
struct Strip {
  int rows, pitch;
  int64_t columns, begin;  // of the tensor; the block's first one
  int width;               // 0 if the block has none
  uint32_t lie;            // where in 16 bytes the strip's first element is, in floats
  float* data;
  double* row_sum;
  float *row, *column;  // factors

  __device__ Strip(const AdafactorStrip& strip, const float* grad, int rank, float* shared)
      : rows(strip.rows),
        pitch(strip.pitch()),
        columns(strip.columns),
        begin(int64_t{rank} * strip.width()),
        width(static_cast<int>(max(int64_t{0}, min(int64_t{strip.width()}, columns - begin)))),
        lie(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(grad + begin) / 4 % 4)),
        data(shared),
        row_sum(reinterpret_cast<double*>(data + rows * pitch)),
        row(reinterpret_cast<float*>(row_sum + rows)),
        column(row + rows) {}
  // The first element of a row.
  __device__ float* At(int r) const {
    return data + r * pitch +
           ((lie + static_cast<uint32_t>(r) * static_cast<uint32_t>(columns)) & 3);
  }
  __device__ int64_t Global(int r) const { return r * columns + begin; }
};

// Begins to load the gradient. Warps share the rows; each arrives at the barrier, and its bulk
// copies do. Elements beside whole 16 bytes, up to 3 at each end of a row, are loaded by a thread
// each.
__device__ void LoadGradient(const Strip& strip, const float* grad, const float* param,
                             uint64_t* arrived) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {
    int bytes = 0;
    for (int r = warp; r < strip.rows; r += kWarps) {
      bytes += 4 * Aligned(grad + strip.Global(r), strip.width).inner;
    }
    ExpectBytes(arrived, bytes);
    for (int r = warp; r < strip.rows; r += kWarps) {
      const float* const from = grad + strip.Global(r);
      const Aligned at(from, strip.width);
      if (at.inner > 0) CopyBulk(strip.At(r) + at.head, from + at.head, 4 * at.inner, arrived);
    }
    for (int r = warp; r < strip.rows; r += kWarps) {  // what the update will read
      const float* const from = param + strip.Global(r);
      const Aligned at(from, strip.width);
      if (at.inner > 0) PrefetchBulk(from + at.head, 4 * at.inner);
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < 8 * strip.rows; i += kThreads) {
    const int r = i / 8, k = i % 8;
    const float* const from = grad + strip.Global(r);
    const Aligned at(from, strip.width);
    const int c = k < 4 ? k : at.head + at.inner + k - 4;
    if (c < (k < 4 ? at.head : strip.width)) strip.At(r)[c] = from[c];
  }
}

__device__ float Inverse(float x) {
  return __fdiv_rn(1.0f, x);
}
__device__ float Average(const AdafactorBatch& b, float before, double mean) {
  return __fadd_rn(__fmul_rn(before, b.beta2),
                   __fmul_rn(b.one_minus_beta2, static_cast<float>(mean)));
}

// Averages of the squares' columns, and what rows have of them in this strip.
__device__ void SumSquares(const AdafactorBatch& b, const Strip& strip, float grad_scale,
                           bool has_rows, float* v_column) {
  const auto square = [&](float x) {
    const float g = __fmul_rn(x, grad_scale);
    return static_cast<double>(__fadd_rn(__fmul_rn(g, g), b.eps));
  };
  const double per_row = 1.0 / strip.rows;
  for (int c = static_cast<int>(threadIdx.x); c < strip.width; c += kThreads) {
    const float before = v_column[strip.begin + c];
    const float* at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = strip.At(r) + c;
    double sum = 0.0;
    int row = 0;
    for (; row + kRows <= strip.rows; row += kRows) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum += square(*at[r]);
        at[r] += kRows * strip.pitch;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) {
      if (row + r < strip.rows) sum += square(*at[r]);
    }
    const float average = Average(b, before, sum * per_row);
    v_column[strip.begin + c] = average;
    strip.column[c] = Inverse(__fsqrt_rn(average));
  }
  if (!has_rows) return;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < strip.rows; r += kWarps) {
    const float* const x = strip.At(r);
    double sum = 0.0;
#pragma unroll 4
    for (int c = static_cast<int>(threadIdx.x) % 32; c < strip.width; c += 32) sum += square(x[c]);
    sum = WarpSum(sum);
    if (threadIdx.x % 32 == 0) strip.row_sum[r] = sum;
  }
}

// What all threads of the cluster stored in shared memory before is seen by all of them behind.
template <typename Cluster>
__device__ void Meet(const Cluster& cluster) {
  ClusterFence();
  ClusterArriveRelaxed();
  cluster.barrier_wait();
}
template <typename Cluster>
__device__ double SumOver(const Cluster& cluster, double* x) {
  double sum = 0.0;
  for (unsigned rank = 0; rank < AdafactorStrip::kBlocks; ++rank) {
    sum += *cluster.map_shared_rank(x, rank);
  }
  return sum;
}

// Replaces the averages of rows before, which strip.row has, by the rows' factors.
template <typename Cluster>
__device__ void MakeRowFactors(const AdafactorBatch& b, const Cluster& cluster, const Strip& strip,
                               float* v_row) {
  double sum = 0.0;
  for (int r = static_cast<int>(threadIdx.x); r < strip.rows; r += kThreads) {
    const double squares = SumOver(cluster, strip.row_sum + r);
    const float average = Average(b, strip.row[r], squares / static_cast<double>(strip.columns));
    if (cluster.block_rank() == 0) v_row[r] = average;
    strip.row[r] = average;
    sum += static_cast<double>(average);
  }
  const float mean = static_cast<float>(BlockSum<kThreads>(sum) / strip.rows);
  for (int r = static_cast<int>(threadIdx.x); r < strip.rows; r += kThreads) {
    strip.row[r] = Inverse(__fsqrt_rn(__fdiv_rn(strip.row[r], mean)));
  }
}

// The units of a warp, one after the other.
class Units {
 public:
  __device__ explicit Units(const Strip& strip)
      : rows_(strip.width > 0 ? strip.rows : 0),
        across_(max(1, (strip.width + kUnit - 1) / kUnit)),
        row_(static_cast<int>(threadIdx.x) / 32 / across_),
        at_(static_cast<int>(threadIdx.x) / 32 % across_) {}
  __device__ bool Valid() const { return row_ < rows_; }
  __device__ void Next() {
    at_ += kWarps % across_;
    row_ += kWarps / across_ + (at_ >= across_ ? 1 : 0);
    if (at_ >= across_) at_ -= across_;
  }
  __device__ int row() const { return row_; }
  __device__ int first() const { return at_ * kUnit; }  // column
  __device__ int column() const { return first() + static_cast<int>(threadIdx.x) % 32; }

 private:
  int rows_, across_, row_, at_;
};
// Calls f(row, the lane's first column, lanes have all of kPerLane columns) for the units of a
// warp; the last argument is a constant.
template <typename F>
__device__ void ForEachUnit(const Strip& strip, const F& f) {
  for (Units unit(strip); unit.Valid(); unit.Next()) {
    if (unit.first() + kUnit <= strip.width) {
      f(unit.row(), unit.column(), std::true_type());
    } else {
      f(unit.row(), unit.column(), std::false_type());
    }
  }
}

// Makes directions, before they are clipped, of the gradient; returns the thread's sum of squares.
__device__ double MakeDirections(const Strip& strip, float grad_scale) {
  double sum = 0.0;
  ForEachUnit(strip, [&](int r, int c, auto whole) {
    float* const x = strip.At(r) + c;
    const float* const column = strip.column + c;
    const float row = strip.row[r];
    float u[kPerLane];
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const bool there = whole || c + 32 * k < strip.width;
      u[k] = there ? __fmul_rn(__fmul_rn(row, column[32 * k]), __fmul_rn(x[32 * k], grad_scale))
                   : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (whole || c + 32 * k < strip.width) x[32 * k] = u[k];
      sum += Square(u[k]);
    }
  });
  return sum;
}

__device__ double SumParams(const Strip& strip, const float* param) {
  double sum = 0.0;
  ForEachUnit(strip, [&](int r, int c, auto whole) {
    const float* const p = param + strip.Global(r) + c;
    float x[kPerLane];
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      x[k] = whole || c + 32 * k < strip.width ? p[32 * k] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) sum += Square(x[k]);
  });
  return sum;
}

// Updates parameters; those of a unit are loaded before the unit ahead of it is updated.
template <bool kMoment>
class Updates {
 public:
  __device__ Updates(const AdafactorBatch& b, int t, const Strip& strip)
      : b_(b), strip_(strip), param_(b.param[t]), m_(b.m[t]), unit_(strip) {
    Load();
  }
  __device__ void Run(float step, float decay) {
    while (unit_.Valid()) {
      const int r = unit_.row(), c = unit_.column();
      float param[kPerLane];
      [[maybe_unused]] float moment[kPerLane];
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        param[k] = next_param_[k];
        if constexpr (kMoment) moment[k] = next_moment_[k];
      }
      unit_.Next();
      Load();
      const float* const direction = strip_.At(r) + c;
      const int64_t first = strip_.Global(r) + c;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (c + 32 * k >= strip_.width) continue;
        float u = __fmul_rn(direction[32 * k], step);
        if constexpr (kMoment) {
          u = __fadd_rn(__fmul_rn(moment[k], b_.beta1), __fmul_rn(b_.one_minus_beta1, u));
          m_[first + 32 * k] = u;
        }
        const float p = param[k];
        param_[first + 32 * k] = __fsub_rn(__fadd_rn(p, __fmul_rn(decay, p)), u);
      }
    }
  }

 private:
  __device__ void Load() {
    if (!unit_.Valid()) return;
    const int c = unit_.column();
    const int64_t first = strip_.Global(unit_.row()) + c;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const bool there = c + 32 * k < strip_.width;
      next_param_[k] = there ? param_[first + 32 * k] : 0.0f;
      if constexpr (kMoment) next_moment_[k] = there ? m_[first + 32 * k] : 0.0f;
    }
  }

  const AdafactorBatch& b_;
  const Strip& strip_;
  float *param_, *m_;
  Units unit_;
  float next_param_[kPerLane], next_moment_[kMoment ? kPerLane : 1];
};

template <bool kMoment>
__device__ void Run(const AdafactorBatch& b) {
  extern __shared__ __align__(16) float shared[];
  __shared__ uint64_t arrived;
  __shared__ double sum[2];  // of the strip's directions, and params
  const auto cluster = ThisCluster();
  const int t = static_cast<int>(blockIdx.x) / AdafactorStrip::kBlocks;
  const AdafactorStrip shape{b.tiles[t].rows, b.tiles[t].columns};
  const float* const grad = b.grad[t];
  float *const param = b.param[t], *const v_row = b.v_row[t];
  const Strip strip(shape, grad, static_cast<int>(cluster.block_rank()), shared);
  if (threadIdx.x == 0) {
    InitBarrier(&arrived, kWarps);
    FenceBarriers();
  }
  __syncthreads();
  AwaitEarlier();
  LetNextStart();
  LoadGradient(strip, grad, param, &arrived);
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  for (int r = static_cast<int>(threadIdx.x); r < strip.rows; r += kThreads) {
    strip.row[r] = v_row == nullptr ? 1.0f : v_row[r];
  }
  __syncthreads();
  WaitFor(&arrived, 0);
  SumSquares(b, strip, grad_scale, v_row != nullptr, b.v_column[t]);
  if (v_row != nullptr) {
    Meet(cluster);
    MakeRowFactors(b, cluster, strip, v_row);
  }
  __syncthreads();
  const double directions = BlockSum<kThreads>(MakeDirections(strip, grad_scale));
  const double params = b.scale_parameter ? BlockSum<kThreads>(SumParams(strip, param)) : 0.0;
  Updates<kMoment> updates(b, t, strip);
  if (threadIdx.x == 0) {
    sum[0] = directions;
    sum[1] = params;
  }
  Meet(cluster);
  const auto rms_of = [&](double* of_strip) {
    const double all = SumOver(cluster, of_strip);
    return static_cast<float>(sqrt(all / (static_cast<double>(strip.rows) * strip.columns)));
  };
  const float over = __fdiv_rn(rms_of(sum), b.clip_threshold);
  const float clip = over > 1.0f ? over : 1.0f;
  double lr = b.lr[t];
  if (b.scale_parameter) lr *= fmax(1e-3, static_cast<double>(rms_of(sum + 1)));
  // Blocks end when none of them reads another one's sums any more.
  ClusterFence();
  ClusterArriveRelaxed();
  const float step = static_cast<float>(lr / clip);
  const float decay = static_cast<float>(-b.weight_decay[t] * lr);
  updates.Run(step, decay);
  cluster.barrier_wait();
}

template <bool kMoment>
__global__ __launch_bounds__(kThreads,
                             4) void AdafactorKernel(const __grid_constant__ AdafactorBatch b) {
  if constexpr (kSm90) Run<kMoment>(b);
}

}  // namespace

void LaunchAdafactorStrips(const AdafactorBatch& batch, unsigned blocks, int64_t bytes,
                           void* stream) {
  const auto kernel = batch.m[0] != nullptr ? AdafactorKernel<true> : AdafactorKernel<false>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
  LaunchEarly(stream,
              {dim3(blocks), dim3(kThreads), static_cast<size_t>(bytes), AdafactorStrip::kBlocks},
              kernel, batch);
}

}  // namespace attune
