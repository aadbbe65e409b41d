// Matrix product with strided rows:
//   D = alpha * op(A) op(B) + beta * D,   op(X) = X or X^T,   beta is 0 or 1
//
// a and b share a dtype (f64, f32, bf16, f8); d has the same dtype, or f32 where a and b are bf16.
// Of f8 only A B^T is multiplied, with a scale per row of A and per row of B, into bf16 or f32:
//   D[m,n] = alpha * a_scale[m] * b_scale[n] * sum_k A[m,k] B[n,k] + beta * D[m,n]
// A GPU adds up such products with about 14 bits (e4m3 has 4).
// Products are summed in f32 (f64 for f64) and rounded once, to d's dtype, with beta * D added
// before the rounding. With beta == 0, D is only written: it may hold NaN.
// M, N or K may be 0; K == 0 gives D = beta * D.
// Rows may be strided (stride(0) >= dim(1)); the innermost stride is 1.
// d must not overlap a or b; a and b may be the same memory.
//
// CPU: oneDNN for f32, and for bf16 where the CPU multiplies bf16 itself; else a blocked loop of
// our own (always for f64), whose sums do not hang on the number of threads or the instruction
// set. oneDNN's may.
// Cost: 2 M N K operations.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct MatMulArgs {
  TensorView a;  // (M, K), or (K, M) if trans_a
  TensorView b;  // (K, N), or (N, K) if trans_b
  TensorView d;  // (M, N)  out; in and out if beta == 1
  bool trans_a = false;
  bool trans_b = false;
  double alpha = 1.0;
  double beta = 0.0;     // 0 or 1
  TensorView a_scale;    // (M) f32, of f8
  TensorView b_scale;    // (N) f32, of f8
  TensorView workspace;  // (>= MatMulWorkspaceBytes) u8; may be left out where that is 0
};

// Bytes of scratch that MatMul wants for these shapes, strides, flags and dtypes. Data pointers
// and `workspace` are not looked at, so the plan device asks the same question. On the CPU the
// answer hangs on the number of OpenMP threads of the process.
int64_t MatMulWorkspaceBytes(const Exec& exec, const MatMulArgs& args);

void MatMul(const Exec& exec, const MatMulArgs& args);

// True where this CPU multiplies bf16 pairs itself (AVX512-BF16 or AMX): there training in bf16 is
// faster than in f32. Elsewhere bf16 products work, slowly.
bool CpuHasBf16Products();

// For tests and for hunting a fault of the library: while true, the CPU backend uses its own loop
// for every dtype. Not thread safe; set it while no product runs.
void SetCpuMatMulPlain(bool plain);

}  // namespace attune
