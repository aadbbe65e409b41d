// Both ops write each of their rows from a row elsewhere, or as zero: GatherRows from index[row],
// ScatterRows from where the index has the row, which it looks up.
#include "kernels/core/cuda.cuh"
#include "kernels/rows/rows.h"

namespace attune {
namespace {

// A warp takes kWords times 32 words of a row, all of which it reads before it writes.
constexpr int kWords = 4;

template <typename Word>
struct Move {
  const int32_t* index;
  uint32_t count;     // of the index
  int64_t from_rows;  // an index beyond is the caller's bug, and nothing outside is touched
  Rows<const Word> from;
  Rows<Word> to;
  int64_t columns;
  uint32_t rows, across;  // warps to a row
};

// Where an index that ascends, and ends in -1, has `row`; count if it does not. By all lanes of a
// warp, which look at 32 places at a time: each look waits for memory.
__device__ uint32_t Find(const int32_t* index, uint32_t count, uint32_t row) {
  uint32_t low = 0, high = count;  // everything before low is smaller, nothing from high on
  while (low < high) {
    const uint32_t step = (high - low + 31) / 32, at = low + threadIdx.x % 32 * step;
    const bool smaller = at < high && static_cast<uint32_t>(index[at]) < row;
    const uint32_t passed = __popc(__ballot_sync(0xffffffffu, smaller));  // the first so many
    if (passed == 0) return index[low] == static_cast<int32_t>(row) ? low : count;
    const uint32_t last = low + (passed - 1) * step;  // smaller
    high = min(high, last + step);
    low = last + 1;
  }
  return low < count && static_cast<uint32_t>(index[low]) == row ? low : count;
}

// Words are 16 bytes where they fit.
template <typename Word, bool kGather>
__global__ __launch_bounds__(256) void MoveKernel(const Move<Word> x) {
  const uint32_t unit = blockIdx.x * 8 + threadIdx.x / 32, row = unit / x.across;
  if (row >= x.rows) return;
  AwaitEarlier();
  const int64_t begin = int64_t{32} * kWords * (unit - row * x.across) + threadIdx.x % 32;
  const int64_t at = kGather ? x.index[row] : int64_t{Find(x.index, x.count, row)};
  const bool any = 0 <= at && at < x.from_rows;
  Word words[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t c = begin + 32 * k;
    words[k] = any && c < x.columns ? *x.from(at, c) : Word{};
  }
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t c = begin + 32 * k;
    if (c < x.columns) *x.to(row, c) = words[k];
  }
}

template <bool kGather>
void Run(const Exec& exec, const TensorView& from, const TensorView& index, const TensorView& to) {
  if (to.size() == 0) return;
  const int64_t width = DTypeBytes(to.dtype);
  const auto run = [&]<typename Word>() {
    const auto stride = [&](const TensorView& view) {
      return view.dim(0) > 1 ? view.stride(0) * width / static_cast<int64_t>(sizeof(Word)) : 0;
    };
    const int64_t columns = to.dim(1) * width / static_cast<int64_t>(sizeof(Word));
    const int64_t across = (columns + 32 * kWords - 1) / (32 * kWords);
    const int64_t units = to.dim(0) * across;
    CHECK(units < int64_t{1} << 31);
    LaunchEarly(exec.stream, {dim3(static_cast<unsigned>((units + 7) / 8)), dim3(256)},
                MoveKernel<Word, kGather>,
                Move<Word>{Data<const int32_t>(index),
                           static_cast<uint32_t>(index.dim(0)),
                           from.dim(0),
                           {Data<const Word>(from), stride(from)},
                           {Data<Word>(to), stride(to)},
                           columns,
                           static_cast<uint32_t>(to.dim(0)),
                           static_cast<uint32_t>(across)});
  };
  if (Packable(16 / width, {&from, &to})) return run.template operator()<uint4>();
  switch (width) {
    case 1:
      return run.template operator()<uint8_t>();
    case 2:
      return run.template operator()<uint16_t>();
    case 4:
      return run.template operator()<uint32_t>();
    default:
      return run.template operator()<uint64_t>();
  }
}

}  // namespace

void GatherRowsCuda(const Exec& exec, const GatherRowsArgs& a) {
  Run<true>(exec, a.x, a.index, a.y);
}

void ScatterRowsCuda(const Exec& exec, const ScatterRowsArgs& a) {
  Run<false>(exec, a.y, a.index, a.x);
}

}  // namespace attune
