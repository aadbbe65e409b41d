// Operands of products in 8-bit floating point (e4m3, see kernels/core/dtype.h), for weights that
// are frozen. value = code * scale:
//   rows of activations and gradients   scale[m] = max |row m| / 448, found anew for each row
//   a weight                            scale = max |W| / 14, one for the whole matrix: codes are
//                                       floating, so a scale per row would make them no better
//
// The adapter rides in the same product, as in kernels/lora, each of its values as the sum of two
// codes, v = (high + low) * scale, which is about bf16's precision (2^-8). s B^T then is
//   s_high B_high + s_low B_high + s_high B_low       (s_low B_low is 2^-8 of that, and left out)
// so an adapter of e columns takes three times e, rounded up to a multiple of 16 (rows of f8 want
// that), filled with zeros:
//   rows of activations [x | s_high | s_low | s_high | 0]
//   rows of weights     [W | B_high | B_high | B_low | 0]
//
// Neither side saturates. s is computed from x, and often x's codes are made where x is (Fp8Rows),
// before s is known. So s has room: s / room is encoded, and room * B beside W. A row whose s /
// room is larger than its x is encoded once more. The room is 4, or as many times half of it as B
// needs to be no larger than codes are: W's largest is put at 14, so with 4, B may be 8 times as
// large.
#pragma once

#include <span>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
#include "kernels/lora/lora.h"

namespace attune {

constexpr float kFp8WeightRange = 14.0f;
constexpr float kFp8MostRoom = 4.0f;
constexpr float kFp8LeastRoom = 0x1p-100f;
constexpr float kFp8LeastScale = 1e-30f;        // of a weight that is zero
constexpr float kFp8LeastRowScale = 0x1p-126f;  // rows with less become zeros: 1 / scale is finite

// Elements from row to row of a matrix of f8 with so many columns: rows that begin at multiples of
// 128 bytes are multiplied a third faster (seen on an H100).
constexpr int64_t Fp8RowStride(int64_t columns) {
  return (columns + 127) / 128 * 128;
}

// Columns of f8 that e columns of an adapter take.
constexpr int64_t Fp8Extension(int64_t e) {
  return (3 * e + 15) / 16 * 16;
}

// The room beside a weight of that scale, of an adapter whose largest is `largest`. A power of two.
constexpr float Fp8RoomOf(float largest, float scale) {
  const float most = Float8E4M3::kMax * scale;
  float room = kFp8MostRoom;
  while (room * largest > most && room > kFp8LeastRoom) room *= 0.5f;
  return room;
}

struct Fp8QuantizeArgs {
  TensorView x;      // (M, K + e)               f32 or bf16; the last e columns are the adapter's
  int64_t e = 0;     //
  TensorView room;   // (1)                      f32, with e > 0
  TensorView q;      // (M, K + Fp8Extension(e)) out, f8
  TensorView scale;  // (M)                      out, f32
};
void Fp8Quantize(const Exec& exec, const Fp8QuantizeArgs& args);

// The codes of rows, as an optional output of the op that makes these rows: those that Fp8Quantize
// gives of what it wrote.
struct Fp8Rows {
  TensorView q;      // (M, >= K)  out, f8; columns behind K are left alone
  TensorView scale;  // (M)        out, f32
  bool defined() const { return q.defined(); }
};
// For such ops: their check, and what is left to do where their kernels make no codes. x (M, K).
void CheckFp8Rows(const Fp8Rows& rows, const TensorView& x);
Fp8QuantizeArgs Fp8QuantizeOf(const TensorView& x, const Fp8Rows& rows);

// The second half of Fp8Quantize, where q and scale have the codes of x's first K columns: puts the
// adapter's beside them, and encodes the rows again that need a larger scale. The same bits.
struct Fp8QuantizeAdapterArgs {
  TensorView x;      // (M, K + e)               f32 or bf16
  int64_t e = 0;     //
  TensorView room;   // (1)                      f32, with e > 0
  TensorView q;      // (M, K + Fp8Extension(e)) in and out, f8
  TensorView scale;  // (M)                      in and out, f32
};
void Fp8QuantizeAdapter(const Exec& exec, const Fp8QuantizeAdapterArgs& args);

// Raises every element of `scale` to the scale that W needs. Starts from zeros.
struct Fp8WeightScaleArgs {
  TensorView w;      // (N, K)  f32 or bf16
  TensorView scale;  // (S)     in and out, f32; all elements are the same
};
void Fp8WeightScale(const Exec& exec, const Fp8WeightScaleArgs& args);

struct Fp8QuantizeWeightArgs {
  TensorView w;             // (N, K)  f32 or bf16
  TensorView scale;         // (>= 1)  f32
  TensorView q;             // (N, K)  out, f8; rows may be strided
  bool transposed = false;  // q is (K, N): of W^T
};
void Fp8QuantizeWeight(const Exec& exec, const Fp8QuantizeWeightArgs& args);

// The room of each direction: of factor * B beside W, and of A^T beside W^T.
struct Fp8AdapterRoomArgs {
  std::span<const LoraExtendPart> parts;  // 1 to kMaxLoraParts; f32 or bf16
  TensorView scale;                       // (>= 1) f32, of the weight
  double factor = 1.0;
  TensorView room;  // (2)  out, f32
};
// Of many weights at once, on a GPU in a few launches. One dtype.
void Fp8AdapterRoom(const Exec& exec, std::span<const Fp8AdapterRoomArgs> all);

// Puts the adapter beside the codes of a weight: room * factor * B beside W, room * A^T beside W^T.
// For stacked matrices B is block-diagonal, as in kernels/lora; e = parts * r.
struct Fp8ExtendArgs {
  std::span<const LoraExtendPart> parts;  // 1 to kMaxLoraParts, ascending row_begin; f32 or bf16
  TensorView scale;                       // (>= 1) f32, of the weight
  TensorView room;                        // (1) f32, of the direction
  TensorView q;             // (N, Fp8Extension(e))  out, f8, beside W; rows may be strided
  bool transposed = false;  // q is (K, Fp8Extension(e)), beside W^T
  double factor = 1.0;
};
void Fp8Extend(const Exec& exec, const Fp8ExtendArgs& args);

}  // namespace attune
