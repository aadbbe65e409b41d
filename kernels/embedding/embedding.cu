#include <limits>

#include "kernels/core/cuda.cuh"
#include "kernels/core/philox.h"
#include "kernels/embedding/embedding.h"

namespace attune {
namespace {

// A warp takes kPacks times 32 packs of a token's row, all of which it reads before it writes.
constexpr int kPacks = 4;

template <typename T>
struct Forward {
  const int32_t* ids;
  const T* table;
  int64_t table_stride, vocabulary;
  Rows<T> y;
  int64_t columns;
  uint32_t tokens, across;  // warps to a row
  float scale;
};

template <typename T, int N>
__global__ __launch_bounds__(256) void ForwardKernel(const Forward<T> x) {
  const uint32_t unit = blockIdx.x * 8 + threadIdx.x / 32, row = unit / x.across;
  if (row >= x.tokens) return;
  const int64_t pack = int64_t{32} * kPacks * (unit - row * x.across) + threadIdx.x % 32;
  const int32_t id = x.ids[row];
  const bool known = 0 <= id && id < x.vocabulary;
  // Of an id that is not known, what is in its place is read, and dropped.
  const T* from = known ? x.table + id * x.table_stride : x.y(row, 0);
  Pack<T, N> v[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t c = (pack + 32 * k) * N;
    if (c < x.columns) v[k] = Pack<T, N>::Load(from + c);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t c = (pack + 32 * k) * N;
    if (c >= x.columns) break;
    for (int i = 0; i < N; ++i) v[k].Set(i, known ? v[k][i] * x.scale : 0.0f);
    v[k].Store(x.y(row, c));
  }
}

// A block of threads per token and kBackwardColumns columns. That of an id's first token sums its
// row, the others end at once. Ids go through shared memory, so that every thread looks at all.
constexpr int kBackwardColumns = 256;

template <typename T>
__global__ __launch_bounds__(kBackwardColumns) void BackwardKernel(
    const int32_t* ids, Rows<const T> dy, int64_t tokens, int64_t columns, float* dtable,
    int64_t table_stride, int64_t vocabulary, float scale, int64_t padding_id) {
  __shared__ int32_t near[kBackwardColumns];
  const int64_t first = blockIdx.x;
  const int32_t id = ids[first];
  if (id < 0 || id >= vocabulary || id == padding_id) return;
  bool earlier = false;
  for (int64_t t = threadIdx.x; t < first; t += kBackwardColumns) earlier |= ids[t] == id;
  if (__syncthreads_or(earlier)) return;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kBackwardColumns + threadIdx.x;
  float* place = dtable + id * table_stride + c;
  float sum = c < columns ? *place : 0.0f;
  for (int64_t begin = first; begin < tokens; begin += kBackwardColumns) {
    __syncthreads();
    near[threadIdx.x] = begin + threadIdx.x < tokens ? ids[begin + threadIdx.x] : -1;
    __syncthreads();
    if (c >= columns) continue;
    for (int i = 0; i < kBackwardColumns; ++i) {
      if (near[i] == id) sum = __fadd_rn(sum, __fmul_rn(scale, ToFloat(*dy(begin + i, c))));
    }
  }
  if (c < columns) *place = sum;
}

// A block of threads per token, a Philox block per thread and turn. Every product and sum is
// rounded on its own, as on the CPU.
template <typename T>
__global__ __launch_bounds__(256) void NoiseKernel(Rows<T> x, const int32_t* num_segments,
                                                   const int32_t* q_begin, const int32_t* step_pack,
                                                   int64_t columns, float alpha, uint32_t key0,
                                                   uint32_t key1) {
  const int64_t t = blockIdx.x;
  const int segments = *num_segments;
  if (segments <= 0 || t < q_begin[0] || t >= q_begin[segments]) return;
  int low = 0, high = segments;  // q_begin[low] <= t < q_begin[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (q_begin[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const float length = static_cast<float>(q_begin[low + 1] - q_begin[low]);
  const float size = __fdiv_rn(alpha, __fsqrt_rn(__fmul_rn(length, static_cast<float>(columns))));
  const int64_t begin = t * columns, end = begin + columns;
  for (int64_t block = begin / 4 + threadIdx.x; block * 4 < end; block += 256) {
    const uint32_t high_bits = static_cast<uint32_t>(block >> 32) & 0xffu;
    const PhiloxBlock drawn =
        Philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(step_pack[0]),
                     static_cast<uint32_t>(step_pack[1]), 0xffffff00u | high_bits}},
                   key0, key1);
    for (int w = 0; w < 4; ++w) {
      const int64_t element = block * 4 + w;
      if (element < begin || element >= end) continue;
      T* place = x(t, element - begin);
      const float u =
          __fsub_rn(__fmul_rn(__uint2float_rn(drawn.word[w]), 4.656612873077392578125e-10f), 1.0f);
      Pack<T, 1> value = Pack<T, 1>::Load(place);
      value.Set(0, __fadd_rn(value[0], __fmul_rn(size, u)));
      value.Store(place);
    }
  }
}

}  // namespace

void EmbeddingNoiseCuda(const Exec& exec, const EmbeddingNoiseArgs& a) {
  if (a.x.size() == 0) return;
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    NoiseKernel<T><<<static_cast<unsigned>(a.x.dim(0)), 256, 0, StreamOf(exec.stream)>>>(
        RowsOf<T>(a.x), Data<const int32_t>(a.num_segments), Data<const int32_t>(a.q_begin),
        Data<const int32_t>(a.step_pack), a.x.dim(1), static_cast<float>(a.alpha),
        static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
  });
  CUDA_CHECK(cudaGetLastError());
}

void EmbeddingBackwardCuda(const Exec& exec, const EmbeddingBackwardArgs& a) {
  if (a.dy.size() == 0) return;
  const int64_t T = a.dy.dim(0), C = a.dy.dim(1);
  const dim3 grid(static_cast<unsigned>(T),
                  static_cast<unsigned>((C + kBackwardColumns - 1) / kBackwardColumns));
  DispatchCudaFloat(a.dy.dtype, [&]<typename E>() {
    BackwardKernel<E><<<grid, kBackwardColumns, 0, StreamOf(exec.stream)>>>(
        Data<const int32_t>(a.ids), RowsOf<const E>(a.dy), T, C, Data<float>(a.dtable),
        a.dtable.stride(0), a.dtable.dim(0), static_cast<float>(a.scale), a.padding_id);
  });
  CUDA_CHECK(cudaGetLastError());
}

void EmbeddingForwardCuda(const Exec& exec, const EmbeddingForwardArgs& a) {
  DispatchCudaFloat(a.table.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      const int64_t tokens = a.y.dim(0), columns = a.y.dim(1);
      const int64_t across = (columns / N + 32 * kPacks - 1) / (32 * kPacks);
      const int64_t units = tokens * across;
      CHECK(units < std::numeric_limits<int32_t>::max());
      if (units == 0) return;
      ForwardKernel<T, N>
          <<<static_cast<unsigned>((units + 7) / 8), 256, 0, StreamOf(exec.stream)>>>(
              {Data<const int32_t>(a.ids), Data<const T>(a.table), a.table.stride(0),
               a.table.dim(0), RowsOf<T>(a.y), columns, static_cast<uint32_t>(tokens),
               static_cast<uint32_t>(across), static_cast<float>(a.scale)});
      CUDA_CHECK(cudaGetLastError());
    };
    if (Packable(kPackSize<T>, {&a.table, &a.y})) return run.template operator()<kPackSize<T>>();
    run.template operator()<1>();
  });
}

}  // namespace attune
