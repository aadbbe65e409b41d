// Quotients and roots rounded to nearest, bit for bit those of __fdiv_rn and __fsqrt_rn, by their
// own operations where no number, quotient or remainder is near the ends of f32; without their
// tests for that, and with a reciprocal that several divisions share.
#pragma once

namespace attune {

// `reciprocal` is that of the divisor, rounded to nearest.
__device__ inline float Quotient(float x, float divisor, float reciprocal) {
  const float quotient = __fmul_rn(x, reciprocal);
  return __fmaf_rn(__fmaf_rn(-divisor, quotient, x), reciprocal, quotient);
}

__device__ inline float Quotient(float x, float divisor) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(divisor));
  reciprocal = __fmaf_rn(reciprocal, __fmaf_rn(-divisor, reciprocal, 1.0f), reciprocal);
  return Quotient(x, divisor, reciprocal);
}

// 2^24 times the root of x, which may be 0 or denormal.
__device__ inline float ScaledRoot(float x) {
  const float scaled = __fmul_rn(x, 0x1p48f);
  float inverse;  // of 0, of a small number: any finite one will do
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fmaf_rn(x, 0x1p48f, 0x1p-126f)));
  const float root = __fmul_rn(scaled, inverse);
  return __fmaf_rn(__fmaf_rn(-root, root, scaled), __fmul_rn(inverse, 0.5f), root);
}

}  // namespace attune
