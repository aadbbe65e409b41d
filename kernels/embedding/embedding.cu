#include <algorithm>
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

// Ids fall into buckets, as many as make blocks for all multiprocessors at once: a block has the
// ids of a bucket and a strip of columns, a pack for each thread. It looks at all ids, lists the
// tokens of its own in the order of (id, token), and sums the rows of each id, the next one's
// beginning on its way. So no block waits for another, and nothing is left between two kernels.
constexpr int kBackwardThreads = 256, kBackwardBlocks = 4;  // of a multiprocessor
constexpr int kMostBuckets = 1024;
constexpr int kListed = 512;  // tokens at a time
constexpr int kLooks = 4;     // of four ids each, read at once
constexpr int kAhead = 8;     // rows of dy, read at once

template <typename T>
struct Backward {
  const int32_t* ids;
  Rows<const T> dy;
  int tokens;
  int64_t columns;
  float* dtable;
  int64_t table_stride, vocabulary;
  float scale;
  int64_t padding_id;
  uint32_t bucket_width;
};

// The tokens of a bucket, at first as they are found, then in order.
struct TokensOfBucket {
  int count;
  int2 found[kListed];                 // (id, token)
  int64_t row[kListed], sum[kListed];  // where dy's rows and dtable's begin
  int end[kListed];                    // of the run of equal ids

  // Ids are spread over 32 bits, of which a bucket has a range: less than its width for its ids.
  __device__ static uint32_t InRange(int32_t id, uint32_t range_begin) {
    return static_cast<uint32_t>(id) * 0x9e3779b1u - range_begin;
  }

  // Those of [begin, behind); more than kListed are only counted.
  template <typename T>
  __device__ int Find(const Backward<T>& x, int begin, int behind) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const uint32_t range_begin = blockIdx.y * x.bucket_width;
    const bool last = blockIdx.y == gridDim.y - 1;
    const uint32_t width = last ? 0u - range_begin : x.bucket_width;
    const auto note = [&](int t) {
      const int32_t id = x.ids[t];
      if (InRange(id, range_begin) >= width) return;
      if (id < 0 || id >= x.vocabulary || id == x.padding_id) return;
      const int at = atomicAdd(&count, 1);
      if (at < kListed) found[at] = {id, t};
    };
    __syncthreads();  // what was listed has been read
    if (thread == 0) count = 0;
    __syncthreads();
    int t = begin;
    if (reinterpret_cast<uintptr_t>(x.ids + begin) % sizeof(int4) == 0) {
      for (; behind - t >= kLooks * 4 * threads; t += kLooks * 4 * threads) {
        int4 four[kLooks];
        const int own = t + 4 * thread;
#pragma unroll
        for (int k = 0; k < kLooks; ++k) {
          four[k] = *reinterpret_cast<const int4*>(x.ids + own + k * 4 * threads);
        }
#pragma unroll
        for (int k = 0; k < kLooks; ++k) {
          const auto in_range = [&](int32_t id) { return InRange(id, range_begin); };
          const uint32_t nearest = min(min(in_range(four[k].x), in_range(four[k].y)),
                                       min(in_range(four[k].z), in_range(four[k].w)));
          if (nearest >= width) continue;
#pragma unroll 1
          for (int i = 0; i < 4; ++i) note(own + k * 4 * threads + i);
        }
      }
    }
#pragma unroll 4
    for (t += thread; t < behind; t += threads) note(t);
    __syncthreads();
    return count;
  }

  // A token's place is the number of those before it.
  template <typename T>
  __device__ void Order(const Backward<T>& x) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int2 own = found[i];
      int before = 0, to_end = 0;
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const int2 other = found[j];
        to_end += other.x <= own.x;
        before += other.x < own.x || (other.x == own.x && other.y < own.y);
      }
      row[before] = own.y * x.dy.stride;
      sum[before] = own.x * x.table_stride;
      end[before] = to_end;
    }
    __syncthreads();
  }
};

template <typename T, int N>
__device__ void SumRuns(const Backward<T>& x, const TokensOfBucket& listed, int64_t c) {
  const T* rows = x.dy(0, c);
  float* sums = x.dtable + c;
  using P = Words<T, N>;
  using Sum = Pack<float, N>;
  const auto add = [&](const P& dy, Sum* sum) {
#pragma unroll
    for (int i = 0; i < P::kPairs; ++i) {
      const float2 pair = dy.Pair(i);
      sum->v[2 * i] = __fadd_rn(sum->v[2 * i], __fmul_rn(x.scale, pair.x));
      if constexpr (N > 1)
        sum->v[2 * i + 1] = __fadd_rn(sum->v[2 * i + 1], __fmul_rn(x.scale, pair.y));
    }
  };
  const int count = listed.count;
  for (int run = 0; run < count;) {
    const int end = listed.end[run];
    float* to = sums + listed.sum[run];
    Sum sum{};
    for (int k = run; k < end; k += kAhead) {
      P dy[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (k + j < end) dy[j] = P::Load(rows + listed.row[k + j]);
      }
      // Not ahead of them: the compiler would have them wait for it.
      if (k == run) sum = Sum::Load(to);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (k + j >= end) break;
        add(dy[j], &sum);
      }
    }
    sum.Store(to);
    run = end;
  }
}

template <typename T, int N>
__global__ __launch_bounds__(kBackwardThreads,
                             kBackwardBlocks) void BackwardKernel(const Backward<T> x) {
  __shared__ TokensOfBucket listed;
  AwaitEarlier();
  const int64_t c = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  for (int begin = 0, span = x.tokens; begin < x.tokens;) {
    const int looked_at = min(span, x.tokens - begin);
    const int count = listed.Find(x, begin, begin + looked_at);
    if (count > kListed) {
      span = looked_at / 2;
      continue;
    }
    listed.Order(x);
    if (count > 0 && c < x.columns) SumRuns<T, N>(x, listed, c);
    begin += looked_at;
  }
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
  const int64_t tokens = a.dy.dim(0), columns = a.dy.dim(1);
  CHECK(tokens <= std::numeric_limits<int32_t>::max() / 2);
  DispatchCudaFloat(a.dy.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      const int64_t packs = columns / N, strips = (packs + kBackwardThreads - 1) / kBackwardThreads;
      const int64_t threads = ((packs + strips - 1) / strips + 31) / 32 * 32;
      // For the multiprocessors of an H100.
      const int64_t blocks = 132 * (kBackwardThreads * kBackwardBlocks / threads);
      const int64_t buckets = std::clamp<int64_t>(blocks / strips, 2, kMostBuckets);
      LaunchEarly(
          exec.stream,
          {dim3(static_cast<unsigned>(strips), static_cast<unsigned>(buckets)),
           dim3(static_cast<unsigned>(threads))},
          BackwardKernel<T, N>,
          Backward<T>{Data<const int32_t>(a.ids), RowsOf<const T>(a.dy), static_cast<int>(tokens),
                      columns, Data<float>(a.dtable), a.dtable.stride(0), a.dtable.dim(0),
                      static_cast<float>(a.scale), a.padding_id,
                      std::numeric_limits<uint32_t>::max() / static_cast<uint32_t>(buckets)});
    };
    Packable(kPackSize<T>, {&a.dy, &a.dtable}) ? run.template operator()<kPackSize<T>>()
                                               : run.template operator()<1>();
  });
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
