// MatMul on CUDA: cuBLASLt, with the algorithm that its heuristic names for a shape kept for the
// life of the process.
//
// cuBLASLt counts columns first: what it multiplies is D^T = op(B)^T op(A)^T, whose operands lie in
// memory just as ours do. Algorithms that sum in place are not taken (their order may vary), and
// parts of a split sum are added in f32: so the order of a sum hangs on shape, alignment, library
// version and GPU model only. f32 is f32: no TF32.
#include <cuda_fp8.h>

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "kernels/core/cuda.cuh"
#include "kernels/core/cuda_libraries.h"
#include "kernels/matmul/matmul.h"

namespace attune {

int64_t MatMulWorkspaceBytesCuda(const Exec& exec, const MatMulArgs& a);

namespace {

void Check(cublasStatus_t status, int line, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  CudaFailed(__FILE__, line, what, CublasLt().GetStatusString(status));
}
#define CUBLAS_CHECK(call) Check((call), __LINE__, #call)

struct Product {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;  // cuBLASLt's a is our b
  cublasLtMatmulAlgo_t algorithm{};
  bool found = false;
};

cublasLtHandle_t Handle() {
  static const cublasLtHandle_t handle = [] {
    cublasLtHandle_t out = nullptr;
    CUBLAS_CHECK(CublasLt().Create(&out));
    return out;
  }();
  return handle;
}

int64_t LeadingDimension(const TensorView& x) {
  return x.dim(0) > 1 ? x.stride(0) : std::max<int64_t>(x.dim(1), 1);
}
uint32_t Alignment(const TensorView& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.data);
  return static_cast<uint32_t>(std::min<uintptr_t>(256, address & (~address + 1)));
}

cublasLtMatrixLayout_t Layout(const TensorView& x) {
  cublasLtMatrixLayout_t out = nullptr;
  const cudaDataType_t type = x.dtype == DType::kBF16     ? CUDA_R_16BF
                              : x.dtype == DType::kF8E4M3 ? CUDA_R_8F_E4M3
                                                          : CUDA_R_32F;
  CUBLAS_CHECK(CublasLt().LayoutCreate(&out, type, static_cast<uint64_t>(x.dim(1)),
                                       static_cast<uint64_t>(x.dim(0)), LeadingDimension(x)));
  return out;
}

template <typename T>
void SetPreference(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t name,
                   T value) {
  CUBLAS_CHECK(CublasLt().PreferenceSetAttribute(preference, name, &value, sizeof(value)));
}

template <typename T>
void SetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t name, T value) {
  CUBLAS_CHECK(CublasLt().DescSetAttribute(desc, name, &value, sizeof(value)));
}

// The scales of f8: where they are. (cuBLASLt's a is our b.)
void SetScales(const Product& product, const MatMulArgs& x) {
  SetAttribute(product.desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, x.b_scale.data);
  SetAttribute(product.desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x.a_scale.data);
}

std::shared_ptr<const Product> MakeProduct(const MatMulArgs& x, int64_t workspace_bytes) {
  const CublasLtApi& lt = CublasLt();
  auto out = std::make_shared<Product>();
  CUBLAS_CHECK(lt.DescCreate(&out->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  SetAttribute(out->desc, CUBLASLT_MATMUL_DESC_TRANSA, x.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  SetAttribute(out->desc, CUBLASLT_MATMUL_DESC_TRANSB, x.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (x.a.dtype == DType::kF8E4M3) {
    const int32_t per_row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    SetAttribute(out->desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, per_row);
    SetAttribute(out->desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, per_row);
    SetAttribute(out->desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
    SetScales(*out, x);
  }
  out->a = Layout(x.b);
  out->b = Layout(x.a);
  out->d = Layout(x.d);
  cublasLtMatmulPreference_t preference = nullptr;
  CUBLAS_CHECK(lt.PreferenceCreate(&preference));
  SetPreference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                static_cast<uint64_t>(workspace_bytes));
  SetPreference(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  SetPreference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, Alignment(x.b));
  SetPreference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, Alignment(x.a));
  SetPreference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, Alignment(x.d));
  SetPreference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, Alignment(x.d));
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const cublasStatus_t status = lt.AlgoGetHeuristic(Handle(), out->desc, out->a, out->b, out->d,
                                                    out->d, preference, 1, &result, &count);
  CUBLAS_CHECK(lt.PreferenceDestroy(preference));
  out->found = status == CUBLAS_STATUS_SUCCESS && count > 0;
  if (!out->found && status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
  out->algorithm = result.algo;
  return out;
}

// Kept for the life of the process: a trainer has a few dozen shapes.
std::shared_ptr<const Product> FindProduct(const MatMulArgs& x, int64_t workspace_bytes) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t, uint32_t,
                         uint32_t, int>;
  const int flags = (x.trans_a ? 1 : 0) | (x.trans_b ? 2 : 0) |
                    (x.a.dtype == DType::kBF16 ? 4 : 0) | (x.d.dtype == DType::kBF16 ? 8 : 0) |
                    (x.a.dtype == DType::kF8E4M3 ? 16 : 0);
  const Key key{x.d.dim(0),
                x.d.dim(1),
                x.a.dim(x.trans_a ? 0 : 1),
                LeadingDimension(x.a),
                LeadingDimension(x.b),
                LeadingDimension(x.d),
                Alignment(x.a),
                Alignment(x.b),
                Alignment(x.d),
                flags};
  static std::mutex mutex;
  static auto* cache = new std::map<Key, std::shared_ptr<const Product>>();
  const std::lock_guard<std::mutex> lock(mutex);
  auto it = cache->find(key);
  if (it == cache->end()) it = cache->emplace(key, MakeProduct(x, workspace_bytes)).first;
  return it->second;
}

// A code of 8 bits.
struct F8 {
  uint8_t bits;
};
template <typename T>
__device__ float ValueOf(T x) {
  if constexpr (std::is_same_v<T, F8>) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
  } else {
    return ToFloat(x);
  }
}

// For what the library refuses (rows at odd addresses): a thread per element, k in ascending order.
template <typename T, typename Out>
struct PlainProduct {
  static constexpr int kPack = 1;
  const T* a;
  const T* b;
  int64_t a_row, a_k, b_k, b_column, depth;
  Rows<Out> d;
  float alpha;
  bool accumulate;
  const float* a_scale;  // of F8
  const float* b_scale;
  __device__ void operator()(int64_t row, int64_t column) const {
    float sum = 0.0f;
    for (int64_t k = 0; k < depth; ++k) {
      sum += ValueOf(a[row * a_row + k * a_k]) * ValueOf(b[k * b_k + column * b_column]);
    }
    if constexpr (std::is_same_v<T, F8>) sum *= a_scale[row] * b_scale[column];
    Out* out = d(row, column);
    *out = FromFloat<Out>(accumulate ? alpha * sum + ToFloat(*out) : alpha * sum);
  }
};

template <typename T, typename Out>
void RunPlainOf(const Exec& exec, const MatMulArgs& x) {
  const int64_t lda = LeadingDimension(x.a), ldb = LeadingDimension(x.b);
  const PlainProduct<T, Out> op{Data<const T>(x.a),           Data<const T>(x.b),
                                x.trans_a ? 1 : lda,          x.trans_a ? lda : 1,
                                x.trans_b ? 1 : ldb,          x.trans_b ? ldb : 1,
                                x.a.dim(x.trans_a ? 0 : 1),   RowsOf<Out>(x.d),
                                static_cast<float>(x.alpha),  x.beta != 0.0,
                                Data<const float>(x.a_scale), Data<const float>(x.b_scale)};
  ForEachPack(op, x.d.dim(0), x.d.dim(1), exec.stream);
}

void RunPlain(const Exec& exec, const MatMulArgs& x) {
  const bool f32 = x.d.dtype == DType::kF32;
  if (x.a.dtype == DType::kF32) return RunPlainOf<float, float>(exec, x);
  if (x.a.dtype == DType::kF8E4M3) {
    return f32 ? RunPlainOf<F8, float>(exec, x) : RunPlainOf<F8, Bf16>(exec, x);
  }
  f32 ? RunPlainOf<Bf16, float>(exec, x) : RunPlainOf<Bf16, Bf16>(exec, x);
}

}  // namespace

void MatMulCuda(const Exec& exec, const MatMulArgs& x) {
  CHECK(x.a.dtype != DType::kF64 && "f64 products exist on the CPU backend only");
  const int64_t m = x.d.dim(0), n = x.d.dim(1), k = x.a.dim(x.trans_a ? 0 : 1);
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (x.beta != 0.0) return;
    const size_t width = static_cast<size_t>(DTypeBytes(x.d.dtype));
    CUDA_CHECK(cudaMemset2DAsync(x.d.data, LeadingDimension(x.d) * width, 0, n * width, m,
                                 StreamOf(exec.stream)));
    return;
  }
  const int64_t workspace_bytes = MatMulWorkspaceBytesCuda(exec, x);
  const std::shared_ptr<const Product> product = FindProduct(x, workspace_bytes);
  if (!product->found) return RunPlain(exec, x);
  if (x.a.dtype == DType::kF8E4M3) SetScales(*product, x);
  const float alpha = static_cast<float>(x.alpha), beta = static_cast<float>(x.beta);
  CUBLAS_CHECK(CublasLt().Matmul(Handle(), product->desc, &alpha, x.b.data, product->a, x.a.data,
                                 product->b, &beta, x.d.data, product->d, x.d.data, product->d,
                                 &product->algorithm, x.workspace.data,
                                 static_cast<size_t>(workspace_bytes), StreamOf(exec.stream)));
}

}  // namespace attune
