// Elementwise ops on rank 1 or 2 views (rows may be strided; a contiguous view of any rank too).
// Arithmetic in f32 (f64 if an operand is f64), one rounding to the output's dtype.
// Cost: one pass over the operands.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

// x = value. Any dtype (value is converted to it).
struct FillArgs {
  TensorView x;  // (M, N) or (N)  out
  double value = 0.0;
};
void Fill(const Exec& exec, const FillArgs& args);

// y = x, converted. Floating dtypes to each other (f64, f32, bf16; f16 as source), or any dtype to
// itself, bit for bit. x and y do not overlap.
struct CopyArgs {
  TensorView x;  // (M, N) or (N)
  TensorView y;  // the shape of x  out
};
void Copy(const Exec& exec, const CopyArgs& args);

// y += alpha * x.  f64, f32, bf16, each its own. y may be x. An x of rank 1 beside a y of rank 2
// is added to every row (a bias).
struct AddArgs {
  TensorView x;  // (M, N) or (N)
  TensorView y;  // the shape of x, or (M, N)  in and out
  double alpha = 1.0;
};
void Add(const Exec& exec, const AddArgs& args);

// x *= alpha * (alpha_device, where given).  f64, f32 or bf16.
struct ScaleArgs {
  TensorView x;             // (M, N) or (N)  in and out
  TensorView alpha_device;  // (1)  optional, f32 or f64
  double alpha = 1.0;
};
void Scale(const Exec& exec, const ScaleArgs& args);

// x = cap * tanh(x / cap).  f64, f32 or bf16.
struct SoftCapArgs {
  TensorView x;      // (M, N) or (N)  in and out
  double cap = 1.0;  // > 0
};
void SoftCap(const Exec& exec, const SoftCapArgs& args);

// out = sum of x (out += with accumulate), in f64 and in a fixed order.
struct SumToScalarArgs {
  TensorView x;    // (M, N) or (N)  f64, f32, bf16 or u8
  TensorView out;  // (1)  out, f32 or f64
  bool accumulate = false;
};
void SumToScalar(const Exec& exec, const SumToScalarArgs& args);

}  // namespace attune
