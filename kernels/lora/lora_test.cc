#include "kernels/lora/lora.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::Tensor;

// Every element against its definition; what lies between the parts is zero, W and the corner stay.
TEST(LoraExtendTest, PutsBBesideAndABelow) {
  constexpr int64_t kR = 3, kK = 10, kN = 14, kE = 8;
  static_assert(LoraExtension(2, kR) == kE && LoraExtension(3, 16) == 48);
  std::mt19937_64 rng(7);
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    const auto random = [&](std::initializer_list<int64_t> shape) {
      return Tensor(dtype, shape).Random(&rng);
    };
    const Tensor a0 = random({kR, kK}), b0 = random({4, kR}), a1 = random({kR, kK}),
                 b1 = random({6, kR});
    const Tensor w(dtype, {kN + kE, kK + kE}, 5);
    const std::vector<double> before = w.ToVector();
    const LoraExtendPart parts[] = {{a0, b0, 1}, {a1, b1, 8}};
    LoraExtend(CpuExec(), {.parts = parts, .w = w, .scale = 0.5});
    const std::vector<double> got = w.ToVector(), va0 = a0.ToVector(), va1 = a1.ToVector(),
                              vb0 = b0.ToVector(), vb1 = b1.ToVector();
    for (int64_t n = 0; n < kN + kE; ++n) {
      for (int64_t c = 0; c < kK + kE; ++c) {
        const double value = got[n * (kK + kE) + c];
        if ((n < kN) == (c < kK)) {  // W and the corner
          const double old = before[n * (kK + kE) + c];
          EXPECT_TRUE(value == old || (std::isnan(value) && std::isnan(old)));
          continue;
        }
        double want = 0;
        if (c >= kK) {
          const int64_t j = c - kK;
          if (j < kR && n >= 1 && n < 5) want = 0.5 * vb0[(n - 1) * kR + j];
          if (j >= kR && j < 2 * kR && n >= 8) want = 0.5 * vb1[(n - 8) * kR + j - kR];
        } else {
          const int64_t j = n - kN;
          if (j < kR) want = va0[j * kK + c];
          if (j >= kR && j < 2 * kR) want = va1[(j - kR) * kK + c];
        }
        EXPECT_EQ(value, want) << n << ", " << c;
      }
    }
    w.ExpectGuardsIntact();
  }
}

}  // namespace
}  // namespace attune
