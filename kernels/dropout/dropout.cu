// Dropout on CUDA: the bits of the CPU, element by element.
#include <cmath>
#include <type_traits>

#include "kernels/core/cuda.cuh"
#include "kernels/core/philox.h"
#include "kernels/core/resident_blocks.cuh"
#include "kernels/dropout/dropout.h"

namespace attune {
namespace {

constexpr unsigned kThreads = 256;

template <typename T>
struct DropArgs {
  Rows<const T> x;
  Rows<T> y;
  const int32_t* step_pack;
  int64_t rows, columns;
  uint64_t first_element;
  int64_t rows_on, x_on, y_on, elements_on;  // from a row to the next one of the same thread
  PhiloxKeys keys;
  uint32_t module, threshold;
  float scale;
};

// What an element becomes. No fused product and sum: the CPU rounds both.
template <bool kAccumulate>
__device__ float Dropped(bool keep, float scale, float x, float old) {
  const float product = __fmul_rn(x, scale);
  const float kept = keep ? product : 0.0f;
  return kAccumulate ? __fadd_rn(old, kept) : kept;
}

// Of a word of 32 bits, of which a pack of elements consists. Two elements of bf16 are rounded at
// once.
template <typename T, bool kAccumulate>
__device__ uint32_t DroppedWord(const bool* keep, float scale, uint32_t x, uint32_t old) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(
        Dropped<kAccumulate>(keep[0], scale, __uint_as_float(x), __uint_as_float(old)));
  } else {
    const float2 in = PairAsFloats(x), before = PairAsFloats(old);
    return RoundedPair({Dropped<kAccumulate>(keep[0], scale, in.x, before.x),
                        Dropped<kAccumulate>(keep[1], scale, in.y, before.y)});
  }
}

// What a thread loads at once: elements of a pack as words, or a single element.
template <typename T, int N>
using Loaded = std::conditional_t<N == 1, Pack<T, 1>, Pack<uint32_t, N * sizeof(T) / 4>>;

// A thread takes the same columns of every so many-th row. While it draws the bits of one row, the
// next one is on its way.
template <typename T, int N, bool kAccumulate>
__global__ __launch_bounds__(kThreads) void DropoutKernel(const __grid_constant__ DropArgs<T> a) {
  using L = Loaded<T, N>;
  const auto load = [](const T* p) { return *reinterpret_cast<const L*>(p); };
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  if (column >= a.columns || row >= a.rows) return;
  const T* from = a.x(row, column);
  T* to = a.y(row, column);
  uint64_t element = a.first_element + row * a.columns + column;
  AwaitEarlier();
  const uint32_t step = a.step_pack[0], pack = a.step_pack[1];
  const auto draw = [&](uint32_t low, uint32_t high) {
    return Philox4x32({{low, step, pack, a.module | (high & 0xffu)}}, a.keys);
  };
  L next = load(from);
#pragma unroll 1
  while (row < a.rows) {
    const L x = next;
    L y{};
    if constexpr (kAccumulate) y = load(to);
    from += a.x_on;
    row += a.rows_on;
    if (row < a.rows) next = load(from);
    const uint32_t low =
        __funnelshift_r(static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32), 2);
    const uint32_t high = static_cast<uint32_t>(element >> 34);
    if constexpr (N > 1) {  // then element is a multiple of N, too
      constexpr int kPerWord = 4 / sizeof(T), kWords = 4 / kPerWord;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const PhiloxBlock drawn = draw(low + i, high);
        bool keep[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) keep[w] = drawn.word[w] >= a.threshold;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int at = i * kWords + w;
          y.v[at] = DroppedWord<T, kAccumulate>(keep + w * kPerWord, a.scale, x.v[at], y.v[at]);
        }
      }
    } else {
      const PhiloxBlock drawn = draw(low, high);
      const int w = static_cast<int>(element % 4);
      const uint32_t first = w == 0 ? drawn.word[0] : drawn.word[1];
      const uint32_t second = w == 2 ? drawn.word[2] : drawn.word[3];
      y.Set(0, Dropped<kAccumulate>((w < 2 ? first : second) >= a.threshold, a.scale, x[0], y[0]));
    }
    *reinterpret_cast<L*>(to) = y;
    to += a.y_on;
    element += a.elements_on;
  }
}

template <typename T, int N>
void Launch(DropArgs<T> args, bool accumulate, void* stream) {
  const auto kernel = accumulate ? DropoutKernel<T, N, true> : DropoutKernel<T, N, false>;
  const int64_t packs = args.columns / N;
  unsigned width = 32;
  while (width < kThreads && width < packs) width *= 2;
  const dim3 block(width, kThreads / width);
  const int64_t across = (packs + width - 1) / width, down = (args.rows + block.y - 1) / block.y;
  const int64_t blocks = ResidentBlocks(kernel, kThreads, across * down);
  const dim3 grid(static_cast<unsigned>(across),
                  static_cast<unsigned>(std::clamp<int64_t>(blocks / across, 1, 65535)));
  args.rows_on = int64_t{grid.y} * block.y;
  args.x_on = args.rows_on * args.x.stride;
  args.y_on = args.rows_on * args.y.stride;
  args.elements_on = args.rows_on * args.columns;
  LaunchEarly(stream, {grid, block}, kernel, args);
}

}  // namespace

void DropoutCuda(const Exec& exec, const DropoutArgs& a) {
  const int64_t rows = a.x.dim(0), columns = a.x.dim(1);
  if (rows == 0 || columns == 0) return;
  const uint32_t threshold =
      static_cast<uint32_t>(std::min(std::round(a.p * 4294967296.0), 4294967295.0));
  DispatchCudaFloat(a.x.dtype, [&]<typename T>() {
    const DropArgs<T> args{
        .x = RowsOf<const T>(a.x),
        .y = RowsOf<T>(a.y),
        .step_pack = Data<const int32_t>(a.step_pack),
        .rows = rows,
        .columns = columns,
        .first_element = static_cast<uint64_t>(a.first_row) * static_cast<uint64_t>(columns),
        .keys = PhiloxKeysOf(static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32)),
        .module = a.layer << 16 | a.module << 8,
        .threshold = threshold,
        .scale = static_cast<float>(1.0 / (1.0 - a.p))};
    constexpr int kPack = kPackSize<T>;
    if (Packable(kPack, {&a.x, &a.y})) return Launch<T, kPack>(args, a.accumulate, exec.stream);
    Launch<T, 1>(args, a.accumulate, exec.stream);
  });
}

}  // namespace attune
