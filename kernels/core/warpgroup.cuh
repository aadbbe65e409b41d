// What kernels on Hopper's tensor cores are made of: matrices in shared memory as wgmma reads them,
// copies into them that tell a barrier, and the products of a warpgroup (four warps, 128 threads).
//
// A matrix of R rows (a multiple of 8) and D columns of bf16 is kept as panels of 64 columns, one
// after the other: a panel is R rows of 128 bytes, in which the 16 bytes of number c are at
// c ^ (row % 8) ("128-byte swizzle"). A panel begins at a multiple of 1024 bytes.
//
// Products are asynchronous: FenceProducts, then some products, then CommitProducts; their
// registers may not be touched before WaitForProducts. Accumulators and a left side in registers
// are laid out as in mma.m16n8k16: warp w of the warpgroup has the rows 16 w to 16 w + 15, of which
// lane l has l / 4 and l / 4 + 8; of every 8 columns it has 2 (l % 4) and the next.
#pragma once

#include "kernels/core/tensor_core.cuh"

namespace attune {

// These instructions are Hopper's alone, and compiled for sm_90a alone: kernels are started where
// HasWarpgroupProducts, and their bodies are for `if constexpr (kWarpgroupProducts)`.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroupProducts = true;
#else
constexpr bool kWarpgroupProducts = false;
#endif
inline bool HasWarpgroupProducts() {
  static const bool has = [] {
    int device = 0, major = 0, minor = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0;
  }();
  return has;
}

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 2 * kPanelColumns;
constexpr int kWarpgroup = 128;  // threads

// Where the 16 bytes of number `pack` of a row are.
__device__ inline uint32_t PackAddress(uint32_t matrix, int rows, int row, int pack) {
  return matrix + (pack / 8 * rows + row) * kPanelRowBytes + ((pack % 8) ^ (row % 8)) * 16;
}

// ---- Barriers ----

// Whether WaitFor would return at once.
__device__ inline bool HasPassed(uint64_t* barrier, int parity) {
  int passed;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; "
      "selp.b32 %0, 1, 0, p; }"
      : "=r"(passed)
      : "r"(SharedAddress(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}
// Two warpgroups, 0 and 1, that take turns; 0 begins, once 1 has passed.
__device__ inline void AwaitTurn(int warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory");
}
__device__ inline void PassTurn(int warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(2 - warpgroup) : "memory");
}

// ---- Products ----

__device__ inline void FenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving the use of accumulators across.
template <int kN>
__device__ void Pin(float (&d)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kM, int kN>
__device__ void Pin(float (&d)[kM][kN]) {
#pragma unroll
  for (int i = 0; i < kM; ++i) Pin(d[i]);
}

// A matrix, from `address` on: 128-byte swizzle, groups of eight rows 1024 bytes apart. Of the
// right side of a product from registers also the bytes between panels, where there are two.
__device__ inline uint64_t DescriptorOf(uint32_t address, int panel_bytes = 16) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

#define ATTUNE_REGISTERS_8 "{%0, %1, %2, %3, %4, %5, %6, %7"
#define ATTUNE_REGISTERS_16 ATTUNE_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ATTUNE_REGISTERS_32 \
  ATTUNE_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTUNE_REGISTERS_64                                                                 \
  ATTUNE_REGISTERS_32                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTUNE_OPERANDS_8(d, i)                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ATTUNE_OPERANDS_32(d, i)                                                      \
  ATTUNE_OPERANDS_8(d, i), ATTUNE_OPERANDS_8(d, i + 8), ATTUNE_OPERANDS_8(d, i + 16), \
      ATTUNE_OPERANDS_8(d, i + 24)

// d (64, kN) = a (64, 16) b (kN, 16)^T, plus d if `add`; both from shared memory, where rows of
// both are along the sum.
template <int kN>
__device__ void MultiplyShared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN == 64 || kN == 128);
  const int plus = add;
  if constexpr (kN == 64) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ATTUNE_REGISTERS_32
        "}, %32, %33, p, 1, 1, 0, 0; }"
        : ATTUNE_OPERANDS_32(d, 0)
        : "l"(a), "l"(b), "r"(plus));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ATTUNE_REGISTERS_64
        "}, %64, %65, p, 1, 1, 0, 0; }"
        : ATTUNE_OPERANDS_32(d, 0), ATTUNE_OPERANDS_32(d, 32)
        : "l"(a), "l"(b), "r"(plus));
  }
}
// The same with few columns, kN = 16 or 32; if kAcross, a is (16, 64)^T: a panel's 64 columns
// of 16 rows.
template <int kN, bool kAcross>
__device__ void MultiplyNarrow(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN == 16 || kN == 32);
  const int plus = add;
  if constexpr (kN == 16) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %10, 0; "
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " ATTUNE_REGISTERS_8
        "}, %8, %9, p, 1, 1, %11, 0; }"
        : ATTUNE_OPERANDS_8(d, 0)
        : "l"(a), "l"(b), "r"(plus), "n"(kAcross));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %18, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " ATTUNE_REGISTERS_16
        "}, %16, %17, p, 1, 1, %19, 0; }"
        : ATTUNE_OPERANDS_8(d, 0), ATTUNE_OPERANDS_8(d, 8)
        : "l"(a), "l"(b), "r"(plus), "n"(kAcross));
  }
}
// d (64, 64) += a (64, 16) b (16, 64): a from registers, b from shared memory, where its columns
// are adjacent.
__device__ inline void MultiplyRegisters(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ATTUNE_REGISTERS_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
      : ATTUNE_OPERANDS_32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// The same with two panels of b, for the left and the right 64 columns of the sum.
__device__ inline void MultiplyRegisters(float (&left)[32], float (&right)[32],
                                         const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ATTUNE_REGISTERS_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
      : ATTUNE_OPERANDS_32(left, 0), ATTUNE_OPERANDS_32(right, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef ATTUNE_OPERANDS_32
#undef ATTUNE_OPERANDS_8
#undef ATTUNE_REGISTERS_64
#undef ATTUNE_REGISTERS_32
#undef ATTUNE_REGISTERS_16
#undef ATTUNE_REGISTERS_8

// ---- Registers ----

// Of every thread of the warpgroup, from here on.
template <int kCount>
__device__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace attune
