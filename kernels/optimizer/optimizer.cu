// Optimisers and the gradient norm on CUDA; Adafactor has a file of its own.
#include <cmath>
#include <cstring>

#include "kernels/core/dynamic_map.h"
#include "kernels/optimizer/batches.cuh"
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
  float one_minus_beta1, beta1, beta2, one_minus_beta2, sqrt_correction2, eps;
  bool lerp_from_end;  // torch's lerp starts at the nearer end
  DeviceScalar grad_scale;
};

struct ByIntrinsics {
  __device__ void Note(float) {}
  __device__ float Inverse(float) const { return 0.0f; }
  __device__ float Divide(float a, float b, float) const { return __fdiv_rn(a, b); }
  __device__ float Root(float x) const { return __fsqrt_rn(x); }
};
// The same roundings by the steps that those take where no exponent is far from 0, so without a
// branch. Dividends and roots' squares are noted: all of them, but for zeros, are to be InRange.
struct BySteps {
  static constexpr float kLeast = 0x1p-90f, kMost = 0x1p90f;
  uint32_t least = 0xffffffffu;  // one less than the bits of the smallest; of 0 it is the largest

  __device__ void Note(float x) { least = min(least, __float_as_uint(fabsf(x)) - 1); }
  __device__ bool AllInRange() const { return least >= __float_as_uint(kLeast) - 1; }
  // Of the largest of them, and of divisors.
  static __device__ bool InRange(float x) { return x >= kLeast && x <= kMost; }

  // For Divide by b.
  __device__ float Inverse(float b) const {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    return fmaf(r, fmaf(-b, r, 1.0f), r);
  }
  __device__ float Divide(float a, float b, float inverse) const {
    const float q = __fmul_rn(a, inverse);
    return fmaf(fmaf(-b, q, a), inverse, q);
  }
  __device__ float Root(float x) const {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float s = __fmul_rn(x, r);
    return x == 0.0f ? 0.0f : fmaf(fmaf(-s, s, x), __fmul_rn(r, 0.5f), s);
  }
};

// Every product and sum rounded on its own, as on the CPU: the parameters are the same bits.
template <typename Batch, typename Math>
__device__ void Update(const Batch& b, float decay, float minus_step_size, float grad_scale,
                       float grad, float* param, float* m, float* v, Math* math) {
  const float g = __fmul_rn(grad, grad_scale);
  const float difference = __fsub_rn(g, *m);
  const float m_new = b.lerp_from_end ? __fsub_rn(g, __fmul_rn(difference, b.beta1))
                                      : __fadd_rn(*m, __fmul_rn(b.one_minus_beta1, difference));
  const float v_new =
      __fadd_rn(__fmul_rn(*v, b.beta2), __fmul_rn(__fmul_rn(b.one_minus_beta2, g), g));
  const float root = math->Root(v_new), step = __fmul_rn(minus_step_size, m_new);
  const float denominator =
      __fadd_rn(math->Divide(root, b.sqrt_correction2, math->Inverse(b.sqrt_correction2)), b.eps);
  math->Note(v_new);
  math->Note(step);
  *m = m_new;
  *v = v_new;
  *param = __fadd_rn(__fmul_rn(*param, decay),
                     math->Divide(step, denominator, math->Inverse(denominator)));
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
  ByIntrinsics math;
  using P = Pack<float, 4>;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(m) |
                              reinterpret_cast<uintptr_t>(grad) | reinterpret_cast<uintptr_t>(v);
  const int64_t packed_end = addresses % 16 == 0 ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < packed_end; i += kThreads * 4) {
    const P g = P::Load(grad + i);
    P p = P::Load(param + i), first = P::Load(m + i), second = P::Load(v + i);
    for (int k = 0; k < 4; ++k) {
      Update(b, decay, minus_step_size, grad_scale, g.v[k], &p.v[k], &first.v[k], &second.v[k],
             &math);
    }
    p.Store(param + i);
    first.Store(m + i);
    second.Store(v + i);
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
    Update(b, decay, minus_step_size, grad_scale, grad[i], &param[i], &m[i], &v[i], &math);
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
  b.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  b.beta1 = 1.0f - b.one_minus_beta1;
  b.beta2 = static_cast<float>(a.beta2);
  b.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  b.sqrt_correction2 = static_cast<float>(std::sqrt(correction2));
  b.eps = static_cast<float>(a.eps);
  b.lerp_from_end = b.one_minus_beta1 >= 0.5f;
  b.grad_scale = DeviceScalarOf(a.grad_scale);
  return b;
}

constexpr int kBatch8bit = 24;
constexpr int64_t kBlock = kAdamW8bitBlock;
// One block on a multiprocessor, since each makes tables; all its threads have 64 registers.
constexpr int kThreads8bit = 1024;
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
  int count = 0;
  float one_minus_beta1, beta1, beta2, one_minus_beta2, sqrt_correction2, eps;
  bool lerp_from_end;
  DeviceScalar grad_scale;
};
struct DynamicMaps {
  float m[256], v[256];
};

// Of a block of the states, what a lane has: elements 8 lane to 8 lane + 7.
struct AdamW8bitLane {
  static constexpr int kElements = kBlock / 32;
  using Floats = Pack<float, 4>;
  using Codes = Pack<uint8_t, kElements>;
  Floats param[2], grad[2];
  Codes m, v;

  __device__ void Load(const AdamW8bitBatch& b, int t, int64_t i) {
    for (int half = 0; half < 2; ++half) {
      param[half] = Floats::Load(b.param[t] + i + 4 * half);
      grad[half] = Floats::Load(b.grad[t] + i + 4 * half);
    }
    m = Codes::Load(b.m[t] + i);
    v = Codes::Load(b.v[t] + i);
  }
  __device__ void Store(const AdamW8bitBatch& b, int t, int64_t i) const {
    for (int half = 0; half < 2; ++half) param[half].Store(b.param[t] + i + 4 * half);
    m.Store(b.m[t] + i);
    v.Store(b.v[t] + i);
  }
  // The same of `count` elements, one by one; the others are 0.
  __device__ void Load(const AdamW8bitBatch& b, int t, int64_t i, int count) {
    for (int k = 0; k < kElements; ++k) {
      const bool inside = k < count;
      param[k / 4].v[k % 4] = inside ? b.param[t][i + k] : 0.0f;
      grad[k / 4].v[k % 4] = inside ? b.grad[t][i + k] : 0.0f;
      m.v[k] = inside ? b.m[t][i + k] : uint8_t{127};
      v.v[k] = inside ? b.v[t][i + k] : uint8_t{0};
    }
  }
  __device__ void Store(const AdamW8bitBatch& b, int t, int64_t i, int count) const {
    for (int k = 0; k < count; ++k) {
      b.param[t][i + k] = param[k / 4].v[k % 4];
      b.m[t][i + k] = m.v[k];
      b.v[t][i + k] = v.v[k];
    }
  }
};

// A lane's own copy of a map: 32 lanes that look up what they like would meet in the same banks.
struct LaneMap {
  const float* values;
  __device__ float operator[](int code) const { return values[32 * code]; }
  // By the block of threads, before a barrier.
  __device__ static void Fill(const float* map, float* copies) {
    for (int i = threadIdx.x; i < 256 * 32; i += kThreads8bit) copies[i] = map[i / 32];
  }
};
// What the threads of a block share.
struct Tables8bit {
  float m[256 * 32], v[256 * 32];  // LaneMap's
  uint32_t m_codes[DynamicCodes::kBuckets], v_codes[DynamicCodes::kBuckets];
};

__device__ bool Aligned8bit(const AdamW8bitBatch& b, int t) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  return (address(b.param[t]) | address(b.grad[t])) % 16 == 0 &&
         (address(b.m[t]) | address(b.v[t])) % 8 == 0;
}

// Of floats that are not negative, whose bits ascend as they do.
__device__ float WarpMaxOfSizes(float x) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
}

// What a lane takes to its elements of a block, and makes of them.
struct AdamW8bitBlock {
  static constexpr int kElements = AdamW8bitLane::kElements;
  const AdamW8bitBatch& b;
  LaneMap m_map, v_map;
  DynamicCodes m_codes, v_codes;
  float grad_scale, decay, minus_step_size;  // the last two of the tensor
  float m_absmax, v_absmax;                  // old ones, then new ones

  // By all lanes of a warp. False where Math's roundings are not those of ByIntrinsics: *x is not
  // what it was then, nor are the maxima.
  template <typename Math>
  __device__ bool Step(AdamW8bitLane* x) {
    Math math;
    float m[kElements], v[kElements], m_most = 0.0f, v_most = 0.0f;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      m[k] = __fmul_rn(m_map[x->m.v[k]], m_absmax);
      v[k] = __fmul_rn(v_map[x->v.v[k]], v_absmax);
      Update(b, decay, minus_step_size, grad_scale, x->grad[k / 4].v[k % 4],
             &x->param[k / 4].v[k % 4], &m[k], &v[k], &math);
      m_most = fmaxf(m_most, fabsf(m[k]));
      v_most = fmaxf(v_most, fabsf(v[k]));
    }
    m_absmax = WarpMaxOfSizes(m_most);
    v_absmax = WarpMaxOfSizes(v_most);
    if constexpr (std::is_same_v<Math, BySteps>) {
      const bool good = math.AllInRange() && Math::InRange(m_absmax) && Math::InRange(v_absmax) &&
                        Math::InRange(b.sqrt_correction2) && Math::InRange(b.eps);
      if (!__all_sync(0xffffffffu, good)) return false;
    }
    const float m_inverse = math.Inverse(m_absmax), v_inverse = math.Inverse(v_absmax);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const float m_share = m_absmax > 0.0f ? math.Divide(m[k], m_absmax, m_inverse) : 0.0f;
      const float v_share = v_absmax > 0.0f ? math.Divide(v[k], v_absmax, v_inverse) : 0.0f;
      x->m.v[k] = static_cast<uint8_t>(m_codes.OfSigned(m_share));
      x->v.v[k] = static_cast<uint8_t>(v_codes.Of(v_share));
    }
    return true;
  }
};

// A warp per block of the states.
__global__ __launch_bounds__(kThreads8bit) void AdamW8bitKernel(
    const __grid_constant__ AdamW8bitBatch b, const __grid_constant__ DynamicMaps maps,
    uint32_t pieces) {
  using Lane = AdamW8bitLane;
  constexpr int kElements = Lane::kElements;
  extern __shared__ __align__(16) unsigned char memory[];
  Tables8bit& tables = *reinterpret_cast<Tables8bit*>(memory);
  LaneMap::Fill(maps.m, tables.m);
  LaneMap::Fill(maps.v, tables.v);
  for (int i = threadIdx.x; i < DynamicCodes::kBuckets; i += kThreads8bit) {
    tables.m_codes[i] = DynamicCodes::EntryOf(maps.m, i);
    tables.v_codes[i] = DynamicCodes::EntryOf(maps.v, i);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  AdamW8bitBlock own{b,
                     {tables.m + lane},
                     {tables.v + lane},
                     {tables.m_codes},
                     {tables.v_codes},
                     static_cast<float>(b.grad_scale.Read(1.0))};
  const uint32_t warps = gridDim.x * (kThreads8bit / 32);
  for (uint32_t piece = blockIdx.x * (kThreads8bit / 32) + threadIdx.x / 32; piece < pieces;
       piece += warps) {
    const int t = TensorOf(b.first_piece, b.count, piece);
    const int64_t block = piece - b.first_piece[t];
    const int64_t i = block * kBlock + lane * kElements;
    const int count = static_cast<int>(max(int64_t{0}, min(int64_t{kElements}, b.size[t] - i)));
    const bool packed = count == kElements && Aligned8bit(b, t);
    Lane x;
    const auto load = [&] {
      packed ? x.Load(b, t, i) : x.Load(b, t, i, count);
      own.m_absmax = b.m_absmax[t][block];
      own.v_absmax = b.v_absmax[t][block];
    };
    load();
    own.decay = b.decay[t];
    own.minus_step_size = b.minus_step_size[t];
    if (!own.Step<BySteps>(&x)) {  // seldom
      load();
      own.Step<ByIntrinsics>(&x);
    }
    packed ? x.Store(b, t, i) : x.Store(b, t, i, count);
    if (lane == 0) {  // all have read the old ones: they have met since
      b.m_absmax[t][block] = own.m_absmax;
      b.v_absmax[t][block] = own.v_absmax;
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
  AwaitEarlier();
  const int t = TensorOf(b.first_piece, b.count, blockIdx.x);
  const int64_t begin = (blockIdx.x - b.first_piece[t]) * kCudaPiece;
  const int64_t end = min(begin + kCudaPiece, b.size[t]);
  const float* grad = b.grad[t];
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

void AdamW8bitCuda(const Exec& exec, const AdamW8bitArgs& a) {
  auto b = NewBatch<AdamW8bitBatch>(a);
  DynamicMaps maps;
  std::memcpy(maps.m, DynamicMap(/*is_signed=*/true), sizeof(maps.m));
  std::memcpy(maps.v, DynamicMap(/*is_signed=*/false), sizeof(maps.v));
  constexpr int kBytes = sizeof(Tables8bit);
  CUDA_CHECK(
      cudaFuncSetAttribute(AdamW8bitKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const auto fill = [&](int i, const AdamW8bitTensor& t) {
    b.param[i] = Data<float>(t.param);
    b.grad[i] = Data<const float>(t.grad);
    b.m[i] = Data<uint8_t>(t.m);
    b.v[i] = Data<uint8_t>(t.v);
    b.m_absmax[i] = Data<float>(t.m_absmax);
    b.v_absmax[i] = Data<float>(t.v_absmax);
    b.size[i] = t.param.size();
    b.decay[i] = static_cast<float>(1.0 - a.lr * t.lr_scale * t.weight_decay);
    b.minus_step_size[i] = static_cast<float>(-StepSize(a, t.lr_scale));
    return AdamW8bitBlocks(t.param.size());
  };
  InBatches<kBatch8bit>(&b, a.tensors, fill, [&](unsigned pieces) {
    constexpr unsigned kWarps = kThreads8bit / 32;
    const unsigned blocks = std::min((pieces + kWarps - 1) / kWarps, kMostBlocks8bit);
    AdamW8bitKernel<<<blocks, kThreads8bit, kBytes, StreamOf(exec.stream)>>>(b, maps, pieces);
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
