// Elementwise ops on CUDA. f64 is here too, unlike in the ops that compute: sums and norms are f64.
#include "kernels/core/cuda.cuh"
#include "kernels/elementwise/elementwise.h"

namespace attune {
namespace {

template <typename X, typename Y>
using WiderOf =
    std::conditional_t<std::is_same_v<X, double> || std::is_same_v<Y, double>, double, float>;

template <typename T>
__device__ auto Widen(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return static_cast<float>(x);
  }
}
template <typename T, typename A>
__device__ T Narrow(A x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Rows and columns of a view; everything is one row where all views are contiguous.
struct Extents {
  int64_t rows, columns;
};
Extents ExtentsOf(std::initializer_list<const TensorView*> views) {
  const TensorView& first = **views.begin();
  bool contiguous = true;
  for (const TensorView* x : views) contiguous &= x->contiguous();
  if (contiguous) return {1, first.size()};
  return {first.dim(0), first.dim(1)};
}
template <typename T>
Rows<T> RowsIn(const TensorView& x, const Extents& extents) {
  return {static_cast<T*>(x.data), extents.rows > 1 ? x.stride(0) : 0};
}
// As Packable, for views that may be taken as one row.
bool PackableIn(const Extents& extents, int64_t n, std::initializer_list<const TensorView*> views) {
  if (extents.columns % n != 0) return false;
  for (const TensorView* x : views) {
    const int64_t bytes = std::min<int64_t>(16, n * DTypeBytes(x->dtype));
    if (reinterpret_cast<uintptr_t>(x->data) % bytes != 0) return false;
    if (extents.rows > 1 && x->stride(0) * DTypeBytes(x->dtype) % bytes != 0) return false;
  }
  return true;
}

// Calls f.operator()<N>() with n where the views allow it, else 1.
template <int kMost, typename F>
void DispatchPack(const Extents& extents, std::initializer_list<const TensorView*> views, F&& f) {
  if (PackableIn(extents, kMost, views)) return f.template operator()<kMost>();
  f.template operator()<1>();
}

template <typename T, int N>
struct FillPack {
  static constexpr int kPack = N;
  Rows<T> x;
  T value;
  __device__ void operator()(int64_t row, int64_t c) const {
    Pack<T, N> out;
    for (int i = 0; i < N; ++i) out.v[i] = value;
    out.Store(x(row, c));
  }
};

template <typename X, typename Y, int N>
struct CopyPack {
  static constexpr int kPack = N;
  Rows<const X> x;
  Rows<Y> y;
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<X, N> in = Pack<X, N>::Load(x(row, c));
    Pack<Y, N> out;
    for (int i = 0; i < N; ++i) {
      if constexpr (std::is_same_v<X, Y>) {
        out.v[i] = in.v[i];
      } else {
        out.v[i] = Narrow<Y>(Widen(in.v[i]));
      }
    }
    out.Store(y(row, c));
  }
};

template <typename X, typename Y, int N>
struct AddPack {
  static constexpr int kPack = N;
  using A = WiderOf<X, Y>;
  Rows<const X> x;
  Rows<Y> y;
  A alpha;
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<X, N> in = Pack<X, N>::Load(x(row, c));
    Pack<Y, N> out = Pack<Y, N>::Load(y(row, c));
    for (int i = 0; i < N; ++i) {
      out.v[i] =
          Narrow<Y>(static_cast<A>(Widen(out.v[i])) + alpha * static_cast<A>(Widen(in.v[i])));
    }
    out.Store(y(row, c));
  }
};

// A number on the device, f32 or f64.
struct DeviceScalar {
  const void* data = nullptr;
  bool is_double = false;
  __device__ double Read() const {
    if (data == nullptr) return 1.0;
    return is_double ? *static_cast<const double*>(data)
                     : static_cast<double>(*static_cast<const float*>(data));
  }
};

template <typename T, int N>
struct ScalePack {
  static constexpr int kPack = N;
  Rows<T> x;
  double alpha;
  DeviceScalar device_alpha;
  __device__ void operator()(int64_t row, int64_t c) const {
    using A = WiderOf<T, T>;
    const A factor = static_cast<A>(alpha * device_alpha.Read());
    Pack<T, N> v = Pack<T, N>::Load(x(row, c));
    for (int i = 0; i < N; ++i) v.v[i] = Narrow<T>(Widen(v.v[i]) * factor);
    v.Store(x(row, c));
  }
};

// For what is rounded to bf16: off by less than 1e-4 of it.
__device__ float RoughTanh(float x) {
  if (fabsf(x) < 0.05f) return x - x * x * x * (1.0f / 3);
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 2.8853900817779268f));  // exp(2 x)
  return 1.0f - __fdividef(2.0f, e + 1.0f);
}

template <typename T, int N>
struct SoftCapPack {
  static constexpr int kPack = N;
  using A = WiderOf<T, T>;
  Rows<T> x;
  A cap;
  __device__ void operator()(int64_t row, int64_t c) const {
    Pack<T, N> v = Pack<T, N>::Load(x(row, c));
    for (int i = 0; i < N; ++i) {
      if constexpr (std::is_same_v<T, Bf16>) {
        v.Set(i, cap * RoughTanh(v[i] * (1.0f / cap)));
      } else {
        v.v[i] = Narrow<T>(cap * tanh(Widen(v.v[i]) / cap));
      }
    }
    v.Store(x(row, c));
  }
};

// One block: thread t sums the elements t, t + 1024, ... of each row; then the threads in order.
template <typename T>
__global__ __launch_bounds__(1024) void SumKernel(Rows<const T> x, Extents extents, float* out_f32,
                                                  double* out_f64, bool accumulate) {
  double sum = 0.0;
  for (int64_t row = 0; row < extents.rows; ++row) {
    for (int64_t c = threadIdx.x; c < extents.columns; c += 1024) {
      sum += static_cast<double>(Widen(*x(row, c)));
    }
  }
  sum = BlockSum<1024>(sum);
  if (threadIdx.x != 0) return;
  if (out_f64 != nullptr) {
    *out_f64 = accumulate ? *out_f64 + sum : sum;
  } else {
    *out_f32 = static_cast<float>(accumulate ? static_cast<double>(*out_f32) + sum : sum);
  }
}

template <typename T>
void FillWith(const Exec& exec, const TensorView& x, T value) {
  const Extents extents = ExtentsOf({&x});
  DispatchPack<kPackSize<T>>(extents, {&x}, [&]<int N>() {
    ForEachPack(FillPack<T, N>{RowsIn<T>(x, extents), value}, extents.rows, extents.columns,
                exec.stream);
  });
}

template <typename X, typename Y>
void CopyTo(const Exec& exec, const CopyArgs& a) {
  const Extents extents = ExtentsOf({&a.x, &a.y});
  constexpr int kMost = kPackSize < X >> kPackSize<Y> ? kPackSize<X> : kPackSize<Y>;
  DispatchPack<kMost>(extents, {&a.x, &a.y}, [&]<int N>() {
    ForEachPack(CopyPack<X, Y, N>{RowsIn<const X>(a.x, extents), RowsIn<Y>(a.y, extents)},
                extents.rows, extents.columns, exec.stream);
  });
}

}  // namespace

void FillCuda(const Exec& exec, const FillArgs& a) {
  switch (a.x.dtype) {
    case DType::kF64:
      return FillWith<double>(exec, a.x, a.value);
    case DType::kF32:
      return FillWith<float>(exec, a.x, static_cast<float>(a.value));
    case DType::kBF16:
      return FillWith<uint16_t>(exec, a.x, BFloat16(static_cast<float>(a.value)).bits);
    case DType::kI64:
      return FillWith<int64_t>(exec, a.x, static_cast<int64_t>(a.value));
    case DType::kI32:
      return FillWith<int32_t>(exec, a.x, static_cast<int32_t>(a.value));
    case DType::kI8:
      return FillWith<int8_t>(exec, a.x, static_cast<int8_t>(a.value));
    case DType::kU8:
      return FillWith<uint8_t>(exec, a.x, static_cast<uint8_t>(a.value));
    case DType::kF16:
      CHECK(a.value == 0.0);  // no op computes in f16
      return FillWith<uint16_t>(exec, a.x, 0);
    case DType::kF8E4M3:
      CHECK(a.value == 0.0);
      return FillWith<uint8_t>(exec, a.x, uint8_t{0});
  }
}

void CopyCuda(const Exec& exec, const CopyArgs& a) {
  if (a.x.dtype == a.y.dtype) {
    switch (DTypeBytes(a.x.dtype)) {
      case 1:
        return CopyTo<uint8_t, uint8_t>(exec, a);
      case 2:
        return CopyTo<uint16_t, uint16_t>(exec, a);
      case 4:
        return CopyTo<uint32_t, uint32_t>(exec, a);
      default:
        return CopyTo<uint64_t, uint64_t>(exec, a);
    }
  }
  DispatchCudaFloat64(a.y.dtype, [&]<typename Y>() {
    if (a.x.dtype == DType::kF16) return CopyTo<__half, Y>(exec, a);
    DispatchCudaFloat64(a.x.dtype, [&]<typename X>() { CopyTo<X, Y>(exec, a); });
  });
}

void AddCuda(const Exec& exec, const AddArgs& args) {
  AddArgs a = args;
  if (a.x.rank < a.y.rank) {  // the same row again and again
    a.x = a.y;
    a.x.data = args.x.data;
    a.x.dtype = args.x.dtype;
    a.x.strides[0] = 0;
  }
  const Extents extents = ExtentsOf({&a.x, &a.y});
  DispatchCudaFloat64(a.x.dtype, [&]<typename X>() {
    DispatchCudaFloat64(a.y.dtype, [&]<typename Y>() {
      constexpr int kMost = kPackSize < X >> kPackSize<Y> ? kPackSize<X> : kPackSize<Y>;
      DispatchPack<kMost>(extents, {&a.x, &a.y}, [&]<int N>() {
        ForEachPack(AddPack<X, Y, N>{RowsIn<const X>(a.x, extents), RowsIn<Y>(a.y, extents),
                                     static_cast<WiderOf<X, Y>>(a.alpha)},
                    extents.rows, extents.columns, exec.stream);
      });
    });
  });
}

void ScaleCuda(const Exec& exec, const ScaleArgs& a) {
  const Extents extents = ExtentsOf({&a.x});
  const bool given = a.alpha_device.defined();
  const DeviceScalar device_alpha{given ? a.alpha_device.data : nullptr,
                                  given && a.alpha_device.dtype == DType::kF64};
  DispatchCudaFloat64(a.x.dtype, [&]<typename T>() {
    DispatchPack<kPackSize<T>>(extents, {&a.x}, [&]<int N>() {
      ForEachPack(ScalePack<T, N>{RowsIn<T>(a.x, extents), a.alpha, device_alpha}, extents.rows,
                  extents.columns, exec.stream);
    });
  });
}

void SoftCapCuda(const Exec& exec, const SoftCapArgs& a) {
  const Extents extents = ExtentsOf({&a.x});
  DispatchCudaFloat64(a.x.dtype, [&]<typename T>() {
    DispatchPack<kPackSize<T>>(extents, {&a.x}, [&]<int N>() {
      ForEachPack(SoftCapPack<T, N>{RowsIn<T>(a.x, extents), static_cast<WiderOf<T, T>>(a.cap)},
                  extents.rows, extents.columns, exec.stream);
    });
  });
}

void SumToScalarCuda(const Exec& exec, const SumToScalarArgs& a) {
  const Extents extents = ExtentsOf({&a.x});
  const bool is_double = a.out.dtype == DType::kF64;
  const auto run = [&]<typename T>() {
    SumKernel<T><<<1, 1024, 0, StreamOf(exec.stream)>>>(
        RowsIn<const T>(a.x, extents), extents, is_double ? nullptr : Data<float>(a.out),
        is_double ? Data<double>(a.out) : nullptr, a.accumulate);
  };
  if (a.x.dtype == DType::kU8) {
    run.template operator()<uint8_t>();
  } else {
    DispatchCudaFloat64(a.x.dtype, run);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
