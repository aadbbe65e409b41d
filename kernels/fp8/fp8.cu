// fp8 on CUDA.
#include "kernels/fp8/fp8.cuh"

namespace attune {
namespace {

constexpr int kThreads = 256;

__device__ float Decode(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

struct TwoCodes {
  uint8_t high, low;
  __device__ explicit TwoCodes(float v) : high(Fp8Encode(v)), low(Fp8Encode(v - Decode(high))) {}
};

// ---- Rows of activations ----

constexpr int kHeld = 8;  // packs that a thread keeps from one reading to the other
constexpr int64_t kMostThreads = 1024;

template <typename T>
struct RowsToCodes {
  Rows<const T> x;
  Rows<uint8_t> q;
  float* scale;
  const float* room;
  int64_t rows;
  int k, e, extension;  // extension: Fp8Extension(e)

  __device__ float Share() const { return e > 0 ? __frcp_rn(*room) : 0.0f; }
};

// Of Fp8Quantize and Fp8QuantizeAdapter.
template <typename T, typename Args>
RowsToCodes<T> RowsToCodesOf(const Args& a) {
  return {RowsOf<const T>(a.x),
          RowsOf<uint8_t>(a.q),
          Data<float>(a.scale),
          a.e > 0 ? Data<const float>(a.room) : nullptr,
          a.x.dim(0),
          static_cast<int>(a.x.dim(1) - a.e),
          static_cast<int>(a.e),
          static_cast<int>(Fp8Extension(a.e))};
}

// The threads of a row put s behind its codes: this one those from `first`, `step` apart.
template <typename T>
__device__ void EncodeAdapter(const T* s, int e, int extension, float share, float inverse,
                              uint8_t* q, int first, int step) {
  for (int j = first; j < e; j += step) {
    const TwoCodes codes(__fmul_rn(__fmul_rn(ToFloat(s[j]), share), inverse));
    q[j] = q[2 * e + j] = codes.high;
    q[e + j] = codes.low;
  }
  for (int j = 3 * e + first; j < extension; j += step) q[j] = 0;
}

template <typename T>
__device__ float LargestOfAdapter(const T* s, int e, float share, int first, int step) {
  float largest = 0.0f;
  for (int j = first; j < e; j += step) largest = fmaxf(largest, fabsf(ToFloat(s[j])));
  return __fmul_rn(largest, share);
}

// A block of threads per row; with kShort one of its warps.
template <typename T, int N, bool kShort>
__global__ __launch_bounds__(kMostThreads) void QuantizeRowsKernel(
    const __grid_constant__ RowsToCodes<T> a) {
  AwaitEarlier();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const T* x = a.x(row, 0);
  uint8_t* q = a.q(row, 0);
  const int step = static_cast<int>(blockDim.x) * N, begin = static_cast<int>(threadIdx.x) * N;
  const int rest = begin + kHeld * step;
  Words<T, N> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = begin + i * step;
    held[i] = {};
    if (c < a.k) held[i] = Words<T, N>::Load(x + c);
  }
  const float share = a.Share();
  float largest = LargestOfAdapter(x + a.k, a.e, share, threadIdx.x, blockDim.x);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) largest = fmaxf(largest, held[i].Largest());
  for (int c = rest; c < a.k; c += step) {
    largest = fmaxf(largest, Words<T, N>::Load(x + c).Largest());
  }
  largest = kShort ? WarpMax(largest) : BlockMax(largest);
  const float scale = Fp8ScaleOf(largest), inverse = Fp8InverseOf(scale);
  if (threadIdx.x == 0) a.scale[row] = scale;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = begin + i * step;
    if (c < a.k) held[i].StoreFp8(inverse, q + c);
  }
  for (int c = rest; c < a.k; c += step) Words<T, N>::Load(x + c).StoreFp8(inverse, q + c);
  EncodeAdapter(x + a.k, a.e, a.extension, share, inverse, q + a.k, threadIdx.x, blockDim.x);
}

template <typename T, int N>
void QuantizeRows(const RowsToCodes<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int64_t wanted = (a.k / N + kHeld - 1) / kHeld;
  const auto threads =
      static_cast<unsigned>(std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, kMostThreads));
  if (threads == 32) {
    constexpr unsigned kRows = 4;
    const auto blocks = static_cast<unsigned>((a.rows + kRows - 1) / kRows);
    LaunchEarly(stream, {dim3(blocks), dim3(threads, kRows)}, QuantizeRowsKernel<T, N, true>, a);
  } else {
    LaunchEarly(stream, {dim3(static_cast<unsigned>(a.rows)), dim3(threads)},
                QuantizeRowsKernel<T, N, false>, a);
  }
}

// A warp per row.
template <typename T, int N>
__global__ __launch_bounds__(kThreads) void QuantizeAdapterKernel(
    const __grid_constant__ RowsToCodes<T> a) {
  AwaitEarlier();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.rows) return;
  const T* x = a.x(row, 0);
  uint8_t* q = a.q(row, 0);
  float scale = a.scale[row];
  const float share = a.Share();
  const float wanted = Fp8ScaleOf(WarpMax(LargestOfAdapter(x + a.k, a.e, share, lane, 32)));
  const bool again = wanted > scale;
  if (again) scale = wanted;
  const float inverse = Fp8InverseOf(scale);
  if (again) {  // seldom
    __syncwarp();
    if (lane == 0) a.scale[row] = scale;
    for (int c = lane * N; c < a.k; c += 32 * N) {
      Words<T, N>::Load(x + c).StoreFp8(inverse, q + c);
    }
  }
  EncodeAdapter(x + a.k, a.e, a.extension, share, inverse, q + a.k, lane, 32);
}

template <typename T, int N>
void QuantizeAdapter(const RowsToCodes<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const auto blocks = static_cast<unsigned>((a.rows + kThreads / 32 - 1) / (kThreads / 32));
  LaunchEarly(stream, {dim3(blocks), dim3(kThreads)}, QuantizeAdapterKernel<T, N>, a);
}

// Calls f.operator()<T, N>(rows).
template <typename Args, typename F>
void DispatchRowsToCodes(const Args& a, F&& f) {
  const TensorView x = a.x.Slice(1, 0, a.x.dim(1) - a.e), q = a.q.Slice(1, 0, x.dim(1));
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    constexpr int kPack = kPackSize<T>;
    const RowsToCodes<T> rows = RowsToCodesOf<T>(a);
    Packable(kPack, {&x, &q}) ? f.template operator()<T, kPack>(rows)
                              : f.template operator()<T, 1>(rows);
  });
}

// ---- Weights ----

template <typename T>
__global__ __launch_bounds__(kThreads) void WeightScaleKernel(Rows<const T> w, int64_t rows,
                                                              int64_t columns, float* scale) {
  float largest = 0.0f;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
      largest = fmaxf(largest, fabsf(ToFloat(*w(row, c))));
    }
  }
  largest = BlockMax(largest);
  if (threadIdx.x != 0) return;
  // Bits of floats that are not negative ascend as the floats do.
  const float wanted = fmaxf(__fdiv_rn(largest, kFp8WeightRange), kFp8LeastScale);
  atomicMax(reinterpret_cast<int*>(scale), __float_as_int(wanted));
}

__global__ __launch_bounds__(kThreads) void SpreadKernel(float* scale, int64_t n) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i > 0 && i < n) scale[i] = scale[0];
}

constexpr int kTile = 64;

template <typename T>
__global__ __launch_bounds__(kThreads) void QuantizeWeightKernel(Rows<const T> w, int64_t rows,
                                                                 int64_t columns,
                                                                 const float* scale,
                                                                 Rows<uint8_t> q, bool turned) {
  __shared__ uint8_t tile[kTile][kTile + 4];
  const float inverse = __frcp_rn(*scale);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int across = threadIdx.x % kTile;
  for (int down = threadIdx.x / kTile; down < kTile; down += kThreads / kTile) {
    const int64_t row = row0 + down, column = column0 + across;
    if (row >= rows || column >= columns) continue;
    const uint8_t code = Fp8Encode(__fmul_rn(ToFloat(*w(row, column)), inverse));
    if (turned) {
      tile[down][across] = code;
    } else {
      *q(row, column) = code;
    }
  }
  if (!turned) return;
  __syncthreads();
  for (int down = threadIdx.x / kTile; down < kTile; down += kThreads / kTile) {
    const int64_t row = row0 + across, column = column0 + down;
    if (row < rows && column < columns) *q(column, row) = tile[across][down];
  }
}

// ---- The adapter's room: a block of threads for each weight and direction ----

constexpr int kRoomBatch = 30;  // what 4 KiB of parameters hold

template <typename T>
struct Rooms {
  struct Entry {
    const T* a[kMaxLoraParts];
    const T* b[kMaxLoraParts];
    int64_t a_size, b_size[kMaxLoraParts];
    const float* scale;
    float* room;
    float factor;
    int parts;
  };
  Entry entry[kRoomBatch];
};
static_assert(sizeof(Rooms<float>) <= 4096);

// Of adjacent elements, by all threads of the block.
template <typename T>
__device__ float LargestOf(const T* x, int64_t n) {
  constexpr int N = kPackSize<T>;
  const int64_t packed = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? n / N * N : 0;
  float largest = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x * N; i < packed; i += kMostThreads * N) {
    largest = fmaxf(largest, Words<T, N>::Load(x + i).Largest());
  }
  for (int64_t i = packed + threadIdx.x; i < n; i += kMostThreads) {
    largest = fmaxf(largest, fabsf(ToFloat(x[i])));
  }
  return largest;
}

template <typename T>
__global__ __launch_bounds__(kMostThreads) void RoomKernel(const __grid_constant__ Rooms<T> rooms) {
  const typename Rooms<T>::Entry& x = rooms.entry[blockIdx.x];
  const bool beside_w = blockIdx.y == 0;
  float largest = 0.0f;
  for (int p = 0; p < x.parts; ++p) {
    largest =
        fmaxf(largest, beside_w ? LargestOf(x.b[p], x.b_size[p]) : LargestOf(x.a[p], x.a_size));
  }
  largest = BlockMax(largest);
  if (threadIdx.x != 0) return;
  if (beside_w) largest = __fmul_rn(fabsf(x.factor), largest);
  x.room[blockIdx.y] = Fp8RoomOf(largest, *x.scale);
}

template <typename T>
void FindRooms(std::span<const Fp8AdapterRoomArgs> all, cudaStream_t stream) {
  Rooms<T> rooms{};
  unsigned count = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const Fp8AdapterRoomArgs& a = all[i];
    typename Rooms<T>::Entry& x = rooms.entry[count++];
    x.parts = static_cast<int>(a.parts.size());
    for (int p = 0; p < x.parts; ++p) {
      x.a[p] = Data<const T>(a.parts[p].a);
      x.b[p] = Data<const T>(a.parts[p].b);
      x.b_size[p] = a.parts[p].b.size();
    }
    x.a_size = a.parts[0].a.size();
    x.scale = Data<const float>(a.scale);
    x.room = Data<float>(a.room);
    x.factor = static_cast<float>(a.factor);
    if (count < kRoomBatch && i + 1 < all.size()) continue;
    RoomKernel<T><<<dim3(count, 2), kMostThreads, 0, stream>>>(rooms);
    CUDA_CHECK(cudaGetLastError());
    count = 0;
  }
}

// ---- The adapter's share: a thread per kColumns adjacent columns of a row, of one part ----

template <typename T>
struct Extension {
  struct Part {
    const T* a;
    const T* b;
    int64_t begin, end;  // rows of W
  };
  Part part[kMaxLoraParts];
  uint32_t parts, r, columns;  // columns: Fp8Extension(parts * r)
  uint32_t threads;            // rows of q * parts * r / kColumns
  int64_t k;
  const float* scale;
  const float* room;
  Rows<uint8_t> q;
  bool turned;
  float factor;

  // Of column j of a part, beside a row of W or, turned, of W^T.
  __device__ float Value(const Part& x, int64_t row, uint32_t j) const {
    if (turned) return ToFloat(x.a[j * k + row]);
    if (row < x.begin || row >= x.end) return 0.0f;
    return __fmul_rn(factor, ToFloat(x.b[(row - x.begin) * r + j]));
  }
};

template <typename T, int kColumns>
__global__ __launch_bounds__(kThreads) void ExtendKernel(const __grid_constant__ Extension<T> x) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  if (thread >= x.threads) return;
  const uint32_t e = x.parts * x.r, row = thread / (e / kColumns);
  const uint32_t column = (thread - row * (e / kColumns)) * kColumns, part = column / x.r;
  const float inverse = __fmul_rn(*x.room, __frcp_rn(*x.scale));
  uint8_t* out = x.q(row, 0);
  Pack<uint8_t, kColumns> high, low;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const float v = x.Value(x.part[part], row, column - part * x.r + i);
    const TwoCodes codes(__fmul_rn(v, inverse));
    high.v[i] = codes.high;
    low.v[i] = codes.low;
  }
  high.Store(out + column);
  high.Store(out + e + column);
  low.Store(out + 2 * e + column);
  if (column > 0) return;
  for (uint32_t j = 3 * e; j < x.columns; ++j) out[j] = 0;
}

template <typename T>
void Extend(const Exec& exec, const Fp8ExtendArgs& a) {
  Extension<T> x{};
  x.parts = static_cast<uint32_t>(a.parts.size());
  for (uint32_t i = 0; i < x.parts; ++i) {
    const LoraExtendPart& part = a.parts[i];
    x.part[i] = {Data<const T>(part.a), Data<const T>(part.b), part.row_begin,
                 part.row_begin + part.b.dim(0)};
  }
  x.r = static_cast<uint32_t>(a.parts[0].a.dim(0));
  x.turned = a.transposed;
  const TensorView& out = a.q;
  x.columns = static_cast<uint32_t>(out.dim(1));
  x.k = a.parts[0].a.dim(1);
  x.scale = Data<const float>(a.scale);
  x.room = Data<const float>(a.room);
  x.q = RowsOf<uint8_t>(out);
  x.factor = static_cast<float>(a.factor);
  const bool fours = x.r % 4 == 0 && Packable(4, {&out});
  const int64_t threads = out.dim(0) * x.parts * x.r / (fours ? 4 : 1);
  CHECK(threads < int64_t{1} << 31);
  if (threads == 0) return;
  x.threads = static_cast<uint32_t>(threads);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  const cudaStream_t stream = StreamOf(exec.stream);
  fours ? ExtendKernel<T, 4><<<blocks, kThreads, 0, stream>>>(x)
        : ExtendKernel<T, 1><<<blocks, kThreads, 0, stream>>>(x);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void Fp8QuantizeCuda(const Exec& exec, const Fp8QuantizeArgs& a) {
  DispatchRowsToCodes(a, [&]<typename T, int N>(const RowsToCodes<T>& rows) {
    QuantizeRows<T, N>(rows, StreamOf(exec.stream));
  });
}

void Fp8QuantizeAdapterCuda(const Exec& exec, const Fp8QuantizeAdapterArgs& a) {
  DispatchRowsToCodes(a, [&]<typename T, int N>(const RowsToCodes<T>& rows) {
    QuantizeAdapter<T, N>(rows, StreamOf(exec.stream));
  });
}

void Fp8WeightScaleCuda(const Exec& exec, const Fp8WeightScaleArgs& a) {
  const int64_t n = a.scale.dim(0);
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(a.w.dim(0), 1, 1024));
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    WeightScaleKernel<T><<<blocks, kThreads, 0, StreamOf(exec.stream)>>>(
        RowsOf<const T>(a.w), a.w.dim(0), a.w.dim(1), Data<float>(a.scale));
  });
  CUDA_CHECK(cudaGetLastError());
  const unsigned spread = static_cast<unsigned>((n + kThreads - 1) / kThreads);
  SpreadKernel<<<spread, kThreads, 0, StreamOf(exec.stream)>>>(Data<float>(a.scale), n);
  CUDA_CHECK(cudaGetLastError());
}

void Fp8QuantizeWeightCuda(const Exec& exec, const Fp8QuantizeWeightArgs& a) {
  const int64_t N = a.w.dim(0), K = a.w.dim(1);
  if (N == 0 || K == 0) return;
  const dim3 grid(static_cast<unsigned>((K + kTile - 1) / kTile),
                  static_cast<unsigned>((N + kTile - 1) / kTile));
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    QuantizeWeightKernel<T><<<grid, kThreads, 0, StreamOf(exec.stream)>>>(
        RowsOf<const T>(a.w), N, K, Data<const float>(a.scale), RowsOf<uint8_t>(a.q), a.transposed);
  });
  CUDA_CHECK(cudaGetLastError());
}

void Fp8AdapterRoomCuda(const Exec& exec, std::span<const Fp8AdapterRoomArgs> all) {
  DispatchCudaFloat(all[0].parts[0].a.dtype,
                    [&]<typename T>() { FindRooms<T>(all, StreamOf(exec.stream)); });
}

void Fp8ExtendCuda(const Exec& exec, const Fp8ExtendArgs& a) {
  DispatchCudaFloat(a.parts[0].a.dtype, [&]<typename T>() { Extend<T>(exec, a); });
}

}  // namespace attune
