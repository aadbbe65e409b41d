#include "kernels/core/cuda.cuh"
#include "kernels/embedding/embedding.h"

namespace attune {
namespace {

template <typename T, int N>
struct Forward {
  static constexpr int kPack = N;
  const int32_t* ids;
  const T* table;
  int64_t table_stride, vocabulary;
  Rows<T> y;
  float scale;
  __device__ void operator()(int64_t row, int64_t c) const {
    const int32_t id = ids[row];
    Pack<T, N> v;
    if (0 <= id && id < vocabulary) {
      v = Pack<T, N>::Load(table + id * table_stride + c);
      for (int i = 0; i < N; ++i) v.Set(i, v[i] * scale);
    } else {
      for (int i = 0; i < N; ++i) v.Set(i, 0.0f);
    }
    v.Store(y(row, c));
  }
};

}  // namespace

void EmbeddingForwardCuda(const Exec& exec, const EmbeddingForwardArgs& a) {
  DispatchCudaFloat(a.table.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(
          Forward<T, N>{Data<const int32_t>(a.ids), Data<const T>(a.table), a.table.stride(0),
                        a.table.dim(0), RowsOf<T>(a.y), static_cast<float>(a.scale)},
          a.y.dim(0), a.y.dim(1), exec.stream);
    };
    if (Packable(kPackSize<T>, {&a.table, &a.y})) return run.template operator()<kPackSize<T>>();
    run.template operator()<1>();
  });
}

}  // namespace attune
