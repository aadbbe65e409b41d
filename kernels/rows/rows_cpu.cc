#include <cstring>

#include "kernels/core/dispatch.h"
#include "kernels/core/parallel.h"
#include "kernels/rows/rows.h"

namespace attune {
namespace {

char* Row(const TensorView& x, int64_t row) {
  return static_cast<char*>(x.data) + row * x.stride(0) * DTypeBytes(x.dtype);
}

}  // namespace

void GatherRowsCpu(const Exec& exec, const GatherRowsArgs& a) {
  const int64_t R = a.y.dim(0), T = a.x.dim(0);
  const size_t bytes = static_cast<size_t>(a.x.dim(1) * DTypeBytes(a.x.dtype));
  if (bytes == 0) return;
  const int32_t* index = a.index.As<int32_t>();
#pragma omp parallel for schedule(static) if (WorthThreads(a.y.size()))
  for (int64_t r = 0; r < R; ++r) {
    CHECK(index[r] < T);
    if (index[r] < 0) {
      std::memset(Row(a.y, r), 0, bytes);
    } else {
      std::memcpy(Row(a.y, r), Row(a.x, index[r]), bytes);
    }
  }
}

void ScatterRowsCpu(const Exec& exec, const ScatterRowsArgs& a) {
  const int64_t R = a.y.dim(0), T = a.x.dim(0);
  const size_t bytes = static_cast<size_t>(a.x.dim(1) * DTypeBytes(a.x.dtype));
  if (bytes == 0) return;
  const int32_t* index = a.index.As<int32_t>();
#pragma omp parallel for schedule(static) if (WorthThreads(a.x.size()))
  for (int64_t t = 0; t < T; ++t) std::memset(Row(a.x, t), 0, bytes);
#pragma omp parallel for schedule(static) if (WorthThreads(a.y.size()))
  for (int64_t r = 0; r < R; ++r) {
    CHECK(index[r] < T);
    CHECK(r == 0 || index[r] < 0 || (0 <= index[r - 1] && index[r - 1] < index[r]));
    if (index[r] >= 0) std::memcpy(Row(a.x, index[r]), Row(a.y, r), bytes);
  }
}

}  // namespace attune
