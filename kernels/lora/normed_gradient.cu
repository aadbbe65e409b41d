#include "kernels/core/cuda.cuh"
#include "kernels/lora/normed_gradient_parts.h"

namespace attune {
namespace {

template <typename T, int N>
struct ScaleRowsOp {
  static constexpr int kPack = N;
  Rows<const T> x;
  const float* factor;
  Rows<T> y;
  __device__ void operator()(int64_t row, int64_t c) const {
    Pack<T, N> v = Pack<T, N>::Load(x(row, c));
    const float own = factor[row];
    for (int i = 0; i < N; ++i) v.Set(i, own * v[i]);
    v.Store(y(row, c));
  }
};

template <typename T, int N>
struct AddColumnsOp {
  static constexpr int kPack = N;
  Rows<const float> product;
  const T* w;
  Rows<float> da;
  float offset, scale;
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<float, N> p = Pack<float, N>::Load(product(row, c));
    const Pack<T, N> own = Pack<T, N>::Load(w + c);
    Pack<float, N> sum = Pack<float, N>::Load(da(row, c));
    for (int i = 0; i < N; ++i) sum.v[i] += scale * (own[i] + offset) * p[i];
    sum.Store(da(row, c));
  }
};

}  // namespace

void ScaleRowsCuda(const Exec& exec, const ScaleRowsArgs& a) {
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(
          ScaleRowsOp<T, N>{RowsOf<const T>(a.x), Data<const float>(a.factor), RowsOf<T>(a.y)},
          a.x.dim(0), a.x.dim(1), exec.stream);
    };
    Packable(kPackSize<T>, {&a.x, &a.y}) ? run.template operator()<kPackSize<T>>()
                                         : run.template operator()<1>();
  });
}

void AddColumnsCuda(const Exec& exec, const AddColumnsArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(AddColumnsOp<T, N>{RowsOf<const float>(a.product), Data<const T>(a.w),
                                     RowsOf<float>(a.da), static_cast<float>(a.offset),
                                     static_cast<float>(a.scale)},
                  a.da.dim(0), a.da.dim(1), exec.stream);
    };
    Packable(4, {&a.product, &a.w, &a.da}) ? run.template operator()<4>()
                                           : run.template operator()<1>();
  });
}

}  // namespace attune
