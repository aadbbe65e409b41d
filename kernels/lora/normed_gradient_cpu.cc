#include "kernels/core/parallel.h"
#include "kernels/lora/normed_gradient_parts.h"

namespace attune {

void ScaleRowsCpu(const Exec& exec, const ScaleRowsArgs& a) {
  DispatchFloat(a.x.dtype, [&]<typename T>() {
    using A = AccumulatorOf<T>;
    const int64_t rows = a.x.dim(0), columns = a.x.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(rows * columns))
    for (int64_t t = 0; t < rows; ++t) {
      const T* x = a.x.As<T>() + t * a.x.stride(0);
      T* y = a.y.As<T>() + t * a.y.stride(0);
      const A factor = a.factor.As<A>()[t];
      for (int64_t j = 0; j < columns; ++j) StoreRounded<T>(factor * ToAccumulator(x[j]), &y[j]);
    }
  });
}

void AddColumnsCpu(const Exec& exec, const AddColumnsArgs& a) {
  DispatchFloat(a.w.dtype, [&]<typename T>() {
    using A = AccumulatorOf<T>;
    const int64_t rows = a.da.dim(0), columns = a.da.dim(1);
    const T* w = a.w.As<T>();
    const A offset = static_cast<A>(a.offset), scale = static_cast<A>(a.scale);
#pragma omp parallel for schedule(static) if (WorthThreads(rows * columns))
    for (int64_t j = 0; j < rows; ++j) {
      const A* product = a.product.As<A>() + j * a.product.stride(0);
      A* da = a.da.As<A>() + j * a.da.stride(0);
      for (int64_t c = 0; c < columns; ++c) {
        da[c] += scale * (ToAccumulator(w[c]) + offset) * product[c];
      }
    }
  });
}

}  // namespace attune
