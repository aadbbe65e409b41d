#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernels/core/dispatch.h"
#include "kernels/core/dynamic_map.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/nf4/nf4.h"

namespace attune {
namespace {

// Below it a block counts as zero, so that its reciprocal is finite (as bitsandbytes).
constexpr float kMinAbsMax = 1e-38f;

// Between which values lies the border of codes i and i + 1.
std::array<float, 15> MakeBorders() {
  std::array<float, 15> borders;
  for (int i = 0; i < 15; ++i) borders[i] = (Nf4Values()[i] + Nf4Values()[i + 1]) / 2.0f;
  return borders;
}

template <typename T>
ATTUNE_CLONES float LargestMagnitude(const T* w, int64_t n) {
  float largest[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const float value = std::abs(ToAccumulator(w[i + l]));
      largest[l] = value > largest[l] ? value : largest[l];
    }
  }
  for (int l = 0; i + l < n; ++l) {
    largest[l] = std::max(largest[l], std::abs(ToAccumulator(w[i + l])));
  }
  return *std::max_element(largest, largest + kLanes);
}

// Codes of one block; `scaled` is w / absmax.
ATTUNE_CLONES void EncodeBlock(const float* borders, const float* scaled, uint8_t* codes) {
#pragma omp simd
  for (int i = 0; i < kNf4Block; ++i) {
    int code = 0;
    for (int b = 0; b < 15; ++b) code += scaled[i] > borders[b] ? 1 : 0;
    codes[i] = static_cast<uint8_t>(code);
  }
}

template <typename T>
void Quantize(const Nf4QuantizeArgs& a) {
  static const std::array<float, 15> borders = MakeBorders();
  const int64_t size = a.w.size(), blocks = Nf4Blocks(size);
  const T* w = a.w.As<T>();
  uint8_t* packed = a.packed.As<uint8_t>();
#pragma omp parallel for schedule(static) if (WorthThreads(size))
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * kNf4Block, n = std::min(kNf4Block, size - begin);
    float absmax = LargestMagnitude(w + begin, n);
    const bool tail = n < kNf4Block;
    float scaled[kNf4Block] = {};
    // A short last block keeps the raised maximum and is divided; a whole one is multiplied by the
    // reciprocal. The bits of bitsandbytes hang on it.
    if (tail) absmax = std::max(absmax, kMinAbsMax);
    const float reciprocal = 1.0f / std::max(absmax, kMinAbsMax);
    for (int64_t i = 0; i < n; ++i) {
      const float value = ToAccumulator(w[begin + i]);
      scaled[i] = std::clamp(tail ? value / absmax : value * reciprocal, -1.0f, 1.0f);
    }
    a.absmax.As<float>()[b] = absmax;
    uint8_t codes[kNf4Block];
    EncodeBlock(borders.data(), scaled, codes);
    for (int64_t i = 0; i < n; i += 2) {
      packed[(begin + i) / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
    }
  }
}

// n values from the high half of the first byte on, or from its low half, times absmax.
template <typename T>
ATTUNE_CLONES void DecodeBlock(const uint8_t* packed, bool low_half, const float* table,
                               float absmax, T* out, int64_t n) {
  alignas(32) float scaled[16];
  for (int i = 0; i < 16; ++i) scaled[i] = table[i] * absmax;
  if (low_half && n > 0) {
    StoreRounded<T>(scaled[*packed++ & 15], out++);
    --n;
  }
  int64_t i = 0;
#ifdef ATTUNE_HAS_CLONES  // clang has no such shuffle
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  Floats low, high;
  std::memcpy(&low, scaled, sizeof(low));
  std::memcpy(&high, scaled + 8, sizeof(high));
  for (; i + 8 <= n; i += 8) {
    int32_t w;
    std::memcpy(&w, packed + i / 2, sizeof(w));
    const Ints codes = (Ints{w, w, w, w, w, w, w, w} >> Ints{4, 0, 12, 8, 20, 16, 28, 24}) & 15;
    const Floats values = __builtin_shuffle(low, high, codes);
    for (int j = 0; j < 8; ++j) StoreRounded<T>(values[j], &out[i + j]);
  }
#endif
  for (; i < n; ++i) {
    const int byte = packed[i / 2];
    StoreRounded<T>(scaled[i % 2 == 0 ? byte >> 4 : byte & 15], &out[i]);
  }
}

struct Source {
  const uint8_t* packed;
  const uint8_t* codes;
  const float* absmax;
  const float* absmax2;
  float offset;
  int64_t first_block;

  float AbsMax(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    const int64_t group = (first_block + block) / kNf4Group - first_block / kNf4Group;
    return DynamicMap(/*is_signed=*/true)[codes[block]] * absmax2[group] + offset;
  }
};

// Elements [begin, end) of the shard.
template <typename T>
void DequantizeRow(const Source& source, int64_t begin, int64_t end, T* out) {
  for (int64_t e = begin; e < end;) {
    const int64_t block = e / kNf4Block;
    const int64_t stop = std::min(end, (block + 1) * kNf4Block);
    DecodeBlock(source.packed + e / 2, e % 2 != 0, Nf4Values(), source.AbsMax(block),
                out + (e - begin), stop - e);
    e = stop;
  }
}

template <typename Args>
Source SourceOf(const Args& a, int64_t first_block) {
  const bool single = a.absmax.defined();
  return {a.packed.template As<uint8_t>(),
          single ? nullptr : a.codes.template As<uint8_t>(),
          single ? a.absmax.template As<float>() : nullptr,
          single ? nullptr : a.absmax2.template As<float>(),
          single ? 0.0f : *a.offset.template As<float>(),
          first_block};
}

template <typename T>
void Dequantize(const Nf4DequantizeArgs& a) {
  const Source source = SourceOf(a, a.first_block);
  const int64_t N = a.out.dim(0), K = a.out.dim(1);
#pragma omp parallel for schedule(static) if (WorthThreads(N * K))
  for (int64_t n = 0; n < N; ++n) {
    const int64_t begin = a.first_element + n * K;
    DequantizeRow(source, begin, begin + K, a.out.As<T>() + n * a.out.stride(0));
  }
}

void ToFp8(const Nf4ToFp8Args& a) {
  const bool turned = a.transposed;
  const TensorView& out = a.q;
  const int64_t N = out.dim(turned ? 1 : 0), K = out.dim(turned ? 0 : 1);
  const Source source = SourceOf(a, 0);
  const float inverse = 1.0f / *a.scale.As<float>();
  Float8E4M3* q = out.As<Float8E4M3>();
#pragma omp parallel for schedule(static) if (WorthThreads(N * K))
  for (int64_t n = 0; n < N; ++n) {
    float values[kNf4Block];
    for (int64_t k = 0; k < K; k += kNf4Block) {
      const int64_t count = std::min(kNf4Block, K - k);
      DequantizeRow(source, n * K + k, n * K + k + count, values);
      for (int64_t i = 0; i < count; ++i) {
        const Float8E4M3 code(values[i] * inverse);
        (turned ? q[(k + i) * out.stride(0) + n] : q[n * out.stride(0) + k + i]) = code;
      }
    }
  }
}

}  // namespace

void Nf4QuantizeCpu(const Exec& exec, const Nf4QuantizeArgs& a) {
  if (a.w.dtype == DType::kF32) return Quantize<float>(a);
  Quantize<BFloat16>(a);
}

void Nf4DoubleQuantizeCpu(const Exec& exec, const Nf4DoubleQuantizeArgs& a) {
  const int64_t blocks = a.absmax.dim(0), groups = Nf4Groups(blocks);
  const float* absmax = a.absmax.As<float>();
  float* offset = a.offset.As<float>();
  if (!a.offset_given) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += absmax[b];
    *offset = blocks > 0 ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
  }
  const float* map = DynamicMap(/*is_signed=*/true);
#pragma omp parallel for schedule(static) if (WorthThreads(blocks))
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * kNf4Group, end = std::min(begin + kNf4Group, blocks);
    float absmax2 = 0.0f;
    for (int64_t b = begin; b < end; ++b) {
      absmax2 = std::max(absmax2, std::abs(absmax[b] - *offset));
    }
    a.absmax2.As<float>()[g] = absmax2;
    const float reciprocal = absmax2 > 0.0f ? 1.0f / absmax2 : 0.0f;
    for (int64_t b = begin; b < end; ++b) {
      a.codes.As<uint8_t>()[b] = NearestDynamicCode(map, (absmax[b] - *offset) * reciprocal);
    }
  }
}

void Nf4DequantizeCpu(const Exec& exec, std::span<const Nf4DequantizeArgs> parts) {
  for (const Nf4DequantizeArgs& a : parts) {
    DispatchFloat(a.out.dtype, [&]<typename T>() { Dequantize<T>(a); });
  }
}

void Nf4ToFp8Cpu(const Exec& exec, std::span<const Nf4ToFp8Args> parts) {
  for (const Nf4ToFp8Args& a : parts) ToFp8(a);
}

}  // namespace attune
