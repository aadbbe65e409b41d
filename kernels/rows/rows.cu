#include "kernels/core/cuda.cuh"
#include "kernels/rows/rows.h"

namespace attune {
namespace {

// A row is an array of Words, 16 bytes where they fit. kGather: y[r] = x[index[r]], else back.
template <typename Word, bool kGather>
struct MoveRow {
  static constexpr int kPack = 1;
  const int32_t* index;
  int64_t count;  // rows of x; an index beyond is the caller's bug, and nothing outside is touched
  Rows<Word> x, y;
  __device__ void operator()(int64_t r, int64_t c) const {
    const int32_t at = index[r];
    const bool inside = 0 <= at && at < count;
    if constexpr (kGather) {
      *y(r, c) = inside ? *x(at, c) : Word{};
    } else if (inside) {
      *x(at, c) = *y(r, c);
    }
  }
};

template <bool kGather>
void Move(const Exec& exec, const TensorView& x, const TensorView& index, const TensorView& y) {
  const int64_t width = DTypeBytes(x.dtype);
  const auto run = [&]<typename Word>() {
    const auto words = [&](const TensorView& view) {
      const int64_t stride = view.dim(0) > 1 ? view.stride(0) : 0;
      return Rows<Word>{Data<Word>(view), stride * width / static_cast<int64_t>(sizeof(Word))};
    };
    ForEachPack(MoveRow<Word, kGather>{Data<const int32_t>(index), x.dim(0), words(x), words(y)},
                index.dim(0), x.dim(1) * width / static_cast<int64_t>(sizeof(Word)), exec.stream);
  };
  if (Packable(16 / width, {&x, &y})) return run.template operator()<uint4>();
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
  Move<true>(exec, a.x, a.index, a.y);
}

void ScatterRowsCuda(const Exec& exec, const ScatterRowsArgs& a) {
  if (a.x.size() == 0) return;
  const size_t width = static_cast<size_t>(DTypeBytes(a.x.dtype));
  const size_t pitch = (a.x.dim(0) > 1 ? a.x.stride(0) : a.x.dim(1)) * width;
  CUDA_CHECK(
      cudaMemset2DAsync(a.x.data, pitch, 0, a.x.dim(1) * width, a.x.dim(0), StreamOf(exec.stream)));
  Move<false>(exec, a.x, a.index, a.y);
}

}  // namespace attune
