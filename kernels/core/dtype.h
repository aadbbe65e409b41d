// Element types of tensors, and the CPU representation of bfloat16.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "kernels/core/check.h"

namespace attune {

// kF64 exists on the CPU backend only: there every backward is checked by finite differences.
enum class DType : uint8_t { kF64, kF32, kBF16, kF16, kI64, kI32, kU8, kI8 };

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
      return 1;
  }
  return 0;
}

// Name as safetensors headers spell it ("F32", "BF16", ...).
constexpr const char* DTypeName(DType dtype) {
  constexpr const char* kNames[] = {"F64", "F32", "BF16", "F16", "I64", "I32", "U8", "I8"};
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
