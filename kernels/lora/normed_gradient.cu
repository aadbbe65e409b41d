#include "kernels/core/cuda.cuh"
#include "kernels/lora/normed_gradient_parts.h"

namespace attune {
namespace {

template <typename T>
struct ScaleRowsOp {
  static constexpr int kPack = 1;
  Rows<const T> x;
  const float* factor;
  Rows<T> y;
  __device__ void operator()(int64_t row, int64_t c) const {
    *y(row, c) = FromFloat<T>(factor[row] * ToFloat(*x(row, c)));
  }
};

template <typename T>
struct AddColumnsOp {
  static constexpr int kPack = 1;
  Rows<const float> product;
  const T* w;
  Rows<float> da;
  float offset, scale;
  __device__ void operator()(int64_t row, int64_t c) const {
    *da(row, c) += scale * (ToFloat(w[c]) + offset) * *product(row, c);
  }
};

}  // namespace

void ScaleRowsCuda(const Exec& exec, const ScaleRowsArgs& a) {
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    ForEachPack(ScaleRowsOp<T>{RowsOf<const T>(a.x), Data<const float>(a.factor), RowsOf<T>(a.y)},
                a.x.dim(0), a.x.dim(1), exec.stream);
  });
}

void AddColumnsCuda(const Exec& exec, const AddColumnsArgs& a) {
  DispatchCudaFloat(a.w.dtype, [&]<typename T>() {
    ForEachPack(
        AddColumnsOp<T>{RowsOf<const float>(a.product), Data<const T>(a.w), RowsOf<float>(a.da),
                        static_cast<float>(a.offset), static_cast<float>(a.scale)},
        a.da.dim(0), a.da.dim(1), exec.stream);
  });
}

}  // namespace attune
