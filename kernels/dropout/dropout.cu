// Dropout on CUDA: the bits of the CPU, element by element.
#include <cmath>

#include "kernels/core/cuda.cuh"
#include "kernels/core/philox.h"
#include "kernels/dropout/dropout.h"

namespace attune {
namespace {

template <typename T, int N>
struct Drop {
  static constexpr int kPack = N;
  Rows<const T> x;
  Rows<T> y;
  const int32_t* step_pack;
  uint64_t first_row, columns;
  PhiloxKeys keys;
  uint32_t module, threshold;
  float scale;
  bool accumulate;

  __device__ PhiloxBlock Draw(uint64_t block, int32_t step, int32_t pack) const {
    const uint32_t high = static_cast<uint32_t>(block >> 32) & 0xffu;
    return Philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(step),
                        static_cast<uint32_t>(pack), module | high}},
                      keys);
  }
  // What element i of the pack becomes. No fused product and sum: the CPU rounds both.
  __device__ float Value(const Pack<T, N>& in, const Pack<T, N>& old, int i, uint32_t bits) const {
    const float kept = bits >= threshold ? __fmul_rn(in[i], scale) : 0.0f;
    return accumulate ? __fadd_rn(old[i], kept) : kept;
  }
  __device__ void operator()(int64_t row, int64_t c) const {
    const Pack<T, N> in = Pack<T, N>::Load(x(row, c));
    Pack<T, N> out{};
    if (accumulate) out = Pack<T, N>::Load(y(row, c));
    const int32_t step = step_pack[0], pack = step_pack[1];
    const uint64_t element = (first_row + row) * columns + c;
    if constexpr (N % 4 == 0) {  // then element is a multiple of 4, too
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const PhiloxBlock drawn = Draw((element + i) / 4, step, pack);
#pragma unroll
        for (int w = 0; w < 4; ++w) out.Set(i + w, Value(in, out, i + w, drawn.word[w]));
      }
    } else {
      const PhiloxBlock drawn = Draw(element / 4, step, pack);
      const int w = static_cast<int>(element % 4);
      const uint32_t low = w == 0 ? drawn.word[0] : drawn.word[1];
      const uint32_t high = w == 2 ? drawn.word[2] : drawn.word[3];
      out.Set(0, Value(in, out, 0, w < 2 ? low : high));
    }
    out.Store(y(row, c));
  }
};

}  // namespace

void DropoutCuda(const Exec& exec, const DropoutArgs& a) {
  const uint32_t threshold =
      static_cast<uint32_t>(std::min(std::round(a.p * 4294967296.0), 4294967295.0));
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    const auto run = [&]<int N>() {
      ForEachPack(Drop<T, N>{RowsOf<const T>(a.x), RowsOf<T>(a.y), Data<const int32_t>(a.step_pack),
                             static_cast<uint64_t>(a.first_row), static_cast<uint64_t>(a.x.dim(1)),
                             PhiloxKeysOf(static_cast<uint32_t>(a.seed),
                                          static_cast<uint32_t>(a.seed >> 32)),
                             a.layer << 16 | a.module << 8, threshold,
                             static_cast<float>(1.0 / (1.0 - a.p)), a.accumulate},
                  a.x.dim(0), a.x.dim(1), exec.stream);
    };
    if (Packable(kPackSize<T>, {&a.x, &a.y})) return run.template operator()<kPackSize<T>>();
    run.template operator()<1>();
  });
}

}  // namespace attune
