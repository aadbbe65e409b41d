// The CUDA optimisers against the CPU's: many tensors of odd sizes. Skipped, saying so, where there
// is no GPU.
#include "kernels/core/op_testing_cuda.h"
#include "kernels/optimizer/optimizer.h"

namespace attune {
namespace {

using namespace op_testing;  // NOLINT: the scaffolding of this file

using CudaOptimizer = CudaOps;

TEST_F(CudaOptimizer, AdamWAndTheNorm) {
  constexpr int64_t kSizes[] = {1, 37, 8192, 20001};
  std::vector<Operand> operands;
  operands.push_back({Tensor(DType::kF32, {1}).Constant(0.5)});
  for (int i = 0; i < 60; ++i) {  // more than one launch takes
    const int64_t n = kSizes[i % 4];
    for (int k = 0; k < 3; ++k) operands.push_back({Random(DType::kF32, {n})});
    Tensor v = Random(DType::kF32, {n});
    for (int64_t e = 0; e < n; ++e) v.Set(e, std::abs(v[e]));
    operands.push_back({v});
  }
  ExpectGpuAsCpu("adamw", operands, [](const Exec& exec, const Views& v, Scratch&) {
    std::vector<AdamWTensor> tensors;
    for (size_t i = 1; i < v.size(); i += 4) {
      tensors.push_back(
          {v[i], v[i + 1], v[i + 2], v[i + 3], i % 8 == 1 ? 0.1 : 0.0, i % 8 == 1 ? 4.0 : 1.0});
    }
    AdamW(exec, {.tensors = tensors, .grad_scale = v[0], .lr = 1e-2, .step = 3});
  });
  operands[0] = {Tensor(DType::kF64, {1}), 1e-12};
  operands.push_back({Tensor(DType::kF32, {1}), 1e-6});
  operands.push_back({Tensor(DType::kF64, {1}), 1e-12});
  ExpectGpuAsCpu("norm", operands, [](const Exec& exec, const Views& v, Scratch& scratch) {
    const std::vector<TensorView> grads(v.begin() + 1, v.end() - 2);
    GradNormArgs args{.grads = grads, .norm_sq = v[0]};
    args.workspace = scratch(GradNormWorkspaceBytes(exec, args));
    GradNorm(exec, args);
    ClipScale(
        exec,
        {.norm_sq = v[0], .scale = v[v.size() - 2], .norm = v[v.size() - 1], .max_norm = 1.0});
  });
}

class CudaAdamW8bit : public CudaOps {
 protected:
  void Expect(const std::vector<int64_t>& sizes) {
    std::vector<Operand> operands;
    operands.push_back({Tensor(DType::kF32, {1}).Constant(0.5)});
    for (const int64_t n : sizes) {
      const int64_t blocks = AdamW8bitBlocks(n);
      operands.push_back({Random(DType::kF32, {n})});
      operands.push_back({Random(DType::kF32, {n})});
      for (const int64_t factor : {37, 91}) {
        Tensor codes(DType::kU8, {n});
        for (int64_t e = 0; e < n; ++e) codes.Set(e, static_cast<double>(e * factor % 256));
        operands.push_back({codes});
      }
      for (int k = 0; k < 2; ++k) {
        Tensor absmax = Random(DType::kF32, {blocks});
        for (int64_t e = 0; e < blocks; ++e) absmax.Set(e, e % 5 == 4 ? 0 : std::abs(absmax[e]));
        operands.push_back({absmax});
      }
    }
    ExpectGpuAsCpu("adamw 8-bit", operands, [](const Exec& exec, const Views& v, Scratch&) {
      std::vector<AdamW8bitTensor> tensors;
      for (size_t i = 1; i < v.size(); i += 6) {
        tensors.push_back(
            {v[i], v[i + 1], v[i + 2], v[i + 3], v[i + 4], v[i + 5], 0.1, i % 12 == 1 ? 4.0 : 1.0});
      }
      AdamW8bit(exec, {.tensors = tensors, .grad_scale = v[0], .lr = 1e-2, .step = 3});
    });
  }
};

// More than one launch takes.
TEST_F(CudaAdamW8bit, Many) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < 50; ++i) sizes.push_back(i % 3 == 0 ? 1 : i % 3 == 1 ? 600 : 8192);
  Expect(sizes);
}

// A warp has several blocks of states, of one tensor and of another.
TEST_F(CudaAdamW8bit, Long) {
  Expect({2500000, 300, 1200001});
}

TEST_F(CudaOptimizer, Lion) {
  std::vector<Operand> operands;
  operands.push_back({Tensor(DType::kF32, {1}).Constant(0.5)});
  for (int i = 0; i < 60; ++i) {
    for (int k = 0; k < 3; ++k) operands.push_back({Random(DType::kF32, {i % 2 ? 20001 : 37})});
  }
  ExpectGpuAsCpu("lion", operands, [](const Exec& exec, const Views& v, Scratch&) {
    std::vector<LionTensor> tensors;
    for (size_t i = 1; i < v.size(); i += 3) {
      tensors.push_back({v[i], v[i + 1], v[i + 2], 0.1, i % 6 == 1 ? 4.0 : 1.0});
    }
    Lion(exec, {.tensors = tensors, .grad_scale = v[0], .lr = 1e-3});
  });
}

// (rows, columns), of a vector 0 columns.
using Shapes = std::vector<std::pair<int64_t, int64_t>>;

class CudaAdafactor : public CudaOps {
 protected:
  static constexpr int kSteps = 4, kEach = 4 + kSteps;
  // Sums in another order, in f64, rounded to f32: hardly a bit differs.
  static constexpr double kTolerance = 1e-6;

  // The gradients' scale; then of each tensor param, v_row, v_column, m and a gradient a step.
  std::vector<Operand> Operands(const Shapes& shapes, double grad_scale) {
    std::vector<Operand> operands;
    operands.push_back({Tensor(DType::kF32, {1}).Constant(grad_scale)});
    for (const auto& [rows, columns] : shapes) {
      const auto random = [&, rows = rows, columns = columns](double deviation) {
        return columns == 0 ? Random(DType::kF32, {rows}, 0, deviation)
                            : Random(DType::kF32, {rows, columns}, 0, deviation);
      };
      operands.push_back({random(0.1), kTolerance});
      for (const int64_t n : {rows, columns, rows * std::max<int64_t>(1, columns)}) {
        operands.push_back({Tensor(DType::kF32, {n}).Constant(0), kTolerance});
      }
      for (int step = 0; step < kSteps; ++step) operands.push_back({random(1e-3)});
    }
    return operands;
  }

  static AdafactorTensor TensorAt(const Views& v, size_t i, int step) {
    return {.param = v[i],
            .grad = v[i + 4 + step],
            .v_row = v[i + 1],
            .v_column = v[i].rank == 1 ? TensorView() : v[i + 2],
            .m = v[i + 3],
            .weight_decay = i % 3 == 0 ? 0.1 : 0.0,
            .lr_scale = i % 2 == 0 ? 4.0 : 1.0};
  }

  void Expect(const std::string& what, const std::vector<Operand>& operands, AdafactorArgs args) {
    const auto steps = [&](const Exec& exec, const Views& v, Scratch& scratch) {
      for (int step = 0; step < kSteps; ++step) {
        std::vector<AdafactorTensor> tensors;
        for (size_t i = 1; i < v.size(); i += kEach) tensors.push_back(TensorAt(v, i, step));
        args.tensors = tensors;
        args.grad_scale = v[0];
        args.step = step + 1;
        args.workspace = scratch(AdafactorWorkspaceBytes(exec, args));
        Adafactor(exec, args);
      }
    };
    ExpectGpuAsCpu(what, operands, steps);
  }
};

constexpr AdafactorArgs kOptions = {.lr = 1e-2,
                                    .beta1 = 0.9,
                                    .eps = 1e-12,
                                    .clip_threshold = 0.3,
                                    .decay_rate = 0.6,
                                    .scale_parameter = true};

// Less and more than a tile, a piece of averages, and a launch.
TEST_F(CudaAdafactor, Many) {
  Shapes shapes = {{1, 1},     {1, 0},     {3, 700},  {700, 3},
                   {301, 131}, {129, 257}, {16, 128}, {1000, 0}};
  for (int i = 0; i < 50; ++i) shapes.push_back({5 + i, i % 7 == 0 ? 0 : 300 - i});
  Expect("plain", Operands(shapes, 0.5), {.lr = 1e-2});
  Expect("with options", Operands(shapes, 0.5), kOptions);
  Expect("not finite", Operands({{3, 5}, {7, 0}}, NAN), {.lr = 1e-2});
}

// Some that fit into shared memory four, two and one at a time.
TEST_F(CudaAdafactor, Wide) {
  const Shapes shapes = {{16, 5851}, {5, 33333}, {32, 5000},  {600, 600},
                         {64, 5851}, {30001, 0}, {150000, 0}, {16, 4096}};
  Expect("wide, plain", Operands(shapes, 0.5), {.lr = 1e-2});
  Expect("wide, with options", Operands(shapes, 0.5), kOptions);
}

// Tiles of more than 1024 elements.
TEST_F(CudaAdafactor, Large) {
  const Shapes shapes = {{1000, 1500}, {70001, 130}, {1200001, 0}};
  Expect("large", Operands(shapes, 0.5), kOptions);
}

}  // namespace
}  // namespace attune
