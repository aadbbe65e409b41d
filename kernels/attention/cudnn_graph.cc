#include "kernels/attention/cudnn_graph.h"

#include "kernels/core/cuda_error.h"
#include "kernels/core/cuda_libraries.h"

namespace attune {
namespace {

std::string LastError(cudnnStatus_t status) {
  char message[1024] = "";
  Cudnn().GetLastErrorString(message, sizeof(message));
  return std::string(Cudnn().GetErrorString(status)) + " " + message;
}

void Check(cudnnStatus_t status, int line, const char* what) {
  if (status != CUDNN_STATUS_SUCCESS) CudaFailed(__FILE__, line, what, LastError(status).c_str());
}
#define CUDNN_CHECK(call) Check((call), __LINE__, #call)

template <typename T>
void Set(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
         cudnnBackendAttributeType_t type, const T& value) {
  CUDNN_CHECK(Cudnn().SetAttribute(d, name, type, 1, &value));
}
void SetTensor(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
               const CudnnGraph::Tensor& tensor) {
  Set(d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, tensor.descriptor);
}

}  // namespace

CudnnGraph::~CudnnGraph() {
  for (size_t i = descriptors_.size(); i-- > 0;) Cudnn().DestroyDescriptor(descriptors_[i]);
}

CudnnGraph::Descriptor CudnnGraph::New(cudnnBackendDescriptorType_t type) {
  Descriptor out = nullptr;
  CUDNN_CHECK(Cudnn().CreateDescriptor(type, &out));
  descriptors_.push_back(out);
  return out;
}

CudnnGraph::Tensor CudnnGraph::Strided(const int64_t (&dims)[4], const int64_t (&strides)[4],
                                       const TensorOptions& options) {
  Tensor out{New(CUDNN_BACKEND_TENSOR_DESCRIPTOR),
             {strides[0], strides[1], strides[2], strides[3]}};
  const Descriptor d = out.descriptor;
  const int64_t id = options.id != 0 ? options.id : next_id_++;
  Set(d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, options.dtype);
  CUDNN_CHECK(Cudnn().SetAttribute(d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims));
  CUDNN_CHECK(Cudnn().SetAttribute(d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides));
  Set(d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id);
  Set(d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, int64_t{16});
  Set(d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, options.id == 0);
  Set(d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, options.by_value);
  if (options.ragged != nullptr) {
    SetTensor(d, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, *options.ragged);
  }
  CUDNN_CHECK(Cudnn().Finalize(d));
  return out;
}

CudnnGraph::Tensor CudnnGraph::Virtual(const int64_t (&d)[4], cudnnDataType_t dtype) {
  return Strided(d, {d[1] * d[2] * d[3], d[2] * d[3], d[3], 1}, {.dtype = dtype});
}

CudnnGraph::Tensor CudnnGraph::Scalar(int64_t id) {
  return Strided({1, 1, 1, 1}, {1, 1, 1, 1}, {.id = id, .by_value = true});
}

CudnnGraph::Tensor CudnnGraph::Counts(int64_t size, int64_t id) {
  return Strided({size, 1, 1, 1}, {1, 1, 1, 1}, {.dtype = CUDNN_DATA_INT32, .id = id});
}

void CudnnGraph::Pointwise(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& y,
                           const PointwiseOptions& options) {
  const Descriptor p = New(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  Set(p, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, mode);
  Set(p, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, options.precision);
  if (options.axis >= 0) Set(p, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, options.axis);
  CUDNN_CHECK(Cudnn().Finalize(p));
  const Descriptor o = New(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  Set(o, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, CUDNN_TYPE_BACKEND_DESCRIPTOR, p);
  if (options.backward) {
    SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_DYDESC, x);
    SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, *options.b);
    SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_DXDESC, y);
  } else {
    SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (options.b != nullptr) SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *options.b);
    if (options.t != nullptr) SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, *options.t);
    SetTensor(o, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
  }
  CUDNN_CHECK(Cudnn().Finalize(o));
  operations_.push_back(o);
}

void CudnnGraph::MatMul(const Tensor& a, const Tensor& b, const Tensor& c,
                        const MatMulOptions& options) {
  const Descriptor p = New(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
  Set(p, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
  if (options.zero_padding) Set(p, CUDNN_ATTR_MATMUL_PADDING_VALUE, CUDNN_TYPE_DOUBLE, 0.0);
  CUDNN_CHECK(Cudnn().Finalize(p));
  const Descriptor o = New(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
  Set(o, CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, p);
  SetTensor(o, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
  SetTensor(o, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
  SetTensor(o, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
  const auto bound = [&](cudnnBackendAttributeName_t name, const Tensor* count) {
    if (count != nullptr) SetTensor(o, name, *count);
  };
  bound(CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, options.m);
  bound(CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, options.n);
  bound(CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, options.k);
  CUDNN_CHECK(Cudnn().Finalize(o));
  operations_.push_back(o);
}

void CudnnGraph::Reduce(cudnnReduceTensorOp_t op, const Tensor& x, const Tensor& y) {
  const Descriptor p = New(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
  Set(p, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, op);
  Set(p, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
  CUDNN_CHECK(Cudnn().Finalize(p));
  const Descriptor o = New(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
  Set(o, CUDNN_ATTR_OPERATION_REDUCTION_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, p);
  SetTensor(o, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
  SetTensor(o, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
  CUDNN_CHECK(Cudnn().Finalize(o));
  operations_.push_back(o);
}

void CudnnGraph::Reshape(const Tensor& x, const Tensor& y) {
  const Descriptor o = New(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
  SetTensor(o, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
  SetTensor(o, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
  CUDNN_CHECK(Cudnn().Finalize(o));
  operations_.push_back(o);
}

bool CudnnGraph::Build(std::string* reason) {
  const CudnnApi& api = Cudnn();
  const Descriptor graph = New(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  CUDNN_CHECK(api.SetAttribute(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                               static_cast<int64_t>(operations_.size()), operations_.data()));
  Set(graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, handle_);
  cudnnStatus_t status = api.Finalize(graph);
  if (status != CUDNN_STATUS_SUCCESS) {
    *reason = LastError(status);
    return false;
  }
  const Descriptor heuristic = New(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  Set(heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, graph);
  Set(heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, CUDNN_HEUR_MODE_A);
  status = api.Finalize(heuristic);
  int64_t count = 0;
  if (status == CUDNN_STATUS_SUCCESS) {
    status = api.GetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                              CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &count, nullptr);
  }
  if (status != CUDNN_STATUS_SUCCESS || count == 0) {
    *reason = count == 0 ? "no engine offers itself" : LastError(status);
    return false;
  }
  std::vector<Descriptor> configs(count);
  for (Descriptor& config : configs) config = New(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  CUDNN_CHECK(api.GetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                               CUDNN_TYPE_BACKEND_DESCRIPTOR, count, &count, configs.data()));
  for (int64_t i = 0; i < count; ++i) {
    const Descriptor plan = New(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
    Set(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, configs[i]);
    Set(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, handle_);
    status = api.Finalize(plan);
    if (status != CUDNN_STATUS_SUCCESS) {
      *reason = LastError(status);
      continue;
    }
    int64_t got = 0;
    CUDNN_CHECK(api.GetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64,
                                 1, &got, &workspace_bytes_));
    plan_ = plan;
    return true;
  }
  return false;
}

void CudnnGraph::Execute(const std::vector<std::pair<int64_t, void*>>& tensors,
                         void* workspace) const {
  const CudnnApi& api = Cudnn();
  std::vector<int64_t> ids;
  std::vector<void*> data;
  for (const auto& [id, address] : tensors) {
    ids.push_back(id);
    data.push_back(address);
  }
  Descriptor pack = nullptr;
  CUDNN_CHECK(api.CreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack));
  CUDNN_CHECK(api.SetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64,
                               static_cast<int64_t>(ids.size()), ids.data()));
  CUDNN_CHECK(api.SetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR,
                               static_cast<int64_t>(data.size()), data.data()));
  CUDNN_CHECK(api.SetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1,
                               &workspace));
  CUDNN_CHECK(api.Finalize(pack));
  CUDNN_CHECK(api.Execute(handle_, plan_, pack));
  CUDNN_CHECK(api.DestroyDescriptor(pack));
}

}  // namespace attune
