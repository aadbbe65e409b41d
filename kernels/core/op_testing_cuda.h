// Scaffolding of the CUDA ops' tests: one description of a call, run on the CPU and twice on the
// GPU, and every operand compared. The only place outside worker/memory that allocates device
// memory.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/cuda_error.h"
#include "kernels/core/op_testing.h"

namespace attune::op_testing {

inline bool HasGpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// Device memory of the scope, full of 0xff.
class DeviceBytes {
 public:
  explicit DeviceBytes(int64_t bytes) {
    CUDA_CHECK(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 1))));
    CUDA_CHECK(cudaMemset(data_, 0xff, static_cast<size_t>(bytes)));
  }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// What an op's call gets beside its operands: scratch on the device of the run.
class Scratch {
 public:
  explicit Scratch(DeviceKind device) : device_(device) {}
  TensorView operator()(int64_t bytes) {
    if (bytes == 0) return {};
    if (device_ == DeviceKind::kCuda) {
      device_memory_.push_back(std::make_unique<DeviceBytes>(bytes));
      return TensorView(device_memory_.back()->data(), DType::kU8, {bytes});
    }
    host_memory_.emplace_back(static_cast<size_t>(bytes) + 64, uint8_t{0xff});
    const auto address = reinterpret_cast<uintptr_t>(host_memory_.back().data());
    return TensorView(reinterpret_cast<void*>((address + 63) / 64 * 64), DType::kU8, {bytes});
  }

 private:
  DeviceKind device_;
  std::vector<std::unique_ptr<DeviceBytes>> device_memory_;
  std::vector<std::vector<uint8_t>> host_memory_;
};

// A call: the operands' views in order, and scratch.
using OpCall = std::function<void(const Exec&, const std::vector<TensorView>&, Scratch&)>;

constexpr double kSameBits = 0.0;

// Operands and what may become of each: kSameBits, or the largest error relative to the largest
// value that the CPU gives.
struct Operand {
  Tensor tensor;
  double tolerance = kSameBits;
};

inline std::vector<Tensor> RunOnCpu(const std::vector<Operand>& operands, const OpCall& call) {
  std::vector<Tensor> out;
  for (const Operand& o : operands) out.push_back(o.tensor);
  std::vector<TensorView> views;
  for (const Tensor& t : out) views.push_back(t.view());
  Scratch scratch(DeviceKind::kCpu);
  call(CpuExec(), views, scratch);
  return out;
}

inline std::vector<Tensor> RunOnGpu(const std::vector<Operand>& operands, const OpCall& call) {
  std::vector<std::unique_ptr<DeviceBytes>> memory;
  std::vector<TensorView> views;
  for (const Operand& o : operands) {
    const std::vector<uint8_t>& bytes = o.tensor.bytes();
    memory.push_back(std::make_unique<DeviceBytes>(static_cast<int64_t>(bytes.size())));
    CUDA_CHECK(
        cudaMemcpy(memory.back()->data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    views.push_back(o.tensor.view());
    views.back().data = memory.back()->data();
  }
  Scratch scratch(DeviceKind::kCuda);
  Exec exec;
  exec.device = DeviceKind::kCuda;
  call(exec, views, scratch);
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<Tensor> out;
  for (size_t i = 0; i < operands.size(); ++i) {
    out.push_back(operands[i].tensor);
    CUDA_CHECK(cudaMemcpy(out.back().view().data, memory[i]->data(), out.back().bytes().size(),
                          cudaMemcpyDeviceToHost));
  }
  return out;
}

// The GPU gives what the CPU gives, the same bits twice (if `repeatable`), and writes nothing
// beside its outputs.
inline void ExpectGpuAsCpu(const std::string& what, const std::vector<Operand>& operands,
                           const OpCall& call, bool repeatable = true) {
  const std::vector<Tensor> want = RunOnCpu(operands, call), got = RunOnGpu(operands, call);
  const std::vector<Tensor> again = RunOnGpu(operands, call);
  for (size_t i = 0; i < operands.size(); ++i) {
    const std::string name = what + ", operand " + std::to_string(i);
    EXPECT_TRUE(!repeatable || got[i].bytes() == again[i].bytes())
        << name << ": differs between runs";
    got[i].ExpectGuardsIntact();
    if (operands[i].tolerance == kSameBits) {
      EXPECT_TRUE(got[i].bytes() == want[i].bytes()) << name << ": bits differ";
      continue;
    }
    const std::vector<double> a = got[i].ToVector(), b = want[i].ToVector();
    double scale = 0.0, worst = 0.0;
    for (size_t j = 0; j < a.size(); ++j) {
      if (std::isnan(a[j]) && std::isnan(b[j])) continue;
      if (a[j] == b[j]) {
        if (std::isfinite(b[j])) scale = std::max(scale, std::abs(b[j]));
        continue;
      }
      const double error = std::abs(a[j] - b[j]);
      worst = std::isfinite(error) ? std::max(worst, error) : HUGE_VAL;
      if (std::isfinite(b[j])) scale = std::max(scale, std::abs(b[j]));
    }
    EXPECT_LE(scale > 0.0 ? worst / scale : worst, operands[i].tolerance) << name;
  }
}

using Views = std::vector<TensorView>;

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16};
// How far results may be apart whose sums have another order.
inline double Loose(DType dtype) {
  return dtype == DType::kF32 ? 2e-5 : 1e-2;
}

// (columns, padding between rows): packs of 16 bytes, and what forbids them.
struct Width {
  int64_t columns, padding;
};
inline std::string Name(DType dtype, const Width& w) {
  return std::string(DTypeName(dtype)) + " x" + std::to_string(w.columns) + "+" +
         std::to_string(w.padding);
}

class CudaOps : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasGpu()) GTEST_SKIP() << "no GPU";
  }
  Tensor Random(DType dtype, std::initializer_list<int64_t> shape, int64_t padding = 0,
                double deviation = 1.0) {
    Tensor out(dtype, shape, padding);
    return out.Random(&rng_, deviation);
  }
  std::mt19937_64 rng_{7};
};

}  // namespace attune::op_testing
