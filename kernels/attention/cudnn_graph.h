// Graphs of cuDNN's backend API, as far as attention needs them: tensors, operations, and the plan
// that executes them.
#pragma once

#include <cudnn.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace attune {

class CudnnGraph {
 public:
  using Descriptor = cudnnBackendDescriptor_t;

  struct Tensor {
    Descriptor descriptor = nullptr;
    int64_t strides[4] = {};
  };
  // How a tensor of four dimensions lies in memory.
  struct TensorOptions {
    cudnnDataType_t dtype = CUDNN_DATA_FLOAT;
    int64_t id = 0;                  // of a tensor that the caller provides; 0: inside the graph
    bool by_value = false;           // a scalar in host memory, read when the graph is executed
    const Tensor* ragged = nullptr;  // (B + 1) offsets of the first dimension, in elements
  };

  explicit CudnnGraph(cudnnHandle_t handle) : handle_(handle) {}
  CudnnGraph(const CudnnGraph&) = delete;
  CudnnGraph& operator=(const CudnnGraph&) = delete;
  ~CudnnGraph();

  Tensor Strided(const int64_t (&dims)[4], const int64_t (&strides)[4],
                 const TensorOptions& options);
  // Inside the graph, row-major.
  Tensor Virtual(const int64_t (&dims)[4], cudnnDataType_t dtype = CUDNN_DATA_FLOAT);
  Tensor Scalar(int64_t id);                // (1) f32 by value
  Tensor Counts(int64_t size, int64_t id);  // (size) i32

  // y = mode(x, b), with a selector t for BINARY_SELECT.
  struct PointwiseOptions {
    const Tensor* b = nullptr;
    const Tensor* t = nullptr;
    cudnnDataType_t precision = CUDNN_DATA_FLOAT;
    int64_t axis = -1;
    bool backward = false;  // x is dy, b is x, y is dx
  };
  void Pointwise(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& y,
                 const PointwiseOptions& options);
  // c = a b, on as many rows, columns and depth as the device says. `zero_padding`: what lies
  // beyond them in the result is 0.
  struct MatMulOptions {
    const Tensor *m = nullptr, *n = nullptr, *k = nullptr;
    bool zero_padding = false;
  };
  void MatMul(const Tensor& a, const Tensor& b, const Tensor& c, const MatMulOptions& options);
  void Reduce(cudnnReduceTensorOp_t op, const Tensor& x, const Tensor& y);
  void Reshape(const Tensor& x, const Tensor& y);

  // Ends the graph. False if no engine of this GPU runs it; `reason` then says why.
  bool Build(std::string* reason);
  int64_t workspace_bytes() const { return workspace_bytes_; }
  // In the order of the handle's stream.
  void Execute(const std::vector<std::pair<int64_t, void*>>& tensors, void* workspace) const;

 private:
  Descriptor New(cudnnBackendDescriptorType_t type);

  cudnnHandle_t handle_;
  std::vector<Descriptor> descriptors_;  // all that are owned
  std::vector<Descriptor> operations_;
  Descriptor plan_ = nullptr;
  int64_t next_id_ = 1000;
  int64_t workspace_bytes_ = 0;
};

}  // namespace attune
