// Element types of tensors, and the CPU representation of bfloat16.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "kernels/core/check.h"

namespace attune {

// kF64 exists on the CPU backend only: there every backward is checked by finite differences.
enum class DType : uint8_t { kF64, kF32, kBF16, kF16, kI64, kI32, kU8, kI8, kF8E4M3 };

constexpr int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kU8:
    case DType::kI8:
    case DType::kF8E4M3:
      return 1;
  }
  return 0;
}

// Name as safetensors headers spell it ("F32", "BF16", ...).
constexpr const char* DTypeName(DType dtype) {
  constexpr const char* kNames[] = {"F64", "F32", "BF16", "F16",    "I64",
                                    "I32", "U8",  "I8",   "F8_E4M3"};
  return kNames[static_cast<int>(dtype)];
}

// bfloat16: the upper half of a float. From float: round to nearest, ties to even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits = 0;

  BFloat16() = default;
  // Without a branch, so that loops over it are vectorised.
  explicit BFloat16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

// IEEE half precision, read only: checkpoints hold it, no op computes in it.
struct Float16 {
  uint16_t bits = 0;

  explicit operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude < 0x0400u) {  // zero and subnormals: a multiple of 2^-24
      const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
      return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
    }
    const uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    return std::bit_cast<float>(sign | ((magnitude << 13) + exponent));
  }
};

// 8-bit floating point: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity, largest 448,
// smallest 2^-9. From float: round to nearest, ties to even; what is larger becomes 448, NaN stays.
struct Float8E4M3 {
  static constexpr float kMax = 448.0f;
  uint8_t bits = 0;

  Float8E4M3() = default;
  explicit Float8E4M3(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value), magnitude = u & 0x7fffffffu;
    const uint8_t sign = static_cast<uint8_t>(u >> 24 & 0x80u);
    const float size = std::bit_cast<float>(magnitude);
    uint32_t code = 0x7fu;
    if (magnitude >= 0x43e00000u) {  // 448
      code = magnitude > 0x7f800000u ? 0x7fu : 0x7eu;
    } else if (magnitude < 0x3c800000u) {  // 2^-6: subnormal, a multiple of 2^-9
      code = std::bit_cast<uint32_t>(size + 16384.0f) - std::bit_cast<uint32_t>(16384.0f);
    } else {
      code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    }
    bits = static_cast<uint8_t>(sign | code);
  }
  explicit operator float() const {
    const uint32_t magnitude = bits & 0x7fu;
    float value = static_cast<float>(magnitude) * 0x1p-9f;
    if (magnitude >= 8) value = std::bit_cast<float>((magnitude << 20) + (120u << 23));
    if (magnitude == 0x7fu) value = std::bit_cast<float>(0x7fc00000u);
    return (bits & 0x80u) != 0 ? -value : value;
  }
};

// The type in which an element type is summed: double for double, else float.
template <typename T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline AccumulatorOf<T> ToAccumulator(T value) {
  return static_cast<AccumulatorOf<T>>(value);
}

// *out = value, rounded. Loops over it are vectorised; over assignments of BFloat16 they are not.
template <typename T>
inline void StoreRounded(AccumulatorOf<T> value, T* out) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    out->bits = BFloat16(value).bits;
  } else {
    *out = value;
  }
}

template <typename T>
constexpr DType DTypeOf() {
  if constexpr (std::is_same_v<T, double>) return DType::kF64;
  if constexpr (std::is_same_v<T, float>) return DType::kF32;
  if constexpr (std::is_same_v<T, BFloat16>) return DType::kBF16;
  if constexpr (std::is_same_v<T, Float16>) return DType::kF16;
  if constexpr (std::is_same_v<T, int64_t>) return DType::kI64;
  if constexpr (std::is_same_v<T, int32_t>) return DType::kI32;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::kU8;
  if constexpr (std::is_same_v<T, int8_t>) return DType::kI8;
  if constexpr (std::is_same_v<T, Float8E4M3>) return DType::kF8E4M3;
}

// Calls f.template operator()<T>() with the CPU type of a floating dtype (f64, f32, bf16).
template <typename F>
void DispatchFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF64:
      return f.template operator()<double>();
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kBF16:
      return f.template operator()<BFloat16>();
    default:
      CHECK(false && "not a floating dtype that ops compute in");
  }
}

}  // namespace attune
