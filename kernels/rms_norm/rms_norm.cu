// RMSNorm on CUDA: a warp owns a short row, a block a long one, so every sum has a fixed order. The
// gradient of w goes through partial sums of fixed runs of rows (workspace), added up in order.
#include "kernels/core/cuda.cuh"
#include "kernels/fp8/fp8.cuh"
#include "kernels/rms_norm/rms_norm.h"

namespace attune {

// Runs of rows that the gradient of w is first summed over.
int64_t RmsNormWeightRuns(int64_t rows);

namespace {

constexpr int64_t kShortRow = 1024;  // elements; longer rows get a block
constexpr int kBlockThreads = 256;

// The row of this thread: blockDim is (threads per row, rows).
__device__ int64_t OwnRow() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// The sum over the threads of one row. In a block with several rows a row is one warp.
template <int kThreads>
__device__ float RowSum(float x) {
  if constexpr (kThreads == 32) return WarpSum(x);
  return BlockSum<kThreads>(x);
}

template <typename T, typename W>
struct Forward {
  Rows<const T> x, delta;
  Rows<T> sum, y;
  const W* w;
  float* rstd;
  int64_t rows, columns;
  float eps, offset;
};

template <typename T, typename W, int N, int kThreads>
__global__ __launch_bounds__(kBlockThreads) void ForwardKernel(Forward<T, W> a) {
  AwaitEarlier();
  const int64_t row = OwnRow();
  if (row >= a.rows) return;
  float squares = 0.0f;
  const bool add = a.delta.data != nullptr;
  for (int64_t c = threadIdx.x * N; c < a.columns; c += kThreads * N) {
    Pack<T, N> x = Pack<T, N>::Load(a.x(row, c));
    if (add) {
      const Pack<T, N> delta = Pack<T, N>::Load(a.delta(row, c));
      for (int i = 0; i < N; ++i) x.Set(i, x[i] + delta[i]);
      x.Store(a.sum(row, c));
    }
    for (int i = 0; i < N; ++i) squares += x[i] * x[i];
  }
  const float mean = RowSum<kThreads>(squares) / static_cast<float>(a.columns);
  const float rstd = 1.0f / sqrtf(mean + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  for (int64_t c = threadIdx.x * N; c < a.columns; c += kThreads * N) {
    // This thread wrote these elements of the sum.
    Pack<T, N> x = Pack<T, N>::Load(add ? a.sum(row, c) : a.x(row, c));
    const Pack<W, N> w = Pack<W, N>::Load(a.w + c);
    for (int i = 0; i < N; ++i) x.Set(i, x[i] * rstd * (w[i] + a.offset));
    x.Store(a.y(row, c));
  }
}

enum class Held { kForward, kForwardWithCodes, kRebuildWithCodes };

// The same for a row of which each thread can hold its kHeld packs: all is read before the sum. Or
// Rebuild; and the codes of y.
template <typename T, typename W, int N, int kThreads, int kHeld, Held kWhat>
__global__ __launch_bounds__(kBlockThreads) void HeldForwardKernel(Forward<T, W> a,
                                                                   Fp8RowsOut fp8) {
  constexpr bool kRebuild = kWhat == Held::kRebuildWithCodes;
  AwaitEarlier();
  const int64_t row = OwnRow();
  if (row >= a.rows) return;
  const auto column = [](int i) { return static_cast<int64_t>(i * kThreads + threadIdx.x) * N; };
  const bool add = !kRebuild && a.delta.data != nullptr;
  using P = Words<T, N>;
  P x[kHeld], delta[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = column(i);
    x[i] = {};
    if (c < a.columns) x[i] = P::Load(a.x(row, c));
    if (add && c < a.columns) delta[i] = P::Load(a.delta(row, c));
  }
  float rstd;
  if constexpr (kRebuild) {
    rstd = a.rstd[row];
  } else {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t c = column(i);
      if (add && c < a.columns) {
#pragma unroll
        for (int j = 0; j < P::kPairs; ++j) {
          const float2 own = x[i].Pair(j), more = delta[i].Pair(j);
          x[i].SetPair(j, {own.x + more.x, own.y + more.y});
        }
        x[i].Store(a.sum(row, c));
      }
#pragma unroll
      for (int j = 0; j < P::kPairs; ++j) {
        const float2 v = x[i].Pair(j);
        squares += v.x * v.x;
        squares += v.y * v.y;
      }
    }
    const float mean = RowSum<kThreads>(squares) / static_cast<float>(a.columns);
    rstd = 1.0f / sqrtf(mean + a.eps);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = column(i);
    if (c >= a.columns) continue;
    const Words<W, N> w = Words<W, N>::Load(a.w + c);
#pragma unroll
    for (int j = 0; j < P::kPairs; ++j) {
      const float2 v = x[i].Pair(j), g = w.Pair(j);
      x[i].SetPair(j, {v.x * rstd * (g.x + a.offset), v.y * rstd * (g.y + a.offset)});
    }
    x[i].Store(a.y(row, c));
    if constexpr (kWhat != Held::kForward) largest = fmaxf(largest, x[i].Largest());
  }
  if constexpr (kWhat == Held::kForward) return;
  const float scale = Fp8ScaleOf(kThreads == 32 ? WarpMax(largest) : BlockMax(largest));
  const float inverse = Fp8InverseOf(scale);
  if (threadIdx.x == 0) fp8.scale[row] = scale;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = column(i);
    if (c < a.columns) x[i].StoreFp8(inverse, fp8.q(row, c));
  }
}

template <typename T, typename W, int N>
struct Rebuild {
  static constexpr int kPack = N;
  Rows<const T> x;
  Rows<T> y;
  const W* w;
  const float* rstd;
  float offset;
  __device__ void operator()(int64_t row, int64_t c) const {
    Pack<T, N> v = Pack<T, N>::Load(x(row, c));
    const Pack<W, N> g = Pack<W, N>::Load(w + c);
    const float r = rstd[row];
    for (int i = 0; i < N; ++i) v.Set(i, v[i] * r * (g[i] + offset));
    v.Store(y(row, c));
  }
};

template <typename T, typename W>
struct Backward {
  Rows<const T> dy, x, dresidual;
  Rows<T> dx;
  const W* w;
  const float* rstd;
  int64_t rows, columns;
  float offset;
};

template <typename T, typename W, int N, int kThreads>
__global__ __launch_bounds__(kBlockThreads) void BackwardKernel(Backward<T, W> a) {
  AwaitEarlier();
  const int64_t row = OwnRow();
  if (row >= a.rows) return;
  float products = 0.0f;
  for (int64_t c = threadIdx.x * N; c < a.columns; c += kThreads * N) {
    const Pack<T, N> dy = Pack<T, N>::Load(a.dy(row, c)), x = Pack<T, N>::Load(a.x(row, c));
    const Pack<W, N> w = Pack<W, N>::Load(a.w + c);
    for (int i = 0; i < N; ++i) products += dy[i] * (w[i] + a.offset) * x[i];
  }
  const float rstd = a.rstd[row];
  const float mean = rstd * rstd * (RowSum<kThreads>(products) / static_cast<float>(a.columns));
  const bool residual = a.dresidual.data != nullptr;
  for (int64_t c = threadIdx.x * N; c < a.columns; c += kThreads * N) {
    const Pack<T, N> dy = Pack<T, N>::Load(a.dy(row, c)), x = Pack<T, N>::Load(a.x(row, c));
    const Pack<W, N> w = Pack<W, N>::Load(a.w + c);
    Pack<T, N> dx = residual ? Pack<T, N>::Load(a.dresidual(row, c)) : Pack<T, N>{};
    for (int i = 0; i < N; ++i) {
      const float norm = rstd * (dy[i] * (w[i] + a.offset) - x[i] * mean);
      dx.Set(i, residual ? norm + dx[i] : norm);
    }
    dx.Store(a.dx(row, c));
  }
}

// The same for a row of which each thread can hold its kHeld packs: all is read before the sum.
template <typename T, typename W, int N, int kThreads, int kHeld>
__global__ __launch_bounds__(kBlockThreads) void HeldBackwardKernel(Backward<T, W> a) {
  AwaitEarlier();
  const int64_t row = OwnRow();
  if (row >= a.rows) return;
  const auto column = [](int i) { return static_cast<int64_t>(i * kThreads + threadIdx.x) * N; };
  using P = Words<T, N>;
  P dy[kHeld] = {}, x[kHeld] = {}, dx[kHeld] = {};
  const bool residual = a.dresidual.data != nullptr;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = column(i);
    if (c >= a.columns) continue;
    dy[i] = P::Load(a.dy(row, c));
    x[i] = P::Load(a.x(row, c));
    if (residual) dx[i] = P::Load(a.dresidual(row, c));
  }
  const float rstd = a.rstd[row];
  // dy (w + offset) of a pair.
  const auto gradient = [&](const P& of, const Words<W, N>& w, int j) {
    const float2 d = of.Pair(j), own = w.Pair(j);
    return float2{d.x * (own.x + a.offset), d.y * (own.y + a.offset)};
  };
  float products = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = column(i);
    if (c >= a.columns) continue;
    const auto w = Words<W, N>::Load(a.w + c);
#pragma unroll
    for (int j = 0; j < P::kPairs; ++j) {
      const float2 g = gradient(dy[i], w, j), v = x[i].Pair(j);
      products += g.x * v.x;
      products += g.y * v.y;
    }
  }
  const float mean = rstd * rstd * (RowSum<kThreads>(products) / static_cast<float>(a.columns));
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = column(i);
    if (c >= a.columns) continue;
    const auto w = Words<W, N>::Load(a.w + c);
#pragma unroll
    for (int j = 0; j < P::kPairs; ++j) {
      const float2 g = gradient(dy[i], w, j), v = x[i].Pair(j), more = dx[i].Pair(j);
      const float2 norm = {rstd * (g.x - v.x * mean), rstd * (g.y - v.y * mean)};
      dx[i].SetPair(j, residual ? float2{norm.x + more.x, norm.y + more.y} : norm);
    }
    dx[i].Store(a.dx(row, c));
  }
}

// partial[run][c] = sum over the rows of a run, in ascending order.
template <typename T>
__global__ __launch_bounds__(kBlockThreads) void WeightRunsKernel(Rows<const T> dy, Rows<const T> x,
                                                                  const float* rstd, int64_t rows,
                                                                  int64_t columns, float* partial) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= columns) return;
  const int64_t length = (rows + gridDim.y - 1) / gridDim.y;
  const int64_t end = min((blockIdx.y + 1) * length, rows);
  float sum = 0.0f;
  for (int64_t m = blockIdx.y * length; m < end; ++m) {
    sum += ToFloat(*dy(m, c)) * (ToFloat(*x(m, c)) * rstd[m]);
  }
  partial[blockIdx.y * columns + c] = sum;
}

__global__ __launch_bounds__(kBlockThreads) void AddRunsKernel(const float* partial, int64_t runs,
                                                               int64_t columns, float* dw) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= columns) return;
  float sum = 0.0f;
  for (int64_t run = 0; run < runs; ++run) sum += partial[run * columns + c];
  dw[c] += sum;
}

// Calls f.operator()<T, W>() with the device types of x and w.
template <typename F>
void DispatchNorm(const TensorView& x, const TensorView& w, F&& f) {
  DispatchCudaFloat(x.dtype, [&]<typename T>() {
    if (w.dtype == x.dtype) return f.template operator()<T, T>();
    f.template operator()<T, float>();
  });
}

// Calls f.operator()<N, threads per row>(grid, block).
template <typename T, typename F>
void DispatchRows(int64_t rows, int64_t columns, bool packable, F&& f) {
  const auto shaped = [&]<int N>() {
    if (columns <= kShortRow) {
      const dim3 block(32, kBlockThreads / 32);
      f.template operator()<N, 32>(static_cast<unsigned>((rows + block.y - 1) / block.y), block);
    } else {
      f.template operator()<N, kBlockThreads>(static_cast<unsigned>(rows), dim3(kBlockThreads));
    }
  };
  if (packable) return shaped.template operator()<kPackSize<T>>();
  shaped.template operator()<1>();
}

template <typename T, typename W>
Forward<T, W> ForwardOf(const RmsNormForwardArgs& a) {
  return {RowsOf<const T>(a.x),
          RowsOf<const T>(a.delta),
          RowsOf<T>(a.sum),
          RowsOf<T>(a.y),
          Data<const W>(a.w),
          Data<float>(a.rstd),
          a.x.dim(0),
          a.x.dim(1),
          static_cast<float>(a.eps),
          static_cast<float>(a.weight_offset)};
}

// Calls f.operator()<threads per row, packs that a thread holds>(shape) and gives true; false where
// rows are too long for that. Sums have the order that they have where rows are longer: a warp's
// for short rows, else a block's.
template <int N, typename F>
bool DispatchHeld(int64_t rows, int64_t columns, F&& f) {
  const auto run = [&]<int kThreads, int kHeld>() {
    constexpr unsigned kRows = kBlockThreads / kThreads;
    f.template operator()<kThreads, kHeld>(LaunchShape{
        dim3(static_cast<unsigned>((rows + kRows - 1) / kRows)), dim3(kThreads, kRows)});
    return true;
  };
  if (columns <= kShortRow) return columns <= 32 * 4 * N && run.template operator()<32, 4>();
  if (columns <= kBlockThreads * 2 * N) return run.template operator()<kBlockThreads, 2>();
  return columns <= kBlockThreads * 4 * N && run.template operator()<kBlockThreads, 4>();
}

// False where rows are too long, or cannot be read in packs.
template <Held kWhat, typename T, typename W>
bool RunHeld(const Exec& exec, const RmsNormForwardArgs& a) {
  constexpr int N = kPackSize<T>;
  if (kWhat != Held::kForward && !Fp8Packable(N, a.fp8)) return false;
  if (!Packable(N, {&a.x, &a.delta, &a.sum, &a.y, &a.w})) return false;
  return DispatchHeld<N>(
      a.x.dim(0), a.x.dim(1), [&]<int kThreads, int kHeld>(const LaunchShape& shape) {
        LaunchEarly(exec.stream, shape, HeldForwardKernel<T, W, N, kThreads, kHeld, kWhat>,
                    ForwardOf<T, W>(a),
                    kWhat == Held::kForward ? Fp8RowsOut{} : Fp8RowsOutOf(a.fp8));
      });
}

template <typename T, typename W>
void RunForward(const Exec& exec, const RmsNormForwardArgs& a) {
  if (a.fp8.defined() && RunHeld<Held::kForwardWithCodes, T, W>(exec, a)) return;
  if (!RunHeld<Held::kForward, T, W>(exec, a)) {
    const Forward<T, W> args = ForwardOf<T, W>(a);
    DispatchRows<T>(
        args.rows, args.columns, Packable(kPackSize<T>, {&a.x, &a.delta, &a.sum, &a.y, &a.w}),
        [&]<int N, int kThreads>(unsigned grid, dim3 block) {
          LaunchEarly(exec.stream, {dim3(grid), block}, ForwardKernel<T, W, N, kThreads>, args);
        });
  }
  if (a.fp8.defined()) Fp8QuantizeCuda(exec, Fp8QuantizeOf(a.y, a.fp8));
}

template <typename T, typename W>
void RunRebuild(const Exec& exec, const RmsNormRebuildArgs& a) {
  const RmsNormForwardArgs forward{
      .x = a.x, .w = a.w, .y = a.y, .rstd = a.rstd, .weight_offset = a.weight_offset, .fp8 = a.fp8};
  if (a.fp8.defined() && RunHeld<Held::kRebuildWithCodes, T, W>(exec, forward)) return;
  const auto run = [&]<int N>() {
    ForEachPack(Rebuild<T, W, N>{RowsOf<const T>(a.x), RowsOf<T>(a.y), Data<const W>(a.w),
                                 Data<const float>(a.rstd), static_cast<float>(a.weight_offset)},
                a.x.dim(0), a.x.dim(1), exec.stream);
  };
  Packable(kPackSize<T>, {&a.x, &a.y, &a.w}) ? run.template operator()<kPackSize<T>>()
                                             : run.template operator()<1>();
  if (a.fp8.defined()) Fp8QuantizeCuda(exec, Fp8QuantizeOf(a.y, a.fp8));
}

template <typename T>
void RunWeightGradient(const Exec& exec, const RmsNormBackwardArgs& a) {
  const int64_t M = a.x.dim(0), C = a.x.dim(1), runs = RmsNormWeightRuns(M);
  const unsigned width = static_cast<unsigned>((C + kBlockThreads - 1) / kBlockThreads);
  float* partial = static_cast<float*>(a.workspace.data);
  WeightRunsKernel<T>
      <<<dim3(width, static_cast<unsigned>(runs)), kBlockThreads, 0, StreamOf(exec.stream)>>>(
          RowsOf<const T>(a.dy), RowsOf<const T>(a.x), Data<const float>(a.rstd), M, C, partial);
  CUDA_CHECK(cudaGetLastError());
  AddRunsKernel<<<width, kBlockThreads, 0, StreamOf(exec.stream)>>>(partial, runs, C,
                                                                    Data<float>(a.dw));
  CUDA_CHECK(cudaGetLastError());
}

template <typename T, typename W>
void RunBackward(const Exec& exec, const RmsNormBackwardArgs& a) {
  if (a.dw.defined()) RunWeightGradient<T>(exec, a);
  const Backward<T, W> args{RowsOf<const T>(a.dy),
                            RowsOf<const T>(a.x),
                            RowsOf<const T>(a.dresidual),
                            RowsOf<T>(a.dx),
                            Data<const W>(a.w),
                            Data<const float>(a.rstd),
                            a.x.dim(0),
                            a.x.dim(1),
                            static_cast<float>(a.weight_offset)};
  constexpr int kPack = kPackSize<T>;
  const bool packable = Packable(kPack, {&a.dy, &a.x, &a.dresidual, &a.dx, &a.w});
  const auto held = [&]<int kThreads, int kHeld>(const LaunchShape& shape) {
    LaunchEarly(exec.stream, shape, HeldBackwardKernel<T, W, kPack, kThreads, kHeld>, args);
  };
  if (packable && DispatchHeld<kPack>(args.rows, args.columns, held)) return;
  DispatchRows<T>(
      args.rows, args.columns, packable, [&]<int N, int kThreads>(unsigned grid, dim3 block) {
        LaunchEarly(exec.stream, {dim3(grid), block}, BackwardKernel<T, W, N, kThreads>, args);
      });
}

}  // namespace

void RmsNormForwardCuda(const Exec& exec, const RmsNormForwardArgs& a) {
  if (a.x.size() == 0) return;
  DispatchNorm(a.x, a.w, [&]<typename T, typename W>() { RunForward<T, W>(exec, a); });
}

void RmsNormRebuildCuda(const Exec& exec, const RmsNormRebuildArgs& a) {
  if (a.x.size() == 0) return;
  DispatchNorm(a.x, a.w, [&]<typename T, typename W>() { RunRebuild<T, W>(exec, a); });
}

void RmsNormBackwardCuda(const Exec& exec, const RmsNormBackwardArgs& a) {
  if (a.x.size() == 0) return;
  DispatchNorm(a.x, a.w, [&]<typename T, typename W>() { RunBackward<T, W>(exec, a); });
}

}  // namespace attune
