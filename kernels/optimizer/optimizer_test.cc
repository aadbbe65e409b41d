// AdamW against torch.optim.AdamW's own numbers and a reference in double; 8-bit AdamW and Lion
// against bitsandbytes over 100 steps (tests/parity/optimizer); clipping.
#include "kernels/optimizer/optimizer.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/core/dynamic_map.h"
#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

// From torch 2.x on a CPU, float32: three steps of
//   torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
// from p = [1, -2, 0.5, 3], with gradients g, g * 0.5, -g, g = [0.1, -0.02, 3, 0].
// Its vector code fuses some products with the sum after them, hence a last bit.
constexpr float kTorchParams[3][4] = {
    {0x1.fa5e360000000p-1f, -0x1.fced920000000p+0f, 0x1.f53f7e0000000p-2f, 0x1.7f9db20000000p+1f},
    {0x1.f50d700000000p-1f, -0x1.fa03b60000000p+0f, 0x1.eb20e00000000p-2f, 0x1.7f3b7e0000000p+1f},
    {0x1.f3fbfc0000000p-1f, -0x1.f939940000000p+0f, 0x1.e980c80000000p-2f, 0x1.7ed9620000000p+1f}};
constexpr float kTorchM[4] = {0x1.54c9880000000p-9f, -0x1.10a13a0000000p-11f, 0x1.3f7cee0000000p-4f,
                              0.0f};
constexpr float kTorchV[4] = {0x1.187e7e0000000p-10f, 0x1.67084e0000000p-15f, 0x1.ed0e580000000p-1f,
                              0.0f};

TEST(AdamWTest, MatchesTorch) {
  Tensor param(DType::kF32, {4}), grad(DType::kF32, {4}), m(DType::kF32, {4}), v(DType::kF32, {4});
  param.Assign({1.0, -2.0, 0.5, 3.0}), m.Constant(0.0), v.Constant(0.0);
  const double factors[] = {1.0, 0.5, -1.0};
  for (int step = 1; step <= 3; ++step) {
    const float f = static_cast<float>(factors[step - 1]);
    grad.Assign({0.1f * f, -0.02f * f, 3.0f * f, 0.0f * f});
    const AdamWTensor tensors[] = {{param, grad, m, v, 0.1}};
    AdamW(CpuExec(),
          {.tensors = tensors, .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .step = step});
    for (int i = 0; i < 4; ++i) {
      EXPECT_FLOAT_EQ(static_cast<float>(param[i]), kTorchParams[step - 1][i]) << step << " " << i;
    }
  }
  for (int i = 0; i < 4; ++i) {
    EXPECT_FLOAT_EQ(static_cast<float>(m[i]), kTorchM[i]);
    EXPECT_FLOAT_EQ(static_cast<float>(v[i]), kTorchV[i]);
  }
}

TEST(AdamWTest, MatchesReferenceOnManyTensors) {
  for (DType dtype : {DType::kF32, DType::kF64}) {
    std::mt19937_64 rng(1);
    const double lr = 3e-3, beta1 = 0.4, beta2 = 0.999, eps = 1e-6, scale = 0.25;
    std::vector<Tensor> params, grads, ms, vs;
    for (int64_t n : {1, 41, 20001}) {
      for (auto* list : {&params, &grads, &ms, &vs}) {
        list->emplace_back(dtype, std::initializer_list<int64_t>{n});
        list->back().Random(&rng);
      }
      for (int64_t i = 0; i < n; ++i) vs.back().Set(i, std::abs(vs.back()[i]));
    }
    std::vector<AdamWTensor> tensors;
    std::vector<std::vector<double>> want;
    for (size_t t = 0; t < params.size(); ++t) {
      const double decay = t == 1 ? 0.0 : 0.05;
      tensors.push_back({params[t], grads[t], ms[t], vs[t], decay});
      want.emplace_back();
      for (int64_t i = 0; i < params[t].size(); ++i) {
        const double g = grads[t][i] * scale;
        const double m = beta1 * ms[t][i] + (1 - beta1) * g;
        const double v = beta2 * vs[t][i] + (1 - beta2) * g * g;
        const double update =
            m / (1 - std::pow(beta1, 7)) / (std::sqrt(v / (1 - std::pow(beta2, 7))) + eps);
        want.back().push_back(params[t][i] * (1 - lr * decay) - lr * update);
      }
    }
    Tensor grad_scale(DType::kF32, {1});
    grad_scale.Constant(scale);
    AdamW(CpuExec(), {.tensors = tensors,
                      .grad_scale = grad_scale,
                      .lr = lr,
                      .beta1 = beta1,
                      .beta2 = beta2,
                      .eps = eps,
                      .step = 7});
    for (size_t t = 0; t < params.size(); ++t) {
      op_testing::ExpectClose(params[t], want[t], dtype == DType::kF64 ? 1e-14 : 1e-6, "param");
    }
  }
}

TEST(AdamWTest, AParameterGroupHasItsLearningRate) {
  Tensor param(DType::kF32, {3}), grad(DType::kF32, {3}), m(DType::kF32, {3}), v(DType::kF32, {3});
  const auto step = [&](double lr, double lr_scale) {
    param.Assign({1, 2, 3}), grad.Assign({0.1, -0.2, 3}), m.Constant(0), v.Constant(0);
    const AdamWTensor tensors[] = {{param, grad, m, v, 0.1, lr_scale}};
    AdamW(CpuExec(), {.tensors = tensors, .lr = lr});
    return param.ToVector();
  };
  EXPECT_EQ(step(1e-2, 8), step(8e-2, 1));
  EXPECT_NE(step(1e-2, 8), step(1e-2, 1));
}

const nlohmann::json& OptimizerGolden() {
  static const nlohmann::json golden = [] {
    std::ifstream in(std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/optimizer/golden.json");
    return nlohmann::json::parse(in);
  }();
  return golden;
}

// The formulas of make_golden.py.
Tensor GoldenParameters() {
  Tensor param(DType::kF32, {OptimizerGolden()["size"].get<int64_t>()});
  for (int64_t i = 0; i < param.size(); ++i) {
    param.Set(i, 0.5 * std::sin(1.7 * static_cast<double>(i)));
  }
  return param;
}
void SetGoldenGradient(int64_t step, Tensor* grad) {
  for (int64_t i = 0; i < grad->size(); ++i) {
    const double wave = std::sin(0.37 * static_cast<double>(i) + 0.11 * static_cast<double>(step));
    grad->Set(i, i % 11 == 3 ? 0.0 : std::pow(10.0, static_cast<double>(-(i % 7))) * wave);
  }
}

int64_t DifferentCodes(const Tensor& codes, const nlohmann::json& want) {
  int64_t different = 0;
  for (int64_t i = 0; i < codes.size(); ++i) {
    const int apart = std::abs(static_cast<int>(codes[i]) - want[i].get<int>());
    EXPECT_LE(apart, 1) << i;
    different += apart != 0;
  }
  return different;
}

TEST(AdamW8bitTest, MapsAreThoseOfBitsandbytes) {
  for (int i = 0; i < 256; ++i) {
    EXPECT_EQ(DynamicMap(true)[i], OptimizerGolden()["signed_map"][i].get<float>()) << i;
    EXPECT_EQ(DynamicMap(false)[i], OptimizerGolden()["unsigned_map"][i].get<float>()) << i;
    EXPECT_EQ(NearestDynamicCode(DynamicMap(false), DynamicMap(false)[i]), i);
  }
}

TEST(AdamW8bitTest, NearestCodeIsThatOfASearch) {
  for (const bool is_signed : {true, false}) {
    const float* map = DynamicMap(is_signed);
    const auto nearest = [&](float x) {
      int best = 0;
      for (int code = 1; code < 256; ++code) {
        const float middle = (map[code - 1] + map[code]) * 0.5f;
        if (x > middle || (x == middle && code % 2 == 0)) best = code;
      }
      return best;
    };
    std::vector<float> all{0.0f, -0.0f, 1.0f, -1.0f, 7.0f, -7.0f, 1e-30f, -1e-30f, INFINITY};
    for (int code = 1; code < 256; ++code) {
      for (const float x : {map[code], (map[code - 1] + map[code]) * 0.5f}) {
        all.insert(all.end(), {x, std::nextafter(x, -2.0f), std::nextafter(x, 2.0f)});
      }
    }
    std::mt19937_64 rng(1);
    for (int i = 0; i < 20000; ++i) {
      const float size = std::pow(10.0f, -8.0f * static_cast<float>(rng() % 100000) / 100000.0f);
      all.push_back(rng() % 2 == 0 ? size : -size);
    }
    for (const float x : all) ASSERT_EQ(NearestDynamicCode(map, x), nearest(x)) << x;
    const auto expect_by_bins = [&]<bool kSigned>() {
      using Bins = DynamicCodeBins<kSigned>;
      std::vector<uint32_t> bins(Bins::kCount);
      for (int i = 0; i < Bins::kCount; ++i) bins[i] = Bins::Bin(map, i);
      for (const float x : all) {
        if (x > 1.0f || x < (kSigned ? -1.0f : 0.0f)) continue;
        ASSERT_EQ(Bins::Find(bins.data(), x) >> 24, nearest(x)) << x;
      }
    };
    is_signed ? expect_by_bins.operator()<true>() : expect_by_bins.operator()<false>();
  }
}

TEST(AdamW8bitTest, EqualsBitsandbytesOver100Steps) {
  Tensor param = GoldenParameters();
  const int64_t n = param.size(), blocks = AdamW8bitBlocks(n);
  ASSERT_EQ(blocks, 3);
  Tensor grad(DType::kF32, {n}), m(DType::kU8, {n}), v(DType::kU8, {n});
  Tensor m_absmax(DType::kF32, {blocks}), v_absmax(DType::kF32, {blocks});
  m_absmax.Constant(0), v_absmax.Constant(0);  // the codes are poison, which is no matter
  for (int64_t step = 0; step < OptimizerGolden()["steps"].get<int64_t>(); ++step) {
    SetGoldenGradient(step, &grad);
    const AdamW8bitTensor tensors[] = {{param, grad, m, v, m_absmax, v_absmax, 0.1}};
    AdamW8bit(CpuExec(), {.tensors = tensors,
                          .lr = 1e-2,
                          .beta1 = 0.9,
                          .beta2 = 0.95,
                          .eps = 1e-8,
                          .step = step + 1});
  }
  const nlohmann::json& want = OptimizerGolden()["adamw_8bit"];
  op_testing::ExpectClose(param, want["param"], 1e-5, "param");
  op_testing::ExpectClose(m_absmax, want["m_absmax"], 1e-6, "m_absmax");
  op_testing::ExpectClose(v_absmax, want["v_absmax"], 1e-6, "v_absmax");
  // A value between two codes may fall to either by a last bit.
  EXPECT_LE(DifferentCodes(m, want["m"]), 2);
  EXPECT_LE(DifferentCodes(v, want["v"]), 2);
  for (const Tensor* x : {&param, &m, &v, &m_absmax, &v_absmax}) x->ExpectGuardsIntact();
}

TEST(AdamW8bitTest, IsCloseToAdamWAndTheSameOnAnyThreadCount) {
  constexpr int64_t kElements = 40001;
  op_testing::ExpectSameOnAnyThreadCount([&] {
    std::mt19937_64 rng(3);
    Tensor param(DType::kF32, {kElements}), grad(DType::kF32, {kElements});
    Tensor m(DType::kU8, {kElements}), v(DType::kU8, {kElements});
    Tensor m_absmax(DType::kF32, {AdamW8bitBlocks(kElements)}), v_absmax = m_absmax;
    m_absmax.Constant(0), v_absmax.Constant(0);
    param.Random(&rng);
    Tensor exact = param, exact_m(DType::kF32, {kElements}), exact_v = exact_m;
    exact_m.Constant(0), exact_v.Constant(0);
    for (int step = 1; step <= 5; ++step) {
      grad.Random(&rng);
      const AdamW8bitTensor tensors[] = {{param, grad, m, v, m_absmax, v_absmax}};
      AdamW8bit(CpuExec(), {.tensors = tensors, .lr = 1e-2, .step = step});
      const AdamWTensor wide[] = {{exact, grad, exact_m, exact_v}};
      AdamW(CpuExec(), {.tensors = wide, .lr = 1e-2, .step = step});
    }
    double error = 0;
    for (int64_t i = 0; i < kElements; ++i) error += std::abs(param[i] - exact[i]);
    EXPECT_LT(error / kElements, 1e-3);
    EXPECT_GT(error, 0);
    return param.bytes();
  });
}

TEST(LionTest, EqualsBitsandbytesOver100Steps) {
  Tensor param = GoldenParameters(), grad(DType::kF32, {param.size()}), m = grad;
  m.Constant(0);
  for (int64_t step = 0; step < OptimizerGolden()["steps"].get<int64_t>(); ++step) {
    SetGoldenGradient(step, &grad);
    const LionTensor tensors[] = {{param, grad, m, 0.1}};
    Lion(CpuExec(), {.tensors = tensors, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.99});
  }
  op_testing::ExpectClose(param, OptimizerGolden()["lion"]["param"], 1e-6, "param");
  op_testing::ExpectClose(m, OptimizerGolden()["lion"]["m"], 1e-6, "m");
}

double NormSquared(std::initializer_list<const Tensor*> tensors) {
  std::vector<TensorView> grads;
  for (const Tensor* t : tensors) grads.push_back(*t);
  const Tensor norm_sq(DType::kF64, {1});
  GradNormArgs args{.grads = grads, .norm_sq = norm_sq};
  const Tensor workspace = op_testing::Bytes(GradNormWorkspaceBytes(CpuExec(), args));
  args.workspace = workspace;
  GradNorm(CpuExec(), args);
  workspace.ExpectGuardsIntact();
  return norm_sq[0];
}

// Runs the golden's 100 steps on (rows, columns), or on a vector where columns is 0.
void ExpectAsTransformers(const char* name, int64_t rows, int64_t columns, AdafactorArgs args,
                          double weight_decay) {
  const nlohmann::json& want = OptimizerGolden()[name];
  const Tensor param = GoldenParameters();
  const int64_t n = param.size();
  ASSERT_EQ(n, columns == 0 ? rows : rows * columns);
  Tensor grad(DType::kF32, {n}), m(DType::kF32, {n});
  Tensor v_row(DType::kF32, {rows}), v_column(DType::kF32, {columns});
  m.Constant(0), v_row.Constant(0), v_column.Constant(0);
  AdafactorTensor tensor = {.param = param,
                            .grad = grad,
                            .v_row = v_row,
                            .v_column = v_column,
                            .m = m,
                            .weight_decay = weight_decay};
  if (columns > 0) {
    tensor.param = tensor.param.Reshape({rows, columns});
    tensor.grad = tensor.grad.Reshape({rows, columns});
  }
  args.tensors = {&tensor, 1};
  for (int64_t step = 0; step < OptimizerGolden()["steps"].get<int64_t>(); ++step) {
    SetGoldenGradient(step, &grad);
    args.step = step + 1;
    Adafactor(op_testing::CpuExec(), args);
  }
  const auto expect = [&](const char* key, const Tensor& got) {
    op_testing::ExpectClose(got, want[key].get<std::vector<double>>(), 2e-6,
                            std::string(name) + " " + key);
  };
  expect("param", param);
  expect(columns > 0 ? "exp_avg_sq_row" : "exp_avg_sq", v_row);
  if (columns > 0) expect("exp_avg_sq_col", v_column);
}

TEST(AdafactorTest, EqualsTransformersOver100Steps) {
  ExpectAsTransformers("adafactor", 24, 25, {.lr = 1e-2}, 0);
  ExpectAsTransformers("adafactor_vector", OptimizerGolden()["size"], 0, {.lr = 1e-2}, 0);
  ExpectAsTransformers("adafactor_options", 24, 25,
                       {.lr = 1e-2,
                        .beta1 = 0.9,
                        .eps = 1e-12,
                        .clip_threshold = 0.3,
                        .decay_rate = 0.6,
                        .scale_parameter = true},
                       0.1);
}

TEST(AdafactorTest, IsTheSameOnAnyThreadCountAndScalesGradients) {
  std::mt19937_64 rng(5);
  Tensor start(DType::kF32, {301, 131}), gradient(DType::kF32, {301, 131});
  start.Random(&rng);
  gradient.Random(&rng);
  const auto run = [&](double factor) {
    Tensor param = start, grad = gradient, scale(DType::kF32, {1});
    for (int64_t i = 0; i < grad.size(); ++i) grad.Set(i, gradient[i] / factor);
    scale.Constant(factor);
    Tensor row(DType::kF32, {301}), column(DType::kF32, {131});
    row.Constant(0), column.Constant(0);
    const AdafactorTensor tensor = {.param = param, .grad = grad, .v_row = row, .v_column = column};
    Adafactor(op_testing::CpuExec(), {.tensors = {&tensor, 1}, .grad_scale = scale, .lr = 0.1});
    return param.bytes();
  };
  op_testing::ExpectSameOnAnyThreadCount([&] { return run(1); });
  EXPECT_EQ(run(4), run(1));
  EXPECT_NE(run(1), start.bytes());
}

TEST(GradNormTest, SumsSquaresOfAllTensors) {
  std::mt19937_64 rng(2);
  Tensor a(DType::kF32, {7, 41}), b(DType::kF32, {50001}), c(DType::kF64, {3}),
      none(DType::kF32, {0});
  a.Random(&rng), b.Random(&rng), c.Random(&rng);
  double want = 0.0;
  for (const Tensor* t : {&a, &b, &c}) want += op_testing::Dot(*t, *t);
  EXPECT_NEAR(NormSquared({&a, &none, &b, &c}), want, 1e-10 * want);
  EXPECT_EQ(NormSquared({}), 0.0);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    Tensor out(DType::kF64, {1});
    out.Set(0, NormSquared({&a, &b}));
    return out.bytes();
  });
  b.Constant(1e30);
  EXPECT_NEAR(NormSquared({&b}) / (50001e60), 1.0, 1e-6) << "overflows in f32, not here";
  b.Set(40000, INFINITY);
  EXPECT_EQ(NormSquared({&a, &b}), INFINITY);
  b.Set(3, NAN);
  EXPECT_TRUE(std::isnan(NormSquared({&a, &b})));
}

TEST(ClipScaleTest, AsTorch) {
  const auto clip = [](double norm_sq_value, double max_norm) {
    Tensor norm_sq(DType::kF64, {1}), scale(DType::kF32, {1}), norm(DType::kF32, {1});
    norm_sq.Set(0, norm_sq_value);
    ClipScale(CpuExec(), {.norm_sq = norm_sq, .scale = scale, .norm = norm, .max_norm = max_norm});
    return std::pair{norm[0], scale[0]};
  };
  EXPECT_EQ(clip(4.0, 0.0), (std::pair{2.0, 1.0}));
  EXPECT_EQ(clip(4.0, 3.0), (std::pair{2.0, 1.0}));
  EXPECT_EQ(clip(16.0, 1.0).first, 4.0);
  EXPECT_FLOAT_EQ(clip(16.0, 1.0).second, 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(clip(INFINITY, 1.0), (std::pair{double{INFINITY}, 0.0}));
  EXPECT_TRUE(std::isnan(clip(NAN, 1.0).first));
  EXPECT_TRUE(std::isnan(clip(NAN, 1.0).second));
  EXPECT_TRUE(std::isnan(clip(NAN, 0.0).second));
}

}  // namespace
}  // namespace attune
