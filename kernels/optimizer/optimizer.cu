// Optimisers and the gradient norm on CUDA; Adafactor has a file of its own.
#include <cmath>
#include <cstring>

#include "kernels/core/dynamic_map.h"
#include "kernels/core/early_launch.cuh"
#include "kernels/optimizer/batches.cuh"
#include "kernels/optimizer/division.cuh"
#include "kernels/optimizer/optimizer.h"
#include "kernels/optimizer/pieces.h"

namespace attune {
namespace {

constexpr int kThreads = kOptimizerThreads;
constexpr int kBatch = 76;        // what 4 KiB of parameters hold
constexpr int kNormBatch = 1600;  // what 32 KiB hold
// Elements that a block of threads updates: few, so that multiprocessors end together.
constexpr int64_t kUpdatePiece = 2048;

int64_t Pieces(const TensorView& x, int64_t piece) {
  return (x.size() + piece - 1) / piece;
}

struct DeviceOutput {
  void* data;
  bool is_double;
  __device__ void Write(double value) const {
    if (is_double) {
      *static_cast<double*>(data) = value;
    } else {
      *static_cast<float*>(data) = static_cast<float>(value);
    }
  }
};

struct AdamWBatch {
  float* param[kBatch];
  const float* grad[kBatch];
  float* m[kBatch];
  float* v[kBatch];
  int64_t size[kBatch];
  float decay[kBatch];
  float minus_step_size[kBatch];
  int32_t first_piece[kBatch];
  int count = 0;
  // Common to all; rounded from f64 once.
  float lerp, beta2, one_minus_beta2, sqrt_correction2, eps;
  bool lerp_from_end;  // torch's lerp starts at the nearer end: then `lerp` is -beta1, else 1 -
                       // beta1
  DeviceScalar grad_scale;
};

// Every product and sum rounded on its own, as on the CPU: the parameters are the same bits.
template <typename Batch>
__device__ void UpdateMoments(const Batch& b, float g, float* m, float* v) {
  const float difference = __fsub_rn(g, *m);
  *m = __fadd_rn(b.lerp_from_end ? g : *m, __fmul_rn(b.lerp, difference));
  *v = __fadd_rn(__fmul_rn(*v, b.beta2), __fmul_rn(__fmul_rn(b.one_minus_beta2, g), g));
}
template <typename Batch>
__device__ float Updated(const Batch& b, float decay, float minus_step_size, float param, float m,
                         float v) {
  const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), b.sqrt_correction2), b.eps);
  return __fadd_rn(__fmul_rn(param, decay), __fdiv_rn(__fmul_rn(minus_step_size, m), denominator));
}
template <typename Batch>
__device__ void Update(const Batch& b, float decay, float minus_step_size, float grad_scale,
                       float grad, float* param, float* m, float* v) {
  UpdateMoments(b, __fmul_rn(grad, grad_scale), m, v);
  *param = Updated(b, decay, minus_step_size, *param, *m, *v);
}

__global__ __launch_bounds__(kThreads) void AdamWKernel(const __grid_constant__ AdamWBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const int64_t begin = (blockIdx.x - b.first_piece[t]) * kUpdatePiece;
  const int64_t end = min(begin + kUpdatePiece, b.size[t]);
  float* param = b.param[t];
  const float* grad = b.grad[t];
  float *m = b.m[t], *v = b.v[t];
  const float decay = b.decay[t], minus_step_size = b.minus_step_size[t];
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  using P = Pack<float, 4>;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(m) |
                              reinterpret_cast<uintptr_t>(grad) | reinterpret_cast<uintptr_t>(v);
  const int64_t packed_end = addresses % 16 == 0 ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < packed_end; i += kThreads * 4) {
    const P g = P::Load(grad + i);
    P p = P::Load(param + i), first = P::Load(m + i), second = P::Load(v + i);
    for (int k = 0; k < 4; ++k) {
      Update(b, decay, minus_step_size, grad_scale, g.v[k], &p.v[k], &first.v[k], &second.v[k]);
    }
    p.Store(param + i);
    first.Store(m + i);
    second.Store(v + i);
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
    Update(b, decay, minus_step_size, grad_scale, grad[i], &param[i], &m[i], &v[i]);
  }
}

template <typename Args>
double StepSize(const Args& a, double lr_scale) {
  return a.lr * lr_scale / (1.0 - std::pow(a.beta1, static_cast<double>(a.step)));
}

template <typename Batch, typename Args>
Batch NewBatch(const Args& a) {
  Batch b{};
  const double correction2 = 1.0 - std::pow(a.beta2, static_cast<double>(a.step));
  const float one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  b.lerp_from_end = one_minus_beta1 >= 0.5f;
  b.lerp = b.lerp_from_end ? one_minus_beta1 - 1.0f : one_minus_beta1;
  b.beta2 = static_cast<float>(a.beta2);
  b.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  b.sqrt_correction2 = static_cast<float>(std::sqrt(correction2));
  b.eps = static_cast<float>(a.eps);
  b.grad_scale = DeviceScalarOf(a.grad_scale);
  return b;
}

constexpr int kBatch8bit = 48;
constexpr int64_t kBlock = kAdamW8bitBlock;
using MBins = DynamicCodeBins<true>;
using VBins = DynamicCodeBins<false>;
// Registers are enough for no more.
constexpr int kThreads8bit = 896, kWarps8bit = kThreads8bit / 32;
// As many as are resident at once: each makes the tables.
constexpr unsigned kMostBlocks8bit = 132;

// As AdamWBatch, with 8-bit states. A piece is a block of the states.
struct AdamW8bitBatch {
  float* param[kBatch8bit];
  const float* grad[kBatch8bit];
  uint8_t* m[kBatch8bit];
  uint8_t* v[kBatch8bit];
  float* m_absmax[kBatch8bit];
  float* v_absmax[kBatch8bit];
  int64_t size[kBatch8bit];
  float decay[kBatch8bit];
  float minus_step_size[kBatch8bit];
  int32_t first_piece[kBatch8bit];
  int32_t whole_blocks[kBatch8bit];  // of the states, that may be loaded by words
  int count = 0;
  float lerp, beta2, one_minus_beta2, sqrt_correction2, eps;
  bool lerp_from_end;
  DeviceScalar grad_scale;
  // Moments below this are updated by the short divisions.
  float ordinary = 0x1p20f;
  float scaled_correction, its_reciprocal;  // 2^24 sqrt_correction2
};
struct DynamicMaps {
  float m[256], v[256];
};

// Updated, of moments below 2^20 with a step size of at most 1 and an eps of at least 2^-40.
__device__ float UpdatedOrdinary(const AdamW8bitBatch& b, float decay, float minus_step_size,
                                 float param, float m, float v) {
  const float denominator =
      __fadd_rn(Quotient(ScaledRoot(v), b.scaled_correction, b.its_reciprocal), b.eps);
  // Scaled, that the remainder keeps its bits. A step below the smallest normal number is rounded
  // with the sum only, which no parameter above 2^-102 shows.
  const float step = Quotient(__fmul_rn(__fmul_rn(minus_step_size, m), 0x1p64f), denominator);
  return __fmaf_rn(step, 0x1p-64f, __fmul_rn(param, decay));
}

// Of a block of the states, a lane has elements 4 lane to 4 lane + 3 of each half.
struct AdamW8bitLane {
  static constexpr int kElements = kBlock / 32;

  // Where element k is, from the block's first one on.
  __device__ static uint32_t At(int k) {
    return threadIdx.x % 32 * 4 + k / 4 * static_cast<uint32_t>(kBlock / 2) + k % 4;
  }
  __device__ static uint32_t Code(const uint32_t* codes, int k) {
    return codes[k / 4] >> 8 * (k % 4) & 0xff;
  }
  __device__ static void SetCode(uint32_t* four, int k, uint32_t code) {
    *four = (k % 4 == 0 ? 0 : *four) | code << 8 * (k % 4);
  }

  // Elements of x from `begin` on; singly, zeros for those not before `end`.
  __device__ static void Load(const float* x, int64_t begin, float (&out)[kElements]) {
    const float* const from = x + begin + At(0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = *reinterpret_cast<const float4*>(from + half * kBlock / 2);
      out[4 * half] = four.x;
      out[4 * half + 1] = four.y;
      out[4 * half + 2] = four.z;
      out[4 * half + 3] = four.w;
    }
  }
  __device__ static void LoadSingly(const float* x, int64_t begin, int64_t end,
                                    float (&out)[kElements]) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      out[k] = begin + At(k) < end ? x[begin + At(k)] : 0.0f;
    }
  }
  __device__ static void Load(const uint8_t* x, int64_t begin, uint32_t (&out)[2]) {
    const uint8_t* const from = x + begin + At(0);
    out[0] = *reinterpret_cast<const uint32_t*>(from);
    out[1] = *reinterpret_cast<const uint32_t*>(from + kBlock / 2);
  }
  __device__ static void LoadSingly(const uint8_t* x, int64_t begin, int64_t end, uint8_t zero,
                                    uint32_t (&out)[2]) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      SetCode(&out[k / 4], k, begin + At(k) < end ? x[begin + At(k)] : zero);
    }
  }
  __device__ static void Store(float* x, int64_t begin, const float (&in)[kElements]) {
    float* const to = x + begin + At(0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float4*>(to + half * kBlock / 2) =
          float4{in[4 * half], in[4 * half + 1], in[4 * half + 2], in[4 * half + 3]};
    }
  }
  __device__ static void Store(uint8_t* x, int64_t begin, const uint32_t (&in)[2]) {
    uint8_t* const to = x + begin + At(0);
    *reinterpret_cast<uint32_t*>(to) = in[0];
    *reinterpret_cast<uint32_t*>(to + kBlock / 2) = in[1];
  }
};

// What the new moments of a lane's elements are made of.
struct AdamW8bitInputs {
  float grad[AdamW8bitLane::kElements];
  uint32_t m[2], v[2];
  float m_absmax, v_absmax;

  __device__ void Load(const AdamW8bitBatch& b, int t, int32_t block) {
    using Lane = AdamW8bitLane;
    const int64_t begin = block * kBlock, end = b.size[t];
    m_absmax = b.m_absmax[t][block];
    v_absmax = b.v_absmax[t][block];
    if (block < b.whole_blocks[t]) {
      Lane::Load(b.grad[t], begin, grad);
      Lane::Load(b.m[t], begin, m);
      Lane::Load(b.v[t], begin, v);
    } else {
      Lane::LoadSingly(b.grad[t], begin, end, grad);
      Lane::LoadSingly(b.m[t], begin, end, 127, m);
      Lane::LoadSingly(b.v[t], begin, end, 0, v);
    }
  }
};

// The codes of a lane's elements, all below 2^20, relative to the block's absolute maximum.
template <typename Bins>
__device__ void QuantizeOrdinary(const uint32_t* bins, float absmax, float* x, uint32_t* codes) {
  constexpr int kElements = AdamW8bitLane::kElements;
  if (absmax < 0x1p-60f) {  // scaled, that remainders keep their bits
    absmax *= 0x1p80f;
#pragma unroll
    for (int k = 0; k < kElements; ++k) x[k] *= 0x1p80f;
  }
  const float reciprocal = absmax > 0.0f ? __frcp_rn(absmax) : 0.0f;
#pragma unroll
  for (int half = 0; half < kElements / 4; ++half) {
    uint32_t found[4];  // a code in the highest byte
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      found[k] = Bins::Find(bins, Quotient(x[4 * half + k], absmax, reciprocal));
    }
    codes[half] = __byte_perm(__byte_perm(found[0], found[1], 0x73),
                              __byte_perm(found[2], found[3], 0x73), 0x5410);
  }
}

// The same of any elements.
__device__ void QuantizeAny(const float* map, bool is_signed, float absmax, const float* x,
                            uint32_t* codes) {
#pragma unroll
  for (int k = 0; k < AdamW8bitLane::kElements; ++k) {
    const float ratio = absmax > 0.0f ? __fdiv_rn(x[k], absmax) : 0.0f;
    AdamW8bitLane::SetCode(&codes[k / 4], k, NearestDynamicCode(map, is_signed, ratio));
  }
}

// The maps' values in shared memory, a copy of each for every lane, in a bank of its own: the
// lanes' codes are not the same. m's, then v's, each at a multiple of their size.
struct LaneValues {
  static constexpr uint32_t kMapBytes = 256 * 32 * 4;
  // That two maps lie behind `before` bytes, at a multiple of their size.
  static constexpr uint32_t Bytes(uint32_t before) { return 3 * kMapBytes - before; }

  uint32_t of_lane;  // the address of m's first value

  __device__ explicit LaneValues(const void* shared)
      : of_lane((static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + kMapBytes - 1) /
                    kMapBytes * kMapBytes +
                threadIdx.x % 32 * 4) {}
  // A warp's part, of every so many-th code.
  __device__ void Make(const float* m_map, const float* v_map, int first, int step) const {
    for (int code = first; code < 256; code += step) {
      const uint32_t at = of_lane + code * 128;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(m_map[code]) : "memory");
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + kMapBytes), "f"(v_map[code]) : "memory");
    }
  }
  // Of code k % 4 of four; of v's map, if `of_v`.
  template <bool of_v>
  __device__ float Of(uint32_t four, int k) const {
    const int left = 7 - 8 * (k % 4);
    const uint32_t at = (left > 0 ? four << left : four >> -left) & 0x7f80u;
    float value;
    asm("ld.shared.f32 %0, [%1 + %2];"
        : "=f"(value)
        : "r"(at | of_lane), "n"(of_v ? kMapBytes : 0));
    return value;
  }
};

// A warp per block of the states. It loads what it first needs of its next one before it goes on
// with the moments of this one.
__global__ __launch_bounds__(kThreads8bit,
                             1) void AdamW8bitKernel(const __grid_constant__ AdamW8bitBatch b,
                                                     const __grid_constant__ DynamicMaps maps,
                                                     int32_t pieces) {
  using Lane = AdamW8bitLane;
  constexpr int kElements = Lane::kElements;
  extern __shared__ float lane_values[];
  __shared__ float m_map[256], v_map[256];
  __shared__ uint32_t m_bins[MBins::kCount], v_bins[VBins::kCount];
  LetNextStart();
  if (threadIdx.x < 256) {
    m_map[threadIdx.x] = maps.m[threadIdx.x];
    v_map[threadIdx.x] = maps.v[threadIdx.x];
  }
  __syncthreads();
  const LaneValues values(lane_values);
  values.Make(m_map, v_map, threadIdx.x / 32, kWarps8bit);
  for (int i = threadIdx.x; i < MBins::kCount; i += kThreads8bit) m_bins[i] = MBins::Bin(m_map, i);
  for (int i = threadIdx.x; i < VBins::kCount; i += kThreads8bit) v_bins[i] = VBins::Bin(v_map, i);
  __syncthreads();
  AwaitEarlier();
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  int32_t piece = blockIdx.x * kWarps8bit + threadIdx.x / 32;
  int t = 0;
  AdamW8bitInputs in;
  const auto load = [&] {
    if (piece >= pieces) return;
    while (t + 1 < b.count && b.first_piece[t + 1] <= piece) ++t;
    in.Load(b, t, piece - b.first_piece[t]);
  };
  load();
  while (piece < pieces) {
    const int now = t;
    const int32_t block = piece - b.first_piece[now];
    const bool whole = block < b.whole_blocks[now];
    const int64_t begin = block * kBlock;
    float param[kElements], m[kElements], v[kElements], m_absmax = 0.0f;
    whole ? Lane::Load(b.param[now], begin, param)
          : Lane::LoadSingly(b.param[now], begin, b.size[now], param);
    uint32_t v_most = 0;  // bits, whose order is that of numbers; NaN is the largest
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      m[k] = __fmul_rn(values.Of<false>(in.m[k / 4], k), in.m_absmax);
      v[k] = __fmul_rn(values.Of<true>(in.v[k / 4], k), in.v_absmax);
      UpdateMoments(b, __fmul_rn(in.grad[k], grad_scale), &m[k], &v[k]);
      m_absmax = fmaxf(m_absmax, fabsf(m[k]));
      v_most = max(v_most, __float_as_uint(v[k]));
    }
    // If m is NaN, so is v, or m's old maximum was not finite.
    const bool m_ordinary = in.m_absmax < b.ordinary;
    piece += gridDim.x * kWarps8bit;
    load();
    m_absmax = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(m_absmax)));
    v_most = __reduce_max_sync(0xffffffffu, v_most);
    float v_absmax = __uint_as_float(v_most);
    const float decay = b.decay[now], minus_step_size = b.minus_step_size[now];
    uint32_t m_codes[2], v_codes[2];
    if (m_ordinary && m_absmax < b.ordinary && v_most < __float_as_uint(b.ordinary)) {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        param[k] = UpdatedOrdinary(b, decay, minus_step_size, param[k], m[k], v[k]);
      }
      QuantizeOrdinary<MBins>(m_bins, m_absmax, m, m_codes);
      QuantizeOrdinary<VBins>(v_bins, v_absmax, v, v_codes);
    } else {
      v_absmax = 0.0f;
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        param[k] = Updated(b, decay, minus_step_size, param[k], m[k], v[k]);
        v_absmax = fmaxf(v_absmax, fabsf(v[k]));
      }
      v_absmax = WarpMax(v_absmax);
      QuantizeAny(m_map, true, m_absmax, m, m_codes);
      QuantizeAny(v_map, false, v_absmax, v, v_codes);
    }
    if (whole) {
      Lane::Store(b.param[now], begin, param);
      Lane::Store(b.m[now], begin, m_codes);
      Lane::Store(b.v[now], begin, v_codes);
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        const int64_t at = begin + Lane::At(k);
        if (at >= b.size[now]) continue;
        b.param[now][at] = param[k];
        b.m[now][at] = static_cast<uint8_t>(Lane::Code(m_codes, k));
        b.v[now][at] = static_cast<uint8_t>(Lane::Code(v_codes, k));
      }
    }
    if (threadIdx.x % 32 == 0) {  // the warp's maxima have waited for all: the old ones were read
      b.m_absmax[now][block] = m_absmax;
      b.v_absmax[now][block] = v_absmax;
    }
  }
}

struct LionBatch {
  float* param[kBatch];
  const float* grad[kBatch];
  float* m[kBatch];
  int64_t size[kBatch];
  float decay[kBatch];
  float lr[kBatch];
  int32_t first_piece[kBatch];
  int count = 0;
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  DeviceScalar grad_scale;
};

__global__ __launch_bounds__(kThreads) void LionKernel(const __grid_constant__ LionBatch b) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const int64_t begin = (blockIdx.x - b.first_piece[t]) * kUpdatePiece;
  const int64_t end = min(begin + kUpdatePiece, b.size[t]);
  float *param = b.param[t], *m = b.m[t];
  const float* grad = b.grad[t];
  const float decay = b.decay[t], lr = b.lr[t];
  const float grad_scale = static_cast<float>(b.grad_scale.Read(1.0));
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float g = __fmul_rn(grad[i], grad_scale);
    const float direction = __fadd_rn(__fmul_rn(m[i], b.beta1), __fmul_rn(b.one_minus_beta1, g));
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : direction;
    param[i] = __fsub_rn(__fmul_rn(param[i], decay), __fmul_rn(lr, sign));
    m[i] = __fadd_rn(__fmul_rn(m[i], b.beta2), __fmul_rn(b.one_minus_beta2, g));
  }
}

struct NormBatch {
  const float* grad[kNormBatch];
  int64_t size[kNormBatch];
  int32_t first_piece[kNormBatch];
  int count = 0;
};
static_assert(sizeof(AdamWBatch) <= 4096 && sizeof(LionBatch) <= 4096 &&
              sizeof(NormBatch) <= 32740);

// In f64: the square of an f32 does not overflow.
__global__ __launch_bounds__(kThreads) void PartialNormKernel(const __grid_constant__ NormBatch b,
                                                              double* partial) {
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const int64_t begin = (blockIdx.x - b.first_piece[t]) * kCudaPiece;
  const int64_t end = min(begin + kCudaPiece, b.size[t]);
  const float* grad = b.grad[t];
  AwaitEarlier();
  LetNextStart();
  double sum = 0.0;
  const auto include = [&](float x) { sum += static_cast<double>(x) * static_cast<double>(x); };
  using P = Pack<float, 4>;
  const int64_t packed_end =
      reinterpret_cast<uintptr_t>(grad) % 16 == 0 ? begin + (end - begin) / 4 * 4 : begin;
#pragma unroll 8
  for (int64_t i = begin + threadIdx.x * 4; i < packed_end; i += kThreads * 4) {
    const P pack = P::Load(grad + i);
    for (int k = 0; k < 4; ++k) include(pack.v[k]);
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) include(grad[i]);
  sum = BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ __launch_bounds__(1024) void TotalKernel(const double* partial, int64_t pieces,
                                                    double* out) {
  AwaitEarlier();
  LetNextStart();
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < pieces; i += 1024) sum += partial[i];
  sum = BlockSum<1024>(sum);
  if (threadIdx.x == 0) *out = sum;
}

__global__ void ClipKernel(const double* norm_sq, DeviceOutput scale_out, DeviceOutput norm_out,
                           double max_norm) {
  const double norm = sqrt(*norm_sq);
  double scale = 1.0;
  if (max_norm > 0.0) {
    const double ratio = max_norm / (norm + 1e-6);
    scale = ratio > 1.0 ? 1.0 : ratio;  // NaN stays
  } else if (isnan(norm)) {
    scale = norm;
  }
  norm_out.Write(norm);
  scale_out.Write(scale);
}

}  // namespace

void AdamWCuda(const Exec& exec, const AdamWArgs& a) {
  auto b = NewBatch<AdamWBatch>(a);
  const auto fill = [&](int i, const AdamWTensor& t) {
    CHECK(t.param.dtype == DType::kF32 && "the CUDA backend keeps parameters in f32");
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.m[i] = Data<float>(t.m);
    b.v[i] = Data<float>(t.v);
    b.size[i] = t.param.size();
    b.decay[i] = static_cast<float>(1.0 - a.lr * t.lr_scale * t.weight_decay);
    b.minus_step_size[i] = static_cast<float>(-StepSize(a, t.lr_scale));
    return Pieces(t.param, kUpdatePiece);
  };
  InBatches<kBatch>(&b, a.tensors, fill, [&](unsigned grid) {
    AdamWKernel<<<grid, kThreads, 0, StreamOf(exec.stream)>>>(b);
  });
}

namespace {
bool Packable8bit(const AdamW8bitTensor& t) {
  const auto address = [](const TensorView& x) { return reinterpret_cast<uintptr_t>(x.data); };
  return (address(t.param) | address(t.grad)) % 16 == 0 && (address(t.m) | address(t.v)) % 4 == 0;
}
}  // namespace

void AdamW8bitCuda(const Exec& exec, const AdamW8bitArgs& a) {
  auto b = NewBatch<AdamW8bitBatch>(a);
  DynamicMaps maps;
  std::memcpy(maps.m, DynamicMap(/*is_signed=*/true), sizeof(maps.m));
  std::memcpy(maps.v, DynamicMap(/*is_signed=*/false), sizeof(maps.v));
  b.scaled_correction = 0x1p24f * b.sqrt_correction2;
  b.its_reciprocal = 1.0f / b.scaled_correction;
  constexpr unsigned kShared =
      LaneValues::Bytes(sizeof(DynamicMaps) + 4 * MBins::kCount + 4 * VBins::kCount);
  CUDA_CHECK(cudaFuncSetAttribute(AdamW8bitKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(kShared)));
  if (!(b.eps >= 0x1p-40f && b.sqrt_correction2 >= 0x1p-12f)) b.ordinary = 0.0f;
  const auto fill = [&](int i, const AdamW8bitTensor& t) {
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.m[i] = Data<uint8_t>(t.m);
    b.v[i] = Data<uint8_t>(t.v);
    b.m_absmax[i] = Data<float>(t.m_absmax);
    b.v_absmax[i] = Data<float>(t.v_absmax);
    b.size[i] = t.param.size();
    b.whole_blocks[i] = Packable8bit(t) ? static_cast<int32_t>(t.param.size() / kBlock) : 0;
    b.decay[i] = static_cast<float>(1.0 - a.lr * t.lr_scale * t.weight_decay);
    b.minus_step_size[i] = static_cast<float>(-StepSize(a, t.lr_scale));
    if (!(std::abs(b.minus_step_size[i]) <= 1.0f)) b.ordinary = 0.0f;
    return AdamW8bitBlocks(t.param.size());
  };
  InBatches<kBatch8bit>(&b, a.tensors, fill, [&](unsigned pieces) {
    const unsigned blocks = std::min((pieces + kWarps8bit - 1) / kWarps8bit, kMostBlocks8bit);
    LaunchEarly(exec.stream, {dim3(blocks), dim3(kThreads8bit), kShared}, AdamW8bitKernel, b, maps,
                static_cast<int32_t>(pieces));
  });
}

void LionCuda(const Exec& exec, const LionArgs& a) {
  LionBatch b{};
  b.beta1 = static_cast<float>(a.beta1);
  b.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  b.beta2 = static_cast<float>(a.beta2);
  b.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  b.grad_scale = DeviceScalarOf(a.grad_scale);
  const auto fill = [&](int i, const LionTensor& t) {
    CHECK(t.param.dtype == DType::kF32 && "the CUDA backend keeps parameters in f32");
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.m[i] = Data<float>(t.m);
    b.size[i] = t.param.size();
    b.decay[i] = static_cast<float>(1.0 - a.lr * t.lr_scale * t.weight_decay);
    b.lr[i] = static_cast<float>(a.lr * t.lr_scale);
    return Pieces(t.param, kUpdatePiece);
  };
  InBatches<kBatch>(&b, a.tensors, fill, [&](unsigned grid) {
    LionKernel<<<grid, kThreads, 0, StreamOf(exec.stream)>>>(b);
  });
}

void GradNormCuda(const Exec& exec, const GradNormArgs& a) {
  NormBatch b{};
  double* partial = static_cast<double*>(a.workspace.data);
  int64_t total = 0;
  const auto fill = [&](int i, const TensorView& grad) {
    CHECK(grad.dtype == DType::kF32 && "the CUDA backend keeps gradients in f32");
    b.grad[i] = Data<const float>(grad);
    b.size[i] = grad.size();
    return Pieces(grad, kCudaPiece);
  };
  InBatches<kNormBatch>(&b, a.grads, fill, [&](unsigned grid) {
    LaunchEarly(exec.stream, {dim3(grid), dim3(kThreads)}, PartialNormKernel, b, partial + total);
    total += grid;
  });
  LaunchEarly(exec.stream, {dim3(1), dim3(1024)}, TotalKernel, partial, total,
              Data<double>(a.norm_sq));
}

void ClipScaleCuda(const Exec& exec, const ClipScaleArgs& a) {
  ClipKernel<<<1, 1, 0, StreamOf(exec.stream)>>>(
      Data<const double>(a.norm_sq), DeviceOutput{a.scale.data, a.scale.dtype == DType::kF64},
      DeviceOutput{a.norm.data, a.norm.dtype == DType::kF64}, a.max_norm);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace attune
