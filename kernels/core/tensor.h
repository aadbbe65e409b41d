// TensorView: a non-owning, strided view of device memory. Memory comes from worker/memory.
//
// Strides count elements; the innermost stride is 1. A view may be a slice of a wider row
// (q, k, v of one fused buffer; x in a row [x|s]), so kernels use stride(i), never the product
// of shapes. On the plan device `data` is null and nothing is read or written.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/core/check.h"
#include "kernels/core/dtype.h"

namespace attune {

struct TensorView {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  int64_t shape[kMaxRank] = {1, 1, 1, 1};
  int64_t strides[kMaxRank] = {1, 1, 1, 1};

  TensorView() = default;
  // A contiguous row-major view.
  TensorView(void* data_in, DType dtype_in, std::initializer_list<int64_t> shape_in)
      : data(data_in), dtype(dtype_in), rank(static_cast<int>(shape_in.size())) {
    CHECK(rank <= kMaxRank);
    int i = 0;
    for (int64_t extent : shape_in) shape[i++] = extent;
    int64_t stride = 1;
    for (i = rank - 1; i >= 0; --i) {
      strides[i] = stride;
      stride *= shape[i];
    }
  }

  // False for a default view: that is how an optional tensor of an op's Args is left out. (A null
  // `data` says nothing: on the plan device every view has it.)
  bool defined() const { return rank > 0; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t stride(int i) const { return strides[i]; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  int64_t bytes() const { return size() * DTypeBytes(dtype); }
  bool contiguous() const {
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (strides[i] != stride && shape[i] != 1) return false;
      stride *= shape[i];
    }
    return true;
  }
  bool SameShape(const TensorView& other) const {
    if (rank != other.rank) return false;
    for (int i = 0; i < rank; ++i) {
      if (shape[i] != other.shape[i]) return false;
    }
    return true;
  }

  template <typename T>
  T* As() const {
    CHECK(dtype == DTypeOf<T>());
    return static_cast<T*>(data);
  }

  // The half-open range [begin, end) of dimension `axis`.
  TensorView Slice(int axis, int64_t begin, int64_t end) const {
    CHECK(axis < rank && 0 <= begin && begin <= end && end <= shape[axis]);
    TensorView out = *this;
    if (data != nullptr) {
      out.data = static_cast<char*>(data) + begin * strides[axis] * DTypeBytes(dtype);
    }
    out.shape[axis] = end - begin;
    return out;
  }

  // The same contiguous elements under another shape.
  TensorView Reshape(std::initializer_list<int64_t> new_shape) const {
    CHECK(contiguous());
    TensorView out(data, dtype, new_shape);
    CHECK(out.size() == size());
    return out;
  }
};

}  // namespace attune
