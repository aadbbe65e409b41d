// MatMul on the CPU: oneDNN 2.x, or a blocked loop of our own.
//
// oneDNN primitives are made once per (shapes, strides, dtypes, flags) and kept for the life of the
// process; their scratchpad is the caller's workspace. Empty products never reach oneDNN.
#include <omp.h>

#include <dnnl.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "kernels/core/dispatch.h"
#include "kernels/core/gemm_block.h"
#include "kernels/core/parallel.h"
#include "kernels/core/simd.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/matmul/matmul.h"

namespace attune {
namespace {

bool plain_only = false;

struct Shape {
  int64_t m, n, k;
};

Shape ShapeOf(const MatMulArgs& a) {
  return {a.d.dim(0), a.d.dim(1), a.a.dim(a.trans_a ? 0 : 1)};
}

bool UsesOneDnn(const MatMulArgs& a) {
  if (plain_only || a.a.dtype == DType::kF64 || a.a.dtype == DType::kF8E4M3) return false;
  return a.a.dtype == DType::kF32 || CpuHasBf16Products();
}

// ---- The library ----

struct Primitive {
  dnnl::matmul matmul;
  dnnl::memory::desc a, b, d, scratchpad;
};

const dnnl::engine& Engine() {
  static const dnnl::engine* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

dnnl::memory::desc Desc(const TensorView& x, int64_t rows, int64_t columns, bool transposed) {
  const auto type =
      x.dtype == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
  // The row stride of a single row means nothing, and oneDNN wants it to be sensible.
  const int64_t ld = x.dim(0) > 1 ? x.stride(0) : std::max<int64_t>(x.dim(1), 1);
  return dnnl::memory::desc({rows, columns}, type,
                            transposed ? dnnl::memory::dims{1, ld} : dnnl::memory::dims{ld, 1});
}

std::shared_ptr<const Primitive> MakePrimitive(const MatMulArgs& a) {
  const auto [m, n, k] = ShapeOf(a);
  auto out = std::make_shared<Primitive>();
  out->a = Desc(a.a, m, k, a.trans_a);
  out->b = Desc(a.b, k, n, a.trans_b);
  out->d = Desc(a.d, m, n, false);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (a.alpha != 1.0) attr.set_output_scales(0, {static_cast<float>(a.alpha)});
  if (a.beta != 0.0) {
    dnnl::post_ops post;
    post.append_sum(1.0f);
    attr.set_post_ops(post);
  }
  const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(out->a, out->b, out->d), attr,
                                          Engine());
  out->scratchpad = desc.scratchpad_desc();
  out->matmul = dnnl::matmul(desc);
  return out;
}

// Cached, since making one takes longer than a small product. A trainer has a few dozen shapes;
// the bound is for a process that serves any.
std::shared_ptr<const Primitive> FindPrimitive(const MatMulArgs& a) {
  const auto [m, n, k] = ShapeOf(a);
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, double, int>;
  const auto ld = [](const TensorView& x) { return x.dim(0) > 1 ? x.stride(0) : x.dim(1); };
  const int flags = (a.trans_a ? 1 : 0) | (a.trans_b ? 2 : 0) | (a.beta != 0.0 ? 4 : 0) |
                    (a.a.dtype == DType::kBF16 ? 8 : 0) | (a.d.dtype == DType::kBF16 ? 16 : 0);
  const Key key{m, n, k, ld(a.a), ld(a.b), ld(a.d), flags, a.alpha, omp_get_max_threads()};
  static std::mutex mutex;
  static auto* cache = new std::map<Key, std::shared_ptr<const Primitive>>();
  const std::lock_guard<std::mutex> lock(mutex);
  auto it = cache->find(key);
  if (it == cache->end()) {
    constexpr size_t kMaxCached = 4096;
    if (cache->size() >= kMaxCached) cache->clear();
    it = cache->emplace(key, MakePrimitive(a)).first;
  }
  return it->second;
}

void RunOneDnn(const MatMulArgs& a) {
  const std::shared_ptr<const Primitive> primitive = FindPrimitive(a);
  thread_local dnnl::stream stream(Engine());
  const auto memory = [](const dnnl::memory::desc& desc, const TensorView& x) {
    return dnnl::memory(desc, Engine(), x.data);
  };
  std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_SRC, memory(primitive->a, a.a)},
                                                  {DNNL_ARG_WEIGHTS, memory(primitive->b, a.b)},
                                                  {DNNL_ARG_DST, memory(primitive->d, a.d)}};
  if (primitive->scratchpad.get_size() > 0) {
    arguments.emplace(DNNL_ARG_SCRATCHPAD, memory(primitive->scratchpad, a.workspace));
  }
  primitive->matmul.execute(stream, arguments);
  stream.wait();
}

// ---- Our own loop ----

constexpr int64_t kTileM = 48;
constexpr int64_t kTileN = 64;
constexpr int64_t kTileK = 128;

// out[i * out_row + j] = x at (row0 + i, column0 + j) of X or X^T, with zeros up to `width`.
template <typename T>
ATTUNE_CLONES void PackTile(const T* x, int64_t ld, bool transposed, int64_t rows, int64_t columns,
                            AccumulatorOf<T>* out, int64_t width) {
  using A = AccumulatorOf<T>;
  for (int64_t i = 0; i < rows; ++i) {
    A* line = out + i * width;
    if (transposed) {
      for (int64_t j = 0; j < columns; ++j) line[j] = ToAccumulator(x[j * ld + i]);
    } else {
      for (int64_t j = 0; j < columns; ++j) line[j] = ToAccumulator(x[i * ld + j]);
    }
    for (int64_t j = columns; j < width; ++j) line[j] = A{0};
  }
}

template <typename T, typename Out>
void PlainTile(const MatMulArgs& args, int64_t m0, int64_t n0) {
  using A = AccumulatorOf<T>;
  alignas(64) thread_local A a_tile[kTileM * kTileK];
  alignas(64) thread_local A b_tile[kTileK * kTileN];
  alignas(64) thread_local A sum[kTileM * kTileN];
  const auto [M, N, K] = ShapeOf(args);
  const int64_t rows = std::min(kTileM, M - m0), columns = std::min(kTileN, N - n0);
  std::fill(sum, sum + kTileM * kTileN, A{0});
  const T* a = args.a.As<T>();
  const T* b = args.b.As<T>();
  const int64_t lda = args.a.stride(0), ldb = args.b.stride(0);
  for (int64_t k0 = 0; k0 < K; k0 += kTileK) {
    const int64_t depth = std::min(kTileK, K - k0);
    PackTile(args.trans_a ? a + k0 * lda + m0 : a + m0 * lda + k0, lda, args.trans_a, rows, depth,
             a_tile, kTileK);
    PackTile(args.trans_b ? b + n0 * ldb + k0 : b + k0 * ldb + n0, ldb, args.trans_b, depth,
             columns, b_tile, kTileN);
    GemmBlock(GemmBlockArgs<A>{rows, kTileN, depth, a_tile, kTileK, 1, b_tile, kTileN, sum, kTileN,
                               true});
  }
  const A alpha = static_cast<A>(args.alpha);
  for (int64_t i = 0; i < rows; ++i) {
    Out* d = args.d.As<Out>() + (m0 + i) * args.d.stride(0) + n0;
    for (int64_t j = 0; j < columns; ++j) {
      A product = alpha * sum[i * kTileN + j];
      if constexpr (std::is_same_v<T, Float8E4M3>) {
        product *= args.a_scale.As<float>()[m0 + i] * args.b_scale.As<float>()[n0 + j];
      }
      d[j] = static_cast<Out>(args.beta != 0.0 ? product + ToAccumulator(d[j]) : product);
    }
  }
}

template <typename T, typename Out>
void RunPlain(const MatMulArgs& a) {
  const auto [m, n, k] = ShapeOf(a);
  const int64_t tiles_n = (n + kTileN - 1) / kTileN;
  const int64_t tiles = (m + kTileM - 1) / kTileM * tiles_n;
#pragma omp parallel for schedule(static) if (WorthThreads(m * n * k / 16))
  for (int64_t tile = 0; tile < tiles; ++tile) {
    PlainTile<T, Out>(a, tile / tiles_n * kTileM, tile % tiles_n * kTileN);
  }
}

}  // namespace

bool CpuHasBf16Products() {
  const auto isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

void SetCpuMatMulPlain(bool plain) {
  plain_only = plain;
}

int64_t MatMulWorkspaceBytesCpu(const Exec& exec, const MatMulArgs& a) {
  const auto [m, n, k] = ShapeOf(a);
  if (m == 0 || n == 0 || k == 0 || !UsesOneDnn(a)) return 0;
  const ThreadsForWork threads(m * n * k / 16);
  return static_cast<int64_t>(FindPrimitive(a)->scratchpad.get_size());
}

void MatMulCpu(const Exec& exec, const MatMulArgs& a) {
  const auto [m, n, k] = ShapeOf(a);
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (a.beta == 0.0) Fill(exec, {.x = a.d, .value = 0.0});
    return;
  }
  const ThreadsForWork threads(m * n * k / 16);
  if (UsesOneDnn(a)) return RunOneDnn(a);
  if (a.a.dtype == DType::kF64) return RunPlain<double, double>(a);
  if (a.a.dtype == DType::kF32) return RunPlain<float, float>(a);
  if (a.a.dtype == DType::kF8E4M3) {
    return a.d.dtype == DType::kBF16 ? RunPlain<Float8E4M3, BFloat16>(a)
                                     : RunPlain<Float8E4M3, float>(a);
  }
  if (a.d.dtype == DType::kBF16) return RunPlain<BFloat16, BFloat16>(a);
  RunPlain<BFloat16, float>(a);
}

}  // namespace attune
