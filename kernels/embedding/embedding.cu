#include <limits>

#include "kernels/core/cuda.cuh"
#include "kernels/core/philox.h"
#include "kernels/embedding/embedding.h"
#include "kernels/fp8/fp8.cuh"

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
  AwaitEarlier();
  const int64_t pack = int64_t{32} * kPacks * (unit - row * x.across) + threadIdx.x % 32;
  const int32_t id = x.ids[row];
  const bool known = 0 <= id && id < x.vocabulary;
  const T* from = x.table + (known ? id : 0) * x.table_stride;
  using P = Words<T, N>;
  P v[kPacks] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t c = (pack + 32 * k) * N;
    if (known && c < x.columns) v[k] = P::Load(from + c);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t c = (pack + 32 * k) * N;
    if (c >= x.columns) break;
    if (x.scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < P::kPairs; ++i) {
        const float2 pair = v[k].Pair(i);
        v[k].SetPair(i, {pair.x * x.scale, pair.y * x.scale});
      }
    }
    v[k].Store(x.y(row, c));
  }
}

// A block of threads per token and kBackwardThreads packs of columns. That of an id's first token
// sums its row, the others end at once. It lists the id's tokens of a tile of ids, in order, and
// reads some of them before it adds.
constexpr int kBackwardThreads = 256, kTileIds = 1024, kAhead = 4;

template <typename T>
struct Backward {
  const int32_t* ids;
  Rows<const T> dy;
  int64_t tokens, columns;
  float* dtable;
  int64_t table_stride, vocabulary;
  float scale;
  int64_t padding_id;
};

// Of the tokens of a tile those that have the id, in `list`; their number.
struct TokensOfId {
  static constexpr int kWords = kTileIds / 32;
  uint32_t words[kWords];
  int16_t list[kTileIds];

  __device__ int Find(const int32_t* ids, int64_t begin, int64_t tokens, int32_t id) {
    __syncthreads();  // what was listed has been read
#pragma unroll
    for (int i = threadIdx.x; i < kTileIds; i += kBackwardThreads) {
      const bool match = begin + i < tokens && ids[begin + i] == id;
      const uint32_t word = __ballot_sync(0xffffffffu, match);
      if (i % 32 == 0) words[i / 32] = word;
    }
    __syncthreads();
    const int bit = threadIdx.x % 32;  // of a word, that the first warp's thread lists
    int count = 0;
    static_assert(kWords == 32);
    for (uint32_t left = __ballot_sync(0xffffffffu, words[bit] != 0); left != 0; left &= left - 1) {
      const int w = __ffs(static_cast<int>(left)) - 1;
      const uint32_t word = words[w];
      if (threadIdx.x < 32 && (word >> bit & 1) != 0) {
        list[count + __popc(word & ((1u << bit) - 1))] = static_cast<int16_t>(w * 32 + bit);
      }
      count += __popc(word);
    }
    __syncthreads();
    return count;
  }
};

template <typename T, int N>
__global__ __launch_bounds__(kBackwardThreads) void BackwardKernel(const Backward<T> x) {
  __shared__ TokensOfId found;
  const int64_t first = blockIdx.x;
  const int32_t id = x.ids[first];
  if (id < 0 || id >= x.vocabulary || id == x.padding_id) return;
  bool earlier = false;
  for (int64_t t = threadIdx.x; t < first; t += kBackwardThreads) earlier |= x.ids[t] == id;
  if (__syncthreads_or(earlier)) return;
  const int64_t c = (int64_t{blockIdx.y} * kBackwardThreads + threadIdx.x) * N;
  const bool any = c < x.columns;
  float* place = x.dtable + id * x.table_stride + c;
  Pack<float, N> sum{};
  if (any) sum = Pack<float, N>::Load(place);
  for (int64_t begin = first; begin < x.tokens; begin += kTileIds) {
    const int count = found.Find(x.ids, begin, x.tokens, id);
    for (int k = 0; any && k < count; k += kAhead) {
      Pack<T, N> dy[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (k + j < count) dy[j] = Pack<T, N>::Load(x.dy(begin + found.list[k + j], c));
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (k + j >= count) break;
        for (int i = 0; i < N; ++i) sum.v[i] = __fadd_rn(sum.v[i], __fmul_rn(x.scale, dy[j][i]));
      }
    }
  }
  if (any) sum.Store(place);
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
  DispatchCudaFloat(a.dy.dtype, [&]<typename E>() {
    const auto run = [&]<int N>() {
      constexpr int kColumns = kBackwardThreads * N;
      const dim3 grid(static_cast<unsigned>(T),
                      static_cast<unsigned>((C + kColumns - 1) / kColumns));
      BackwardKernel<E, N><<<grid, kBackwardThreads, 0, StreamOf(exec.stream)>>>(
          {Data<const int32_t>(a.ids), RowsOf<const E>(a.dy), T, C, Data<float>(a.dtable),
           a.dtable.stride(0), a.dtable.dim(0), static_cast<float>(a.scale), a.padding_id});
    };
    Packable(kPackSize<E>, {&a.dy, &a.dtable}) ? run.template operator()<kPackSize<E>>()
                                               : run.template operator()<1>();
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
      LaunchEarly(exec.stream, {dim3(static_cast<unsigned>((units + 7) / 8)), dim3(256)},
                  ForwardKernel<T, N>,
                  Forward<T>{Data<const int32_t>(a.ids), Data<const T>(a.table), a.table.stride(0),
                             a.table.dim(0), RowsOf<T>(a.y), columns, static_cast<uint32_t>(tokens),
                             static_cast<uint32_t>(across), static_cast<float>(a.scale)});
    };
    if (Packable(kPackSize<T>, {&a.table, &a.y})) return run.template operator()<kPackSize<T>>();
    run.template operator()<1>();
  });
}

}  // namespace attune
